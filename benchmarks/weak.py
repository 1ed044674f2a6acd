"""
Time and memory of a training step with each kind of weak model, beside SFT with the same set-up.

    python benchmarks/weak.py                      # CPU: a Qwen3 of 8 layers, hidden 512, vocabulary 32k, float32
    python benchmarks/weak.py --lora [--checkpointing]
    python benchmarks/weak.py --preset qwen3-0.6b --batch_size 4 --tokens 1024 --device cuda --bf16 [--lora]

Real trainers run `train()` at the same time in one process and take turns at every step, see benchmarks/step.py.
Memory is the peak that a step allocates beyond what was there before it; "resident" (CUDA only) is what a trainer
holds before its first step.
"""

import argparse
import tempfile
from functools import partial

import datasets
import torch
from datasets import Dataset
from measure import earlier_adapter, finish, save
from peft import LoraConfig
from step import PRESETS, FullLogitSFTTrainer, build_qwen3, take_turns
from transformers import Qwen3ForCausalLM, Trainer
from trl import SFTConfig, SFTTrainer

from wmss_trl import WMSSConfig, WMSSTrainer
from wmss_trl.data.tiny import build_tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="cpu")
    parser.add_argument("--lora", action="store_true", help="LoRA of rank 16 on all linear layers of the backbone.")
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256, help="Tokens per example.")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", default=None, help="File for the raw figures.")
    args = parser.parse_args()
    datasets.disable_progress_bars()

    vocab_size = PRESETS[args.preset][-2]
    tokenizer = build_tokenizer(["a"], vocab_size=300)
    generator = torch.Generator().manual_seed(0)
    steps = args.rounds + 2
    ids = torch.randint(3, vocab_size, (steps * args.batch_size, args.tokens), generator=generator).tolist()
    dataset = Dataset.from_dict({"input_ids": ids, "labels": ids})
    resident: dict[str, float] = {}

    def model(seed: int) -> Qwen3ForCausalLM:
        return build_qwen3(args.preset, seed, args.tokens, args.device)

    def make(name: str, cls: type[Trainer], weak_model: bool = False, **options) -> Trainer:
        is_wmss = issubclass(cls, WMSSTrainer)
        config = WMSSConfig if is_wmss else SFTConfig
        arguments = config(
            output_dir=tempfile.mkdtemp(),
            max_steps=steps,
            per_device_train_batch_size=args.batch_size,
            max_length=None,
            bf16=args.bf16,
            use_cpu=args.device == "cpu",
            gradient_checkpointing=args.checkpointing,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **({"sft_epochs": 0, "active_fraction": 1.0, "plot_curriculum": False} if is_wmss else {}),
            **options,
        )
        peft_config = LoraConfig(r=16, target_modules="all-linear") if args.lora else None
        weak = {"weak_model": model(1)} if weak_model else {}
        if args.lora and options.get("train_weak"):
            adapter = LoraConfig(r=16, target_modules="all-linear")
            weak = {"weak_model": earlier_adapter(model(0), adapter)}
        before = torch.cuda.memory_allocated() if args.device.startswith("cuda") else 0
        trainer = cls(
            model(0),
            arguments,
            train_dataset=dataset,
            processing_class=tokenizer,
            peft_config=peft_config,
            **weak,
        )
        if args.device.startswith("cuda"):
            resident[name] = (torch.cuda.memory_allocated() - before) / 2**20
        trainer.log = lambda *_, **__: None
        return trainer

    frozen = "weak = base" if args.lora else "frozen weak"
    candidates = {
        "(a) SFTTrainer": (SFTTrainer, {}),
        "(a2) SFT, full logits": (FullLogitSFTTrainer, {}),
        f"(c) WMSS, {frozen}": (WMSSTrainer, {"weak_model": not args.lora}),
        "(c) WMSS, cached hidden states": (WMSSTrainer, {"weak_model": not args.lora, "weak_cache": "hidden"}),
        "(c) WMSS, joint": (WMSSTrainer, {"train_weak": True, "weak_model": not args.lora}),
    }
    builders = {name: partial(make, name, cls, **options) for name, (cls, options) in candidates.items()}
    write = partial(save, args, resident_mb=resident)
    finish(write(take_turns(builders, args.rounds, args.device, report=write)))
    if resident:
        print(f"\nResident before training, MB: {resident}")


if __name__ == "__main__":
    main()
