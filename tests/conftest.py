import gc
import os

# Nothing here may reach a network; set before the libraries read them
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import random

import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined

from wmss_trl import WMSSConfig
from wmss_trl.data.tiny import build_model, build_tokenizer


def pytest_collection_modifyitems(items):
    gc.freeze()  # Trainers collect garbage after each run, which goes through all that was imported otherwise
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def sums(num_examples: int, seed: int = 0) -> list[dict[str, str]]:
    generator = random.Random(seed)
    examples = []
    for _ in range(num_examples):
        terms = [generator.randint(0, 99) for _ in range(generator.randint(2, 6))]
        examples.append({"prompt": " + ".join(map(str, terms)) + " =", "completion": f" {sum(terms)}"})
    return examples


def losses(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


class StopAt(TrainerCallback):
    """Stops a run as if it had been killed after a step."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


@pytest.fixture(scope="session")
def tokenizer():
    return build_tokenizer([example["prompt"] + example["completion"] for example in sums(50)], vocab_size=300)


@pytest.fixture
def dataset():
    """37 prompt-completion examples of different lengths: not a multiple of any batch size used here."""
    return Dataset.from_list(sums(37))


@pytest.fixture
def make_model(tokenizer):
    """Tiny Qwen3 in float32; dropout is on, so a test that compares runs also compares random states."""

    def make(seed: int = 0, dropout: float = 0.1, **kwargs):
        model = build_model(tokenizer, hidden_size=32, intermediate_size=64, num_layers=2, seed=seed, **kwargs)
        model.config.attention_dropout = dropout
        for module in model.modules():
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = dropout
        return model

    return make


@pytest.fixture
def make_args(tmp_path):
    """Arguments for comparing numbers: float32, every step logged, no reporters, no figures."""

    def make(cls=WMSSConfig, **kwargs):
        return cls(
            **{
                **({"plot_curriculum": False} if cls is WMSSConfig else {}),
                "output_dir": str(tmp_path / "run"),
                "bf16": False,
                "gradient_checkpointing": False,
                "use_cpu": True,
                "learning_rate": 3e-3,
                "per_device_train_batch_size": 4,
                "num_train_epochs": 3,
                "logging_steps": 1,
                "save_strategy": "no",
                "report_to": "none",
                "disable_tqdm": True,
                **kwargs,
            }
        )

    return make
