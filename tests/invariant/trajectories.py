"""
The first 20 steps of six small runs, committed: what a change that is to change nothing must leave as it is.

    python tests/invariant/trajectories.py    # writes them anew, for a commit of its own that says why
"""

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import TrainerCallback

sys.path.insert(0, str(Path(__file__).parents[1]))
from conftest import sums

from wmss_trl import WMSSConfig, WMSSTrainer
from wmss_trl.data.tiny import build_model, build_tokenizer

FILE = Path(__file__).with_suffix(".json")
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "frozen": {"num_train_epochs": 3},
    "lora, weak = base, cached": {"lora": True, "weak_cache": "hidden", "learning_rate": 1e-2, "num_train_epochs": 3},
    "joint, anchored": {"train_weak": True, "anchor_weight": 0.3, "mixing_lambda": 0.4, "num_train_epochs": 3},
    "rounds, v2, replacement": {
        "weak_refresh": "epoch",
        "curriculum_variant": "v2",
        "curriculum_replacement": True,
        "train_sampling_strategy": "group_by_length",
        "gradient_accumulation_steps": 2,
        "num_train_epochs": 5,
    },
    "packed, other model, crossover": {
        "weak_width": 48,
        "packing": True,
        "max_length": 40,
        "per_device_train_batch_size": 1,
        "lambda_schedule": "crossover",
        "num_train_epochs": 3,
    },
    "joint lora, cosine, dft": {
        "lora": True,
        "train_weak": True,
        "lambda_schedule": "cosine",
        "final_mixing_lambda": 0.9,
        "loss_type": "dft",
        "learning_rate": 1e-2,
        "num_train_epochs": 3,
    },
}


class Draws(TrainerCallback):
    """The active set of each step."""

    def __init__(self):
        self.drawn: list[list[int] | None] = []

    def on_step_end(self, args, state, control, **kwargs):
        indices = self.trainer.curriculum_sampler.indices
        self.drawn.append(None if indices is None else indices.tolist())


def trajectory(folder: str, lora: bool = False, weak_width: int = 0, **options: Any) -> dict[str, list]:
    """Loss and gradient norm of each of the first 20 steps, and the active sets in the order of their epochs."""
    torch.manual_seed(0)
    examples = sums(37)
    tokenizer = build_tokenizer([row["prompt"] + row["completion"] for row in sums(50)], vocab_size=300)
    sizes = {"intermediate_size": 64, "num_layers": 2}
    args = WMSSConfig(
        **{
            "output_dir": folder,
            "bf16": False,
            "gradient_checkpointing": False,
            "use_cpu": True,
            "learning_rate": 3e-3,
            "per_device_train_batch_size": 4,
            "logging_steps": 1,
            "max_steps": 20,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "plot_curriculum": False,
        }
        | options
    )
    draws = Draws()
    trainer = WMSSTrainer(
        build_model(tokenizer, hidden_size=32, seed=0, **sizes),
        args,
        train_dataset=Dataset.from_list(examples),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "down_proj"]) if lora else None,
        callbacks=[draws],
        weak_model=build_model(tokenizer, hidden_size=weak_width, seed=1, **sizes) if weak_width else None,
    )
    draws.trainer = trainer
    trainer.train()
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    sets = [
        drawn for i, drawn in enumerate(draws.drawn) if drawn is not None and drawn != (draws.drawn[:i] or [0])[-1]
    ]
    return {
        "loss": [entry["loss"] for entry in steps],
        "grad_norm": [entry["grad_norm"] for entry in steps],
        "active_sets": sets,
    }


def main() -> None:
    torch.set_num_threads(1)
    trajectories = {}
    for name, options in CONFIGURATIONS.items():
        with tempfile.TemporaryDirectory() as folder:
            trajectories[name] = trajectory(folder, **options)
    FILE.write_text(json.dumps(trajectories, indent=None).replace('"}, "', '"},\n"').replace("}, ", "},\n") + "\n")


if __name__ == "__main__":
    main()
