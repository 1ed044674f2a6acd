"""What a row is made of: models, data, collators and arguments, each built anew from seeds and files."""

import copy
import random
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from datasets import Dataset
from factors import Row
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GraniteMoeConfig,
    GraniteMoeForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    TrainingArguments,
)
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from wmss_trl.data.tiny import build_tokenizer

NUM_EXAMPLES = 18
GLOBAL_BATCH = 4
# Longer than a packed row needs to be for several documents, shorter than two rows together
PACKED_LENGTH = {"prompt-completion": 48, "text": 48, "messages": 80}
ADAPTERS = {
    "lora": {},
    "lora-biases": {"bias": "all"},
    "dora": {"use_dora": True},
    "trained": {},
}


def questions(num_examples: int, seed: int) -> list[tuple[str, str]]:
    """Different sums of two to five numbers."""
    generator = random.Random(seed)
    found: dict[str, str] = {}
    while len(found) < num_examples:
        terms = [generator.randint(0, 99) for _ in range(generator.randint(2, 5))]
        found[" + ".join(map(str, terms)) + " ="] = f" {sum(terms)}"
    return list(found.items())


def make_dataset(kind: str, num_examples: int = NUM_EXAMPLES, seed: int = 0) -> Dataset:
    rows: list[dict[str, Any]] = []
    for question, answer in questions(num_examples, seed):
        if kind == "text":
            rows.append({"text": question + answer})
        elif kind == "prompt-completion":
            rows.append({"prompt": question, "completion": answer})
        else:
            roles = {"user": question, "assistant": answer}
            rows.append({"messages": [{"role": role, "content": content} for role, content in roles.items()]})
    return Dataset.from_list(rows)


def make_tokenizer() -> PreTrainedTokenizerBase:
    return build_tokenizer([question + answer for question, answer in questions(50, seed=0)], vocab_size=280)


def make_model(
    architecture: str, tokenizer: PreTrainedTokenizerBase, seed: int, width: int = 64, dropout: float = 0.0
) -> PreTrainedModel:
    common = {
        "vocab_size": len(tokenizer),
        "hidden_size": width,
        "intermediate_size": width,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "attention_dropout": dropout,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "initializer_range": 0.3,  # the default's outputs hardly depend on the inputs at this size
    }
    grouped = common | {"num_key_value_heads": 2}
    experts = {"num_experts_per_tok": 2, "output_router_logits": True, "router_aux_loss_coef": 0.1}
    head_dim = {"head_dim": width // 4}
    classes = {
        "qwen3-tied": (Qwen3ForCausalLM, Qwen3Config, grouped | head_dim | {"tie_word_embeddings": True}),
        "llama-untied": (LlamaForCausalLM, LlamaConfig, grouped | {"tie_word_embeddings": False}),
        "gemma3-softcap": (
            Gemma3ForCausalLM,
            Gemma3TextConfig,
            grouped | head_dim | {"final_logit_softcapping": 3.0, "query_pre_attn_scalar": width // 4},
        ),
        "qwen3-moe": (
            Qwen3MoeForCausalLM,
            Qwen3MoeConfig,
            grouped | experts | head_dim | {"num_experts": 4, "moe_intermediate_size": width},
        ),
        "granite-moe": (
            GraniteMoeForCausalLM,
            GraniteMoeConfig,
            # Without a router loss: for that TRL 1.16 reads `config.num_experts`, which this architecture has not
            grouped
            | experts
            | {"num_local_experts": 4, "router_aux_loss_coef": 0.0, "logits_scaling": 0.5, "initializer_range": 0.1},
        ),
        "gpt-neox-biases": (
            GPTNeoXForCausalLM,
            GPTNeoXConfig,
            common | {"hidden_dropout": dropout, "attention_bias": True},
        ),
    }
    model_class, config_class, options = classes[architecture]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config_class(**options))
        with torch.no_grad():  # biases start at 0, which would hide that they are trained or forgotten
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    parameter.normal_(std=0.1)
    return model.eval()


def make_adapter_config(adapter: str) -> LoraConfig:
    options = {"r": 4, "lora_alpha": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    return LoraConfig(**options | ADAPTERS[adapter])


def with_trained_adapter(base: PreTrainedModel, seed: int) -> PeftModel:
    """A base with an adapter that says something."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = get_peft_model(base, make_adapter_config("trained"))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.1)
    return model


class MaskingCollator(DataCollatorForLanguageModeling):
    """A user's subclass: the last supervised token of each example carries no loss."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = super().torch_call(examples)
        for labels in batch["labels"]:
            labels[(labels != -100).nonzero()[-1]] = -100
        return batch


class OwnCollator:
    """A user's own collator: pads to a multiple of 8."""

    def __init__(self, pad_token_id: int):
        self.pad_token_id = pad_token_id

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        length = -(-max(len(example["input_ids"]) for example in examples) // 8) * 8
        pads = {"input_ids": self.pad_token_id, "labels": -100, "attention_mask": 0}
        rows = [{**example, "attention_mask": [1] * len(example["input_ids"])} for example in examples]
        return {
            key: torch.tensor([[*row[key], *[pad] * (length - len(row[key]))] for row in rows])
            for key, pad in pads.items()
        }


def make_collator(kind: str, tokenizer: PreTrainedTokenizerBase) -> Any:
    classes = {"trl": DataCollatorForLanguageModeling, "subclass": MaskingCollator, "own": OwnCollator}
    return classes[kind](tokenizer.pad_token_id)


def learning_rate(row: Row) -> float:
    """Rounding to bfloat16 must not grow into another run."""
    return 1e-2 if row["precision"] == "fp32" else 1e-3


@dataclass
class World:
    """The files of a row and how its models and arguments are built from them."""

    row: Row
    folder: Path

    @classmethod
    def build(cls, row: Row, folder: Path) -> "World":
        """Write the files that the row needs."""
        world, tokenizer = cls(row, folder), make_tokenizer()
        weak_dropout = 0.0 if row["train_weak"] == "yes" else 0.3  # one that is trained must be reproducible
        models = {"base": (0, 64, 0.0), "weak": (1, 64, weak_dropout), "smaller": (2, 32, weak_dropout)}
        models["auto/checkpoint-3"] = models["weak"]
        for name, (seed, width, dropout) in models.items():
            model = make_model(row["architecture"], tokenizer, seed, width, dropout)
            model.save_pretrained(folder / name)
            tokenizer.save_pretrained(folder / name)
        base = AutoModelForCausalLM.from_pretrained(folder / "base")
        with_trained_adapter(base, seed=3).save_pretrained(folder / "adapter")
        generator = np.random.default_rng(0)
        weak_entropy, strong_entropy = generator.uniform(0.5, 2, (2, NUM_EXAMPLES)).astype(np.float32)
        np.savez(folder / "scores.npz", weak=weak_entropy, strong=strong_entropy)
        return world

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return AutoTokenizer.from_pretrained(self.folder / "base")

    @property
    def sft_epochs(self) -> int:
        return 0 if self.row["weak"] == "auto" or self.row["curriculum"] == "score-file" else 1

    def base(self) -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(self.folder / "base")

    def handed_in(self) -> PreTrainedModel | PeftModel:
        """The model as it is handed to the trainer."""
        base = self.base()
        if self.row["adapter"] == "trained":
            model = with_trained_adapter(base, seed=4)
            model.peft_config["default"].base_model_name_or_path = str(self.folder / "base")
            return model
        return base

    def adapter_config(self) -> LoraConfig | None:
        return (
            make_adapter_config(self.row["adapter"]) if self.row["adapter"] in ADAPTERS.keys() - {"trained"} else None
        )

    def strong(self) -> PreTrainedModel | PeftModel:
        """The model that is trained, as far as it is known before the trainer draws an adapter's start."""
        config = self.adapter_config()
        return self.handed_in() if config is None else get_peft_model(self.handed_in(), config)

    def weak(self) -> PreTrainedModel | PeftModel:
        """The weak model at the start of the run, loaded without the package."""
        kind, folder = self.row["weak"], self.folder
        if kind == "m0":
            return self.handed_in()
        if kind == "adapter":
            trained = self.row["train_weak"] == "yes"
            return PeftModel.from_pretrained(self.base(), folder / "adapter", is_trainable=trained)
        if kind == "4-bit":
            return AutoModelForCausalLM.from_pretrained(folder / "weak", **self.four_bit)
        name = {"auto": "auto/checkpoint-3", "smaller": "smaller"}.get(kind, "weak")
        return AutoModelForCausalLM.from_pretrained(folder / name)

    four_bit = {  # noqa: RUF012
        "quantization_config": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
        "dtype": torch.float32,
    }

    def options(self, output: str, resplit: bool = False) -> dict[str, Any]:
        """Arguments of [`WMSSConfig`]."""
        row = self.row
        processes, accumulation = int(row["processes"]), int(row["accumulation"])
        if resplit:
            accumulation = 3 - accumulation
        options: dict[str, Any] = {
            "output_dir": str(self.folder / output),
            "use_cpu": True,
            "bf16": row["precision"] == "bf16",
            "per_device_train_batch_size": GLOBAL_BATCH // processes // accumulation,
            "per_device_eval_batch_size": 8,
            "gradient_accumulation_steps": accumulation,
            "gradient_checkpointing": row["checkpointing"] == "yes",
            "num_train_epochs": self.sft_epochs + 2,
            "sft_epochs": self.sft_epochs,
            "learning_rate": learning_rate(row),
            "optim": "adamw_torch",
            "adam_epsilon": 1e-3,  # so that Adam does not magnify rounding where gradients are small
            "weight_decay": 0.0,
            "logging_steps": 1,
            "save_strategy": "steps",
            "save_steps": 3,
            "report_to": "none",
            "disable_tqdm": True,
            "plot_curriculum": False,
            "mixing_lambda": 0.4,
            "anchor_weight": float(row["anchor"]),
            "lambda_schedule": "constant" if row["schedule"] == "lambda-1" else row["schedule"],
            "loss_type": row["loss_type"],
            "train_weak": row["train_weak"] == "yes",
            "weak_refresh": row["weak_refresh"],
            "weak_cache": None if row["weak_cache"] == "none" else row["weak_cache"],
            "curriculum": row["curriculum"] != "off",
            "train_sampling_strategy": row["sampling"].replace("-", "_"),
            "dataloader_num_workers": int(row["workers"]),
            "assistant_only_loss": row["data"] == "messages",
            "max_length": None,
            "padding_free": row["layout"] == "padding-free",
            "packing": row["layout"] == "packed",
        }
        if row["schedule"] == "crossover":
            del options["mixing_lambda"]
        elif row["schedule"] == "lambda-1":
            options["mixing_lambda"] = 1.0
        elif row["schedule"] == "linear":
            options["final_mixing_lambda"] = 0.8
        if row["curriculum"] in ("v1", "v2"):
            options["curriculum_variant"] = row["curriculum"]
        if row["curriculum"] == "v1":  # the weights that "v2" brings with it
            options |= {"difficulty_weight": 0.8, "consolidation_weight": 0.1, "repair_weight": 0.1}
        if row["curriculum"] == "replacement":
            options["curriculum_replacement"] = True
        if row["curriculum"] == "score-file":
            options["score_file"] = str(self.folder / "scores.parquet")
        if row["layout"] == "packed":
            options["max_length"] = PACKED_LENGTH[row["data"]]
        if row["evaluation"] == "load-best":
            options |= {"eval_strategy": "steps", "eval_steps": 3, "load_best_model_at_end": True}
        if row["length"] == "max-steps":
            # Within the last epoch
            options["max_steps"] = (4, 5)[self.sft_epochs] if row["layout"] == "packed" else (5, 10)[self.sft_epochs]
        if row["weak"] == "auto":
            options["weak_model_name_or_path"] = f"auto:{self.folder / 'auto'}"
        if row["weak"] == "4-bit":
            options["weak_model_init_kwargs"] = dict(self.four_bit)
        if row["weak"] in ("folder", "smaller", "adapter", "4-bit"):
            name = {"folder": "weak", "4-bit": "weak"}.get(row["weak"], row["weak"])
            options["weak_model_name_or_path"] = str(self.folder / name)
        return options

    def write_score_file(self, token_counts: list[int]) -> None:
        """Scores that no model gives, so that a run that computes its own is detected."""
        scores = np.load(self.folder / "scores.npz")
        columns = {"weak_entropy": scores["weak"], "strong_entropy": scores["strong"], "tokens": token_counts}
        pq.write_table(pa.table({"index": np.arange(NUM_EXAMPLES), **columns}), self.folder / "scores.parquet")


def copy_of(args: TrainingArguments) -> dict[str, Any]:
    """The options as they are now, for comparing them afterwards."""
    return {option.name: copy.deepcopy(getattr(args, option.name)) for option in fields(args)}
