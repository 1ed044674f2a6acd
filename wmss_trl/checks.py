"""What cannot be combined in a run; every error names the option, the value and the remedy."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from accelerate import Accelerator
from accelerate.utils import is_peft_model
from datasets import Dataset, IterableDataset
from torch import nn
from transformers import PreTrainedModel

from .engines import engine_name

if TYPE_CHECKING:
    from peft import PeftModel

    from .config import WMSSConfig


def check_call(
    args: "WMSSConfig",
    model: "str | PreTrainedModel | PeftModel",
    weak_model: str | PreTrainedModel | None,
    train_dataset: Dataset | IterableDataset | None,
    compute_loss_func: Callable | None,
) -> None:
    """
    Check what can be checked before anything is loaded.

    Raises:
        ValueError: If it cannot be used.
    """
    named = args.weak_model_name_or_path if weak_model is None else weak_model
    if named is not None and not isinstance(named, (str, nn.Module)):
        raise ValueError(
            f"`weak_model={named!r}` is neither a name nor a model. Pass the folder of a checkpoint or a hub id as a "
            "string, or a loaded model."
        )
    if weak_model is not None and weak_model is model and not isinstance(weak_model, str):
        raise ValueError(
            "`weak_model` and `model` are the same object. Omit `weak_model` to mix with the model as it is handed "
            "in: the trainer keeps its own copy."
        )
    if args.train_weak and args.sft_epochs == 0 and named is None:
        raise ValueError(
            "`train_weak=True` with `sft_epochs=0` and no `weak_model` trains two models that start equal and get the "
            "same gradients up to a factor, so that one is as weak as the other. Pass an earlier `weak_model`, or set "
            "`sft_epochs` to at least 1."
        )
    if args.uses_weak_model and compute_loss_func is not None:
        raise ValueError("`compute_loss_func` cannot be combined with the mixed loss. Remove it.")
    if (file := args.score_file) is not None and "://" not in file and not Path(file).exists():
        raise ValueError(
            f"`score_file={file!r}` does not exist. Write it with `wmss-trl score`, or remove `score_file` to let the "
            "run score the data set itself."
        )
    streaming = isinstance(train_dataset, IterableDataset)
    if args.uses_weak_model and streaming and (args.curriculum or args.sft_epochs):
        raise ValueError(
            f"A streaming `train_dataset` cannot be scored and has no epochs, but `curriculum={args.curriculum}` and "
            f"`sft_epochs={args.sft_epochs}`. Load the data set without `streaming=True`, or set `curriculum=False` "
            "and `sft_epochs=0`."
        )
    if args.train_weak and args.sft_epochs and args.ddp_find_unused_parameters is False:
        raise ValueError(
            "`ddp_find_unused_parameters=False` cannot be combined with `train_weak=True` and "
            f"`sft_epochs={args.sft_epochs}`, since phase 1 does not use the weak model. Remove it, or set "
            "`sft_epochs=0`."
        )


def check_examples(
    args: "WMSSConfig", given: Dataset | IterableDataset | None, prepared: Dataset | IterableDataset | None
) -> None:
    """
    Check that `SFTTrainer`, which drops the examples that truncation leaves without a label, has left some.

    Args:
        args ([`WMSSConfig`]):
            Arguments of the run.
        given, prepared (`datasets.Dataset` or `datasets.IterableDataset`, *optional*):
            The examples before and after.

    Raises:
        ValueError: If none is left.
    """
    if isinstance(given, Dataset) and isinstance(prepared, Dataset) and len(given) and not len(prepared):
        raise ValueError(
            f"`max_length={args.max_length}` leaves none of the {len(given)} examples of `train_dataset` a supervised "
            "token: their prompts alone are that long. Raise `max_length`, or set `truncation_mode='keep_end'`."
        )


def check_model(model: "PreTrainedModel | PeftModel", has_images: bool) -> None:
    """
    Check that a model and its data can be trained with a weak model.

    Raises:
        ValueError: If they cannot.
    """
    if has_images:
        raise ValueError("WMSSTrainer supports text data sets only, but `train_dataset` has images.")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        warnings.warn(
            "No parameter of `model` requires a gradient, so nothing will be trained. Load an adapter with "
            "`PeftModel.from_pretrained(..., is_trainable=True)`, or call `requires_grad_(True)` on what is to be "
            "trained.",
            stacklevel=3,
        )
    if is_peft_model(model) and model.active_peft_config.is_prompt_learning:
        raise ValueError(
            f"`peft_config` of type {model.active_peft_config.peft_type.value} adds virtual tokens, which the weak "
            "model does not have. Use a method that keeps the sequence, such as LoRA."
        )


def check_whole(model: nn.Module, name: str, init_kwargs: str) -> None:
    """
    Check that a model was not split when it was loaded, which is left to the engine of the run.

    Args:
        model (`torch.nn.Module`):
            The strong or the weak model.
        name (`str`):
            What it is called.
        init_kwargs (`str`):
            Option with the keyword arguments that it was loaded with, if it was loaded by name.

    Raises:
        ValueError: If it was.
    """
    # As the Trainer of transformers 5.23 counts them: layers that are kept in CPU memory run on the device of the rest
    devices = {str(device) for device in (getattr(model, "hf_device_map", None) or {}).values()} - {"cpu", "disk"}
    if len(devices) > 1:
        raise ValueError(
            f"`{name}` is split over the devices {', '.join(sorted(devices))} by a `device_map`, where its hidden "
            "states and those of the other model do not meet. This is how TRL loads a model in one process that sees "
            "several GPUs. Launch a process for each GPU (`accelerate launch`; FSDP2 and ZeRO-3 split a model that "
            "one GPU cannot hold) or set `CUDA_VISIBLE_DEVICES=0`, and load it without a `device_map` (None in "
            f"`{init_kwargs}`)."
        )
    if getattr(model, "_device_mesh", None) is not None:
        raise ValueError(
            f"`{name}` was split over the processes when transformers loaded it (`distributed_config`, `tp_plan` or "
            "`tp_size`), but the loss and the scores take it for a whole model and would be wrong. Remove that from "
            f"`{init_kwargs}` and launch with FSDP2 or ZeRO-3 (`recipes/accelerate/fsdp2.yaml`)."
        )


def check_lm_heads(
    args: "WMSSConfig",
    problems: dict[str, str | None],
    train_dataset: Dataset | IterableDataset | None,
    accelerator: Accelerator,
) -> None:
    """
    Warn of LM heads that cannot be fused into the loss, and check that the run can do without.

    Args:
        args ([`WMSSConfig`]):
            Arguments of the run.
        problems (`dict[str, str | None]`):
            What is the matter with the LM head of each model, by what the model is called.
        train_dataset (`datasets.Dataset` or `datasets.IterableDataset`):
            What it trains on.
        accelerator (`accelerate.Accelerator`):
            Accelerator of the run.

    Raises:
        ValueError: If it cannot.
    """
    because = "; ".join(f"because of the {name}: {problem}" for name, problem in problems.items() if problem)
    if because:
        warnings.warn(f"Loss and scores need the full logits, which take more memory, {because}.", stacklevel=3)
    streaming = isinstance(train_dataset, IterableDataset)
    if args.lambda_schedule == "crossover" and (because or streaming):
        problem = "`train_dataset` is streaming" if streaming else "a model's logits are not those of its LM head"
        raise ValueError(
            "`lambda_schedule='crossover'` measures the logits of both LM heads on a sample of the data set, but "
            f"{problem}. Use another schedule."
        )
    if args.weak_cache is not None and because:
        raise ValueError("`weak_cache='hidden'` needs LM heads that can be reached. Remove it.")
    engine = engine_name(accelerator)
    if args.train_weak and because and engine in ("fsdp2", "zero3"):
        raise ValueError(
            f"`train_weak=True` under {engine} needs LM heads that can be reached ({because}). Set "
            "`train_weak=False`, or launch with DDP or ZeRO-2."
        )


def check_replicated(accelerator: Accelerator, what: str, remedy: str) -> None:
    """
    Check that every process holds the whole model.

    Raises:
        ValueError: If the run was launched with an engine that splits it.
    """
    if (engine := engine_name(accelerator)) != "replicated":
        raise ValueError(f"{what} the whole model on each process, but was launched with {engine}. {remedy}")
