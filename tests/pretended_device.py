"""
A second device made of the CPU: it fails where tensors of two devices meet, as a GPU does, and records what would make
a GPU wait for the CPU.

    python tests/pretended_device.py RESULT_JSON        # trains every run of RUNS on the CPU and on this device

Checked against PyTorch 2.13, whose hooks for devices written in Python are experimental.
"""

import json
import os
import sys
import tempfile
import traceback
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import torch
from accelerate.state import AcceleratorState, PartialState
from conftest import sums
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map_only
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

import wmss_trl.modeling.lm_head
from wmss_trl import WMSSConfig, WMSSTrainer
from wmss_trl.data.tiny import build_model, build_tokenizer

aten = torch.ops.aten
COPIES = {aten._to_copy.default, aten.copy_.default}
# A GPU takes indices from the CPU too
MAY_MIX = COPIES | {aten.index.Tensor, aten.index_put_.default}
WAITS = {aten._local_scalar_dense.default, aten.nonzero.default, aten.equal.default, aten.masked_select.default}
PACKAGES = ("wmss_trl", "trl", "transformers", "accelerate", "peft")

# Where a GPU would wait: the functions of `PACKAGES` that were running, outermost first
waits: list[list[str]] = []


class PretendedTensor(torch.Tensor):
    """Says that it is on the pretended device; its numbers are in `inner`, in CPU memory."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor):
        return torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=torch.device("pretended", 0),
        )

    def __init__(self, inner: torch.Tensor):
        self.inner = inner

    def tolist(self) -> list:
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return compute(func, args, kwargs or {})


class Pretend(TorchDispatchMode):
    """Makes new tensors where they are asked for."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return compute(func, args, kwargs or {})


class Backend(_DummyBackendModule):
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


def package_of(file: str) -> str | None:
    """The package of `PACKAGES` that a file belongs to."""
    return next((folder for folder in reversed(Path(file).parts) if folder in PACKAGES), None)


def compute(func, args: tuple, kwargs: dict[str, Any]):
    tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
    pretended = [x for x in tensors if isinstance(x, PretendedTensor)]
    if pretended and func not in MAY_MIX:
        for x in tensors:
            if x.dim() > 0 and not isinstance(x, PretendedTensor):
                raise RuntimeError(f"{func}: a CPU tensor of shape {tuple(x.shape)} meets one on the pretended device")

    device = kwargs.get("device")
    to_pretended = bool(pretended) if device is None else torch.device(device).type == "pretended"
    if func is aten.copy_.default:
        to_pretended = isinstance(args[0], PretendedTensor)
    if pretended and (func in WAITS or (func in COPIES and not to_pretended)):
        stack = [(package_of(frame.filename), frame.name) for frame in traceback.extract_stack()]
        waits.append([f"{package}: {function}" for package, function in stack if package])

    inner_args, inner_kwargs = tree_map_only(PretendedTensor, lambda x: x.inner, (args, kwargs))
    if device is not None:
        inner_kwargs["device"] = torch.device("cpu")
    result = func(*inner_args, **inner_kwargs)
    if not to_pretended:
        return result
    result = tree_map_only(torch.Tensor, PretendedTensor, result)
    return return_and_correct_aliasing(func, args, kwargs, result) if pretended else result


RUNS: dict[str, dict[str, Any]] = {
    "frozen, anchored, evaluated": {"anchor_weight": 0.3, "eval_strategy": "epoch"},
    "other architecture, crossover": {
        "weak_width": 48,
        "lambda_schedule": "crossover",
        "gradient_accumulation_steps": 2,
        "train_sampling_strategy": "group_by_length",
    },
    "full logits": {"full_logits": True},
    "LoRA": {"lora": True},
    "LoRA, joint, checkpointing": {"lora": True, "train_weak": True, "gradient_checkpointing": True},
    "joint": {"train_weak": True},
    "rounds": {"weak_refresh": "epoch", "weak_refresh_device": "same", "num_train_epochs": 3},
    "cached": {"weak_cache": "hidden"},
    "packed": {"packing": True, "max_length": 64},
    "ranked": {"ranked": True, "sft_epochs": 0, "num_train_epochs": 1},
}


def train(
    device: str, lora: bool = False, weak_width: int = 0, full_logits: bool = False, ranked: bool = False, **options
) -> dict[str, Any]:
    """Train, and return the logged losses and what a GPU would have waited for in each training step."""
    for state in (PartialState, AcceleratorState):
        state._shared_state.clear()
    torch.manual_seed(0)
    tokenizer = build_tokenizer([example["prompt"] + example["completion"] for example in sums(20)], vocab_size=300)

    def model(width: int = 32, seed: int = 0):
        return build_model(tokenizer, hidden_size=width, intermediate_size=64, num_layers=2, seed=seed)

    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        if full_logits:
            stack.enter_context(
                mock.patch.object(wmss_trl.modeling.lm_head, "_head_problem", return_value="of the test")
            )
        weak_model = model(weak_width) if weak_width else None
        if ranked:
            for seed in range(2):
                model(seed=seed).save_pretrained(f"{folder}/models/checkpoint-{seed + 1}")
                tokenizer.save_pretrained(f"{folder}/models/checkpoint-{seed + 1}")
            weak_model = f"auto:{folder}/models"
        args = WMSSConfig(
            **{
                "output_dir": f"{folder}/run",
                "use_cpu": True,
                "bf16": False,
                "gradient_checkpointing": False,
                "learning_rate": 1e-3,
                "num_train_epochs": 2,
                "per_device_train_batch_size": 4,
                "logging_steps": 1,
                "save_strategy": "no",
                "report_to": "none",
                "disable_tqdm": True,
                "optim": "adamw_torch",
            }
            | options
        )
        assert args.device.type == "cpu"
        args.__dict__["_setup_devices"] = PartialState._shared_state["device"] = torch.device(device)
        trainer = WMSSTrainer(
            model(),
            args,
            train_dataset=Dataset.from_list(sums(20)),
            eval_dataset=Dataset.from_list(sums(8, seed=1)),
            processing_class=tokenizer,
            peft_config=LoraConfig(r=4, target_modules=["q_proj", "down_proj"]) if lora else None,
            weak_model=weak_model,
        )
        waits.clear()
        trainer.train()
    assert {parameter.device.type for parameter in trainer.model.parameters()} == {device.split(":")[0]}
    in_steps = [wait for wait in waits if "transformers: training_step" in wait]
    log = trainer.state.log_history
    return {
        "losses": [entry[key] for entry in log for key in ("loss", "eval_loss") if key in entry],
        "sft_steps": sum("loss" in entry and "amplification" not in entry for entry in log),
        "weak_driven_steps": sum("amplification" in entry for entry in log) * args.gradient_accumulation_steps,
        "waits": [wait[-1] for wait in in_steps],
    }


def main(path: str) -> None:
    disable_progress_bars()
    # Before the first backward pass, which starts a thread per device
    _setup_privateuseone_for_python_backend("pretended", backend_module=Backend())
    torch._C._set_only_lift_cpu_tensors(True)  # `torch.tensor(..., device=...)` goes through the mode
    torch.__future__.set_swap_module_params_on_conversion(True)  # tied weights stay tied
    results = {}
    for name, options in RUNS.items():
        results[name] = {"cpu": train("cpu", **options)}
        try:
            with Pretend():
                results[name]["pretended"] = train("pretended:0", **options)
        except RuntimeError:
            results[name]["error"] = traceback.format_exc()
    try:
        with Pretend():
            torch.ones(2, device="pretended") + torch.ones(2)
    except RuntimeError as error:
        results["tensors of two devices"] = {"error": str(error)}
    with open(path, "w") as file:
        json.dump(results, file)


if __name__ == "__main__":
    main(sys.argv[1])
