"""Weak models that share the base of a PEFT model."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import nn

from ..distributed.sharding import parameters_at_rest
from ..modeling.adapters import (
    active_adapter,
    adapter_parameters,
)
from ..modeling.fingerprint import fingerprint
from ..modeling.modes import evaluating

if TYPE_CHECKING:
    from peft import PeftModel

from .base import WeakModel


class DisabledAdapter(WeakModel):
    """
    The base of a PEFT model: the same weights with the adapter switched off. It costs no memory.

    Args:
        strong (`Callable[[], peft.PeftModel]`):
            Returns the strong model as it is now. Its adapter must have started as the identity. Otherwise the base is
            not the model that training started from.
    """

    on_strong_base = True

    def __init__(self, strong: Callable[[], "PeftModel"]):
        self.strong = strong
        self.head_problem = None  # it is the strong model's own head
        # The parameters are not kept: FSDP2 replaces them, and the old ones would stay in memory
        self.fingerprint = fingerprint({name: p for name, p in self.model.named_parameters() if not p.requires_grad})

    @property
    def model(self) -> "PeftModel":
        return self.strong()

    @contextmanager
    def activated(self) -> Iterator[nn.Module]:
        with evaluating(self.model), active_adapter(self.model, None):
            yield self.model


class NamedAdapter(WeakModel):
    """
    A second, frozen adapter beside the one that is trained, on the same base. It is not saved with the model.

    Args:
        strong (`Callable[[], peft.PeftModel]`):
            Returns the strong model, with the adapter, as it is now.
        name (`str`):
            Name of the adapter.
    """

    on_strong_base = True

    def __init__(self, strong: Callable[[], "PeftModel"], name: str):
        self.strong = strong
        self.name = name
        model = self.model
        self.head_problem = None
        for parameter in adapter_parameters(model, name).values():
            parameter.requires_grad_(False)
        self.fingerprint = fingerprint(self._parameters())
        save_pretrained = model.save_pretrained

        def save_strong(save_directory: str, *args: Any, selected_adapters: list[str] | None = None, **kwargs: Any):
            selected_adapters = selected_adapters or [adapter for adapter in model.peft_config if adapter != name]
            return save_pretrained(save_directory, *args, selected_adapters=selected_adapters, **kwargs)

        model.save_pretrained = save_strong

    @property
    def model(self) -> "PeftModel":
        return self.strong()

    def _parameters(self) -> dict[str, nn.Parameter]:
        strong = adapter_parameters(self.model, self.model.active_adapter)
        return {name: tensor for name, tensor in parameters_at_rest(self.model).items() if name not in strong}

    @contextmanager
    def activated(self) -> Iterator[nn.Module]:
        with evaluating(self.model), active_adapter(self.model, self.name):
            yield self.model
