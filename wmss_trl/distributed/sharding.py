"""Parameters that FSDP2 or ZeRO-3 split over the processes: the full tensor, and the part of this process."""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

OptionalTensor = TypeVar("OptionalTensor", bound=Tensor | None)


def in_zero3(parameter: Tensor | None) -> bool:
    """Whether ZeRO-3 manages a parameter. Such a parameter is empty while it is not gathered."""
    return hasattr(parameter, "ds_id")


def reshard(model: nn.Module) -> None:
    """Let FSDP2 release the weights that a forward has gathered, such as the LM head. After a forward without a
    backward pass they would stay."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def plain_names(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Parameters or buffers by the names that they had before `torch.compile` and FSDP2's activation checkpointing."""
    return {name.replace("_orig_mod.", "").replace("_checkpoint_wrapped_module.", ""): t for name, t in tensors}


def named_state(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of a model by their names; several names may share a tensor."""
    return plain_names(
        chain(model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
    )


def parameters_at_rest(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters of a model by their names, in the form that the engine keeps between forwards."""
    reshard(model)
    return plain_names(model.named_parameters())


def is_sharded(model: nn.Module) -> bool:
    """Whether a model's parameters are split over the processes."""
    return any(in_zero3(parameter) or isinstance(parameter, DTensor) for parameter in model.parameters())


def whole_shape(parameter: Tensor) -> torch.Size:
    """Shape of a parameter, whether or not it is split."""
    return parameter.ds_shape if in_zero3(parameter) else parameter.shape


@contextmanager
def gathered(parameters: Iterable[Tensor | None]) -> Iterator[None]:
    """
    Gather the parameters that ZeRO-3 manages while the context lasts. All processes must enter it together. Other
    parameters are left alone, see [`full_tensor`].
    """
    managed = [parameter for parameter in parameters if in_zero3(parameter)]
    if not managed:
        yield
        return
    import deepspeed
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    # A module in the middle of its forward may have gathered some of them. These must not be released here
    absent = [parameter for parameter in managed if parameter.ds_status != ZeroParamStatus.AVAILABLE]
    with deepspeed.zero.GatheredParameters(absent, enabled=bool(absent)):
        yield


@contextmanager
def runnable(model: nn.Module) -> Iterator[None]:
    """Let a model run that ZeRO-3 has split at loading and that is not yet prepared. Each module gathers its own
    parameters for its forward."""
    if not any(in_zero3(parameter) for parameter in model.parameters()):
        yield
        return
    contexts: dict[nn.Module, AbstractContextManager[None]] = {}

    def gather(module: nn.Module, inputs: Any) -> None:
        contexts[module] = gathered(list(module.parameters(recurse=False)))
        contexts[module].__enter__()

    def release(module: nn.Module, inputs: Any, output: Any) -> None:
        contexts.pop(module).__exit__(None, None, None)

    handles = []
    for module in model.modules():
        handles += [module.register_forward_pre_hook(gather), module.register_forward_hook(release, always_call=True)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def full_tensor(tensor: OptionalTensor) -> OptionalTensor:
    """
    Gather a tensor that FSDP2 may have split, on the device where it computes. All processes must call it together.
    """
    if not isinstance(tensor, DTensor):
        return tensor
    return tensor.to(tensor.device_mesh.device_type).full_tensor()


def local_part(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor, sharing its memory."""
    if isinstance(tensor, DTensor):
        return tensor.to_local()
    return tensor.ds_tensor if in_zero3(tensor) else tensor


@torch.no_grad()
def set_local_part_(tensor: Tensor, part: Tensor) -> None:
    """Replace what this process holds of a tensor. All processes must call it together."""
    if in_zero3(tensor) and tensor.ds_status.name == "AVAILABLE":
        tensor.partition()  # small parameters stay gathered, which would hide the new part
    local_part(tensor).copy_(part)
