"""Weak models that are not trained: one of its own, and the strong model before its first step."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedModel

from ..distributed.engines import prepare_frozen
from ..distributed.sharding import is_sharded
from ..modeling.fingerprint import fingerprint
from .base import WeakModel


class FrozenModel(WeakModel):
    """
    A weak model of its own, frozen.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The weak model. It is put into eval mode, its parameters stop requiring gradients, and it is prepared for
            the engine of the run.
        accelerator ([`~accelerate.Accelerator`]):
            Accelerator of the run.
        head_problem (`str`, *optional*):
            Why its logits cannot be computed from its LM head, see [`~wmss_trl.modeling.lm_head.add_head_access`].
        owned (`bool`, *optional*, defaults to `False`):
            Whether nobody else uses the model, so that its memory can be given back.
    """

    def __init__(
        self, model: PreTrainedModel, accelerator: Accelerator, head_problem: str | None = None, owned: bool = False
    ):
        # Taken before the model is prepared, so that it is the same under every engine
        self.fingerprint = fingerprint(dict(model.named_parameters()))
        self.model = prepare_frozen(model.requires_grad_(False).eval(), accelerator)
        self.owned = owned
        self.head_problem = head_problem

    @contextmanager
    def activated(self) -> Iterator[nn.Module]:
        """The model to call for weak logits, in eval mode and without gradients while the context lasts."""
        with torch.no_grad():
            yield self.model

    def keep_only_lm_head(self) -> None:
        if self.owned and not is_sharded(self.model):
            head = self.lm_head()
            # Detached tensors: PyTorch may swap the content of the model's parameters
            bias = None if head.bias is None else head.bias.detach()
            head = replace(head, weight=head.weight.detach(), bias=bias)
            self.lm_head = lambda: head
            if getattr(self.model, "is_quantized", False):  # its weights cannot be moved to the meta device
                self.model._modules.clear()
            else:
                self.model.to("meta")


class InitialModel(WeakModel):
    """
    The model as it was handed in (M0), for runs that need only its entropies. The strong model has the same entropies
    before its first step, so no second model is kept.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The strong model, before it is trained.
    """

    def __init__(self, model: nn.Module):
        self.head_problem = None
        self.fingerprint = fingerprint(dict(model.named_parameters()))

    @contextmanager
    def activated(self) -> Iterator[nn.Module]:
        raise ValueError(
            "The entropies of the weak model, which is the model as it was handed in, must be computed before it "
            "changes, but it has changed since the trainer was made. Pass a `weak_model`."
        )
        yield
