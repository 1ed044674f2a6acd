"""
Weak-Driven Learning on math problems.

The embedded default: generated word problems and a model small enough to be trained from scratch on a CPU. WMSS is
compared with its baselines from the same M1, in a table and a plot (`--seeds 5` adds paired differences over seeds).
The same happens on your own data when no model is named:

    python examples/train_math.py
    python examples/train_math.py --dataset_path problems.jsonl --num_test 300

Full fine-tuning:

    accelerate launch examples/train_math.py \
        --model_name_or_path Qwen/Qwen3-0.6B-Base --dataset_name openai/gsm8k --dataset_config main \
        --num_train_epochs 2 --sft_epochs 1 --learning_rate 1e-5 --output_dir Qwen3-0.6B-WMSS

LoRA, where the weak model is the base with the adapter switched off:

    accelerate launch examples/train_math.py \
        --model_name_or_path Qwen/Qwen3-0.6B-Base --dataset_name openai/gsm8k --dataset_config main \
        --use_peft --lora_r 32 --num_train_epochs 2 --learning_rate 2e-4 --output_dir Qwen3-0.6B-WMSS-LoRA

Several GPUs (`ddp.yaml`, `fsdp2.yaml`, `zero2.yaml`, `zero3.yaml`):

    accelerate launch --config_file recipes/accelerate/fsdp2.yaml --num_processes 8 examples/train_math.py ...

Two processes on the CPU:

    accelerate launch --config_file recipes/accelerate/cpu2.yaml examples/train_math.py --use_cpu true

Data sets have `question`/`solution`/`answer`, `prompt`/`completion` or `messages` columns. All options can stand in a
YAML file: `--config run.yaml`.
"""

import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from accelerate import PartialState
from datasets import Dataset
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from trl import ModelConfig, SFTConfig, SFTTrainer, TrlParser, get_peft_config, get_quantization_config

from wmss_trl import WMSSConfig, WMSSTrainer
from wmss_trl.baselines.comparison import compare_with_baselines
from wmss_trl.baselines.report import format_table, format_verdict, plot_comparison, save_results
from wmss_trl.config import convert_arguments
from wmss_trl.data.arithmetic import arithmetic_dataset, generate_problems
from wmss_trl.data.math import load_math_dataset, prompts_and_answers, to_prompt_completion
from wmss_trl.data.tiny import build_model, build_tokenizer
from wmss_trl.distributed.sharding import is_sharded
from wmss_trl.evaluation.generation import greedy_generate
from wmss_trl.evaluation.math_answers import accuracy, extract_answer, is_correct

EMBEDDED_DEFAULT = Path(__file__).parents[1] / "recipes" / "tiny" / "arithmetic.yaml"


@dataclass
class ScriptArguments:
    """Options of this script; without a data set it generates one."""

    dataset_name: str | None = field(default=None, metadata={"help": "Data set on the Hub."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of the data set on the Hub."})
    dataset_path: str | None = field(default=None, metadata={"help": "Local file or folder with the training data."})
    dataset_train_split: str = field(default="train", metadata={"help": "Split to train on."})
    test_path: str | None = field(default=None, metadata={"help": "Local file or folder with held-out problems."})
    dataset_test_split: str | None = field(default=None, metadata={"help": "Split with held-out problems."})
    num_test: int = field(default=0, metadata={"help": "Problems to hold out of the training data, or to generate."})
    num_train: int | None = field(default=None, metadata={"help": "Largest number of training problems."})
    max_new_tokens: int = field(default=256, metadata={"help": "Longest answer in the evaluation."})
    seeds: int = field(default=1, metadata={"help": "How often to repeat a comparison, with other seeds."})
    num_pretrain: int = field(default=0, metadata={"help": "Problems for the pre-training of the small model."})
    pretrain_epochs: float = field(default=1.0, metadata={"help": "Epochs of that pre-training."})
    pretrain_learning_rate: float = field(default=3e-3, metadata={"help": "Learning rate of that pre-training."})
    vocab_size: int = field(default=512, metadata={"help": "Vocabulary of the small model."})
    hidden_size: int = field(default=128, metadata={"help": "Width of the small model."})
    num_layers: int = field(default=2, metadata={"help": "Layers of the small model."})
    max_number: int = field(default=10, metadata={"help": "Largest number in the generated problems."})

    def __post_init__(self):
        if self.dataset_name and self.dataset_path:
            raise ValueError(
                f"Both `dataset_name={self.dataset_name!r}` and `dataset_path={self.dataset_path!r}` are set. Keep "
                "one of them."
            )
        if not (self.dataset_name or self.dataset_path or (self.num_train and self.num_test and self.num_pretrain)):
            raise ValueError(
                "Set `dataset_name` or `dataset_path`, or all of `num_train`, `num_test` and `num_pretrain` to "
                "generate problems."
            )


def load_data(script: ScriptArguments, seed: int) -> tuple[Dataset, Dataset | None]:
    """Training problems and, if there are any, held-out problems."""
    source = script.dataset_path or script.dataset_name
    if source is None:
        generated = arithmetic_dataset(script.num_train, script.num_test, seed, max_number=script.max_number)
        return to_prompt_completion(generated["train"]), to_prompt_completion(generated["test"])
    train, test = load_math_dataset(source, script.dataset_train_split, config_name=script.dataset_config), None
    if script.test_path is not None:
        test = load_math_dataset(script.test_path)
    elif script.dataset_test_split is not None:
        test = load_math_dataset(source, script.dataset_test_split, config_name=script.dataset_config)
    elif script.num_test:
        train, test = train.train_test_split(script.num_test, seed=seed).values()
    return train if script.num_train is None else train.take(min(script.num_train, len(train))), test


def solve(
    script: ScriptArguments,
    args: WMSSConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: Dataset,
) -> np.ndarray:
    """Which of the problems the model solves by greedy generation."""
    prompts, answers = prompts_and_answers(problems)
    outputs = greedy_generate(model, tokenizer, prompts, script.max_new_tokens, args.per_device_eval_batch_size)
    return np.array(
        [is_correct(extract_answer(output), answer) for output, answer in zip(outputs, answers, strict=True)]
    )


def train_model(script: ScriptArguments, args: WMSSConfig, model_args: ModelConfig) -> None:
    """The three phases on a model of your own."""
    train, test = load_data(script, args.seed)
    args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(args.model_init_kwargs or {}),
    }
    trainer = WMSSTrainer(
        model_args.model_name_or_path,
        args,
        train_dataset=train,
        eval_dataset=test if args.eval_strategy != "no" else None,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()
    if test is not None and trainer.is_world_process_zero():
        model = trainer.accelerator.unwrap_model(trainer.model)
        if is_sharded(model):  # generation on one process needs a whole one
            unset_hf_deepspeed_config()  # or it would be split again
            model = AutoModelForCausalLM.from_pretrained(args.output_dir, dtype=model_args.dtype).to(args.device)
        mean, error = accuracy(solve(script, args, model, trainer.processing_class, test))
        print(f"Greedy exact match on {len(test)} held-out problems: {100 * mean:.1f} ± {100 * error:.1f} %")
    if args.push_to_hub:
        trainer.push_to_hub(dataset_name=script.dataset_name)


def pretrain_small_model(
    script: ScriptArguments, args: WMSSConfig, train: Dataset, test: Dataset
) -> tuple[str, PreTrainedTokenizerBase]:
    """Folder of M0: a new model after a short training, on other generated problems or on the given data."""
    if script.dataset_path is None and script.dataset_name is None:
        known = [*train["question"], *test["question"]]
        problems = generate_problems(
            script.num_pretrain, args.seed + 1_000_000, max_number=script.max_number, exclude=known
        )
        dataset = to_prompt_completion(problems)
    else:
        dataset = train
    text_columns = [column for column in ("prompt", "completion", "messages") if column in dataset.column_names]
    texts = (str(value) for column in text_columns for value in dataset[column])
    tokenizer = build_tokenizer(texts, vocab_size=script.vocab_size)
    model = build_model(tokenizer, hidden_size=script.hidden_size, num_layers=script.num_layers, seed=args.seed)
    pretrain_args = convert_arguments(
        args,
        SFTConfig,
        output_dir=f"{args.output_dir}/pretraining",
        num_train_epochs=script.pretrain_epochs,
        learning_rate=script.pretrain_learning_rate,
        lr_scheduler_type="constant_with_warmup",
        save_strategy="no",
    )
    PartialState().print("Pre-training M0", flush=True)
    trainer = SFTTrainer(model, pretrain_args, train_dataset=dataset, processing_class=tokenizer)
    trainer.train()
    trainer.save_model()
    return trainer.args.output_dir, tokenizer


def compare_small_models(script: ScriptArguments, args: WMSSConfig) -> None:
    """WMSS and its baselines on a small model, once per seed; prints a table, writes `results.json` and `plot.png`."""
    state, runs = PartialState(), []
    for seed in range(args.seed, args.seed + script.seeds):
        seed_args = convert_arguments(args, WMSSConfig, seed=seed, output_dir=f"{args.output_dir}/seed{seed}")
        train, test = load_data(script, seed)
        if test is None:
            raise ValueError(
                "A comparison needs held-out problems: set `test_path`, `dataset_test_split` or `num_test`."
            )
        m0, tokenizer = pretrain_small_model(script, seed_args, train, test)
        state.wait_for_everyone()
        results, sampler = compare_with_baselines(
            partial(AutoModelForCausalLM.from_pretrained, m0),
            seed_args,
            train,
            test,
            tokenizer,
            partial(solve, script, args, tokenizer=tokenizer, problems=test),
        )
        runs.append(results)
        if state.is_main_process:
            plot_comparison(f"{seed_args.output_dir}/plot.png", results, sampler)
    if state.is_main_process:
        save_results(f"{args.output_dir}/results.json", runs)
        print(f"Held-out results; tables and plots are in {args.output_dir}", format_table(runs), sep="\n\n")
        print(format_verdict(runs), sep="\n\n")


def main() -> None:
    arguments = sys.argv[1:]
    if not any(argument.startswith(("--model_name_or_path", "--config")) for argument in arguments):
        arguments = ["--config", str(EMBEDDED_DEFAULT), *arguments]
    script, args, model_args = TrlParser((ScriptArguments, WMSSConfig, ModelConfig)).parse_args_and_config(arguments)
    if model_args.model_name_or_path is None:
        if args.push_to_hub:
            raise ValueError("`push_to_hub=True` needs a model of your own: set `model_name_or_path`.")
        compare_small_models(script, args)
    else:
        if script.seeds != 1:
            raise ValueError(f"`seeds={script.seeds}` repeats a comparison of small models. Use `seed` with a model.")
        train_model(script, args, model_args)


if __name__ == "__main__":
    main()
