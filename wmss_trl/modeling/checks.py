"""What a model must be, to be trained or mixed with."""

from typing import TYPE_CHECKING

from accelerate.utils import is_peft_model
from torch import nn
from transformers import PreTrainedModel

from ..user_warnings import warn

if TYPE_CHECKING:
    from peft import PeftModel


def check_model(model: "PreTrainedModel | PeftModel", has_images: bool) -> None:
    """
    Check that a model and its data can be trained with a weak model.

    Raises:
        ValueError: If they cannot.
    """
    if has_images:
        raise ValueError("WMSSTrainer supports text data sets only, but `train_dataset` has images.")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        warn(
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
    # As the Trainer of transformers 5.23 counts them. Layers kept in CPU memory run on the device of the other layers
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
