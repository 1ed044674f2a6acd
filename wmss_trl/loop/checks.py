"""What cannot be combined in a run. Every error names the option, the value and the remedy."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from accelerate import Accelerator
from datasets import Dataset, IterableDataset
from torch import nn
from transformers import PreTrainedModel

from ..distributed.engines import engine_name
from ..user_warnings import warn

if TYPE_CHECKING:
    from peft import PeftModel

    from ..config import WMSSConfig


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
    Check that examples are left. `SFTTrainer` drops those that truncation leaves without a label.

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
        warn(f"Loss and scores need the full logits, which take more memory, {because}.", stacklevel=3)
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
