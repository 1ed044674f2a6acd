"""
Time and memory of a full training step: data, forward, backward, clipping, optimizer, logging.

    python benchmarks/step.py                       # CPU: a Qwen3 of 8 layers, hidden 512, vocabulary 32k, float32
    python benchmarks/step.py --preset qwen3-0.6b --batch_size 4 --tokens 1024 --device cuda --bf16 [--checkpointing]
    python benchmarks/step.py --preset qwen3-4b --batch_size 4 --tokens 1024 --device cuda --bf16 --dtype bfloat16 \
        --checkpointing --only a c              # few candidates at a time where not all of them fit

Real trainers run `train()` at the same time in one process, each in a thread of its own, and take turns at every step,
so that a change of the machine's speed meets all of them. Times are medians with quartiles, ratios are medians of the
ratios within a round. Memory is the peak that a step allocates beyond what was there before it: with gradients, and
without the parameters of the weak model, which come on top.

TRL's DistillationTrainer, the nearest peer with two models, generates the text of every step. Here it is handed random
tokens in place of that, as many as the others train on, so that only its training step is measured.
"""

import argparse
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import datasets
import torch
import torch.nn.functional as F
from datasets import Dataset
from measure import PeakMemory, failure, finish, save, synchronize
from results import Measurement
from transformers import Qwen3Config, Qwen3ForCausalLM, Trainer, TrainerCallback
from trl import DistillationConfig, DistillationTrainer, SFTConfig, SFTTrainer

from wmss_trl import WMSSConfig, WMSSTrainer
from wmss_trl.data.tiny import build_tokenizer

# hidden, intermediate, layers, heads, key-value heads, head size, vocabulary, tied embeddings
PRESETS = {
    "tiny": (256, 768, 4, 8, 4, 32, 8192, True),
    "cpu": (512, 1536, 8, 8, 4, 64, 32_768, True),
    "qwen3-0.6b": (1024, 3072, 28, 16, 8, 128, 151_936, True),
    "qwen3-1.7b": (2048, 6144, 28, 16, 8, 128, 151_936, True),
    "qwen3-4b": (2560, 9728, 36, 32, 8, 128, 151_936, True),
}


def build_qwen3(preset: str, seed: int, max_length: int, device: str | torch.device = "cpu") -> Qwen3ForCausalLM:
    """A model with the shape of `preset` and random weights, drawn on `device`: large ones take a CPU long."""
    hidden, intermediate, layers, heads, kv_heads, head_dim, vocab_size, tied = PRESETS[preset]
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        tie_word_embeddings=tied,
        max_position_embeddings=max_length,
    )
    with torch.device(device):
        return Qwen3ForCausalLM(config)


class FullLogitSFTTrainer(SFTTrainer):
    """SFT by the model's own loss, which on a CPU is faster than TRL's tiles."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = F.pad(inputs["labels"][:, 1:], (0, 1), value=-100).flatten()
        logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False).logits
        return F.cross_entropy(logits.flatten(0, 1).float(), labels, reduction="sum") / num_items_in_batch


class GivenTextDistillationTrainer(DistillationTrainer):
    """Distillation of random completions, `max_completion_length` tokens long together with their prompts."""

    def _generate_single_turn(self, prompt_ids, *_, **__):
        length, vocab_size = self.args.max_completion_length, self.model.config.vocab_size
        return [torch.randint(3, vocab_size, (length - len(ids),)).tolist() for ids in prompt_ids]


class TakeTurns(TrainerCallback):
    """Holds a trainer back before each step until its turn comes, and times the step; of the second, the memory."""

    def __init__(self, device: str):
        self.device, self.peak, self.result = device, PeakMemory(device), Measurement([])
        self.steps = 0
        self.go, self.done = threading.Semaphore(0), threading.Semaphore(0)

    def train(self, trainer: Trainer) -> None:
        try:
            trainer.train()
        except Exception as error:
            self.result.error = failure(error)
        self.done.release()

    def on_step_begin(self, args, state, control, **kwargs):
        self.done.release()
        self.go.acquire()
        self.steps += 1
        if self.steps == 2:
            self.peak.__enter__()
        synchronize(self.device)
        self.start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        synchronize(self.device)
        if self.steps == 2:
            self.peak.__exit__(None, None, None)
            self.result.peak_bytes = self.peak.bytes
        elif self.steps > 2:
            self.result.seconds.append(time.perf_counter() - self.start)


def take_turns(
    candidates: dict[str, Callable[[], Trainer]],
    rounds: int,
    device: str,
    report: Callable[[dict[str, Measurement]], Any] = lambda results: None,
) -> dict[str, Measurement]:
    """
    Run `rounds` steps of every trainer, interleaved; two rounds before them are for warming up and for the memory. A
    candidate that fails is left out of the following rounds.

    Args:
        candidates (`dict[str, Callable[[], Trainer]]`):
            Functions that build the trainers, by name. Each must run `rounds + 2` steps.
        rounds (`int`):
            Number of timed rounds.
        device (`str`):
            Where the trainers run.
        report (`Callable`, *optional*):
            Is handed the results after each round.
    """
    turns = {name: TakeTurns(device) for name in candidates}
    results = {name: turn.result for name, turn in turns.items()}
    for name, turn in turns.items():
        try:
            trainer = candidates[name]()
        except Exception as error:
            turn.result.error = failure(error)
            continue
        trainer.add_callback(turn)
        threading.Thread(target=turn.train, args=[trainer], daemon=True).start()
        turn.done.acquire()
    for _ in range(rounds + 2):
        for turn in turns.values():
            if turn.result.error is None:
                turn.go.release()
                turn.done.acquire()
        report(results)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="cpu")
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256, help="Tokens per example.")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--bf16", action="store_true", help="Autocast to bfloat16.")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="Of the weights.")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", nargs="*", help="Letters of the candidates to run.")
    parser.add_argument("--json", default=None, help="File for the raw figures.")
    args = parser.parse_args()
    datasets.disable_progress_bars()

    vocab_size = PRESETS[args.preset][-2]
    tokenizer = build_tokenizer(["a"], vocab_size=300)
    generator = torch.Generator().manual_seed(0)
    steps = args.rounds + 2
    ids = torch.randint(3, vocab_size, (steps * args.batch_size, args.tokens), generator=generator).tolist()
    dataset = Dataset.from_dict({"input_ids": ids, "labels": ids})
    prompts = Dataset.from_dict({"prompt": ["a"] * len(ids)})

    def model(seed: int) -> Qwen3ForCausalLM:
        return build_qwen3(args.preset, seed, args.tokens, args.device).to(getattr(torch, args.dtype))

    def make(cls: type[Trainer], config: type[SFTConfig], **options) -> Trainer:
        data = {"train_dataset": dataset}
        if options.get("mixing_lambda", 1.0) < 1:
            data["weak_model"] = model(1)
        if issubclass(cls, DistillationTrainer):
            data = {"train_dataset": prompts, "teacher_model": model(1)}
            options["max_completion_length"] = args.tokens
        else:
            options["max_length"] = None
        full_logits = options.pop("full_logits", False)
        arguments = config(
            output_dir=tempfile.mkdtemp(),
            max_steps=steps,
            per_device_train_batch_size=args.batch_size,
            bf16=args.bf16,
            gradient_checkpointing=args.checkpointing,
            use_cpu=args.device == "cpu",
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **options,
        )
        trainer = cls(model(0), args=arguments, processing_class=tokenizer, **data)
        if full_logits:
            trainer._full_logits = True
        trainer.log = lambda *_, **__: None
        return trainer

    wmss = {"sft_epochs": 0, "curriculum": False}
    candidates: dict[str, Callable[[], Trainer]] = {
        "(a) SFTTrainer": lambda: make(SFTTrainer, SFTConfig),
        "(a2) SFT, full logits": lambda: make(FullLogitSFTTrainer, SFTConfig),
        "(b) WMSS, lambda = 1": lambda: make(WMSSTrainer, WMSSConfig, mixing_lambda=1.0, **wmss),
        "(c) WMSS, frozen weak": lambda: make(WMSSTrainer, WMSSConfig, mixing_lambda=0.5, **wmss),
        "(d) WMSS, full logits": lambda: make(WMSSTrainer, WMSSConfig, mixing_lambda=0.5, full_logits=True, **wmss),
        "(e) TRL's DistillationTrainer": lambda: make(GivenTextDistillationTrainer, DistillationConfig),
    }
    chosen = {
        name: build for name, build in candidates.items() if not args.only or name[1 : name.index(")")] in args.only
    }
    finish(save(args, take_turns(chosen, args.rounds, args.device, report=partial(save, args))))


if __name__ == "__main__":
    main()
