"""A model's last hidden states and LM head, reached from inside its forward. There every wrapper lets us use them."""

import functools
import inspect
import math
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypedDict

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from transformers import PreTrainedConfig

from ..distributed.sharding import full_tensor, gathered, runnable, whole_shape
from ..losses.tiles import matmul_dtype, project, transform_logits_
from .modes import evaluating


@dataclass
class LMHead:
    """
    How a model turns hidden states into logits: `softcap * tanh(scale * (h W^T + bias) / softcap)`.

    Args:
        weight (`torch.Tensor` of shape `(V, H)`):
            Weight of the projection.
        bias (`torch.Tensor` of shape `(V,)`, *optional*):
            Its bias.
        scale (`float`):
            What the logits are multiplied by.
        softcap (`float`, *optional*):
            Soft cap of the logits.
    """

    weight: Tensor
    bias: Tensor | None
    scale: float
    softcap: float | None

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits of hidden states of shape `(N, H)`: `(N, V)`, in float32."""
        out = torch.empty(len(hidden), len(self.weight), dtype=torch.float32, device=hidden.device)
        return transform_logits_(project(out, hidden, self.weight, self.bias), self.scale, self.softcap)

    def detach(self) -> "LMHead":
        """The same head, through which no gradient passes."""
        return replace(self, weight=self.weight.detach(), bias=None if self.bias is None else self.bias.detach())


class HeadOutput(TypedDict):
    """
    What a forward with `positions` returns. It is a plain dict: DDP, FSDP2 and DeepSpeed all find the tensors in it.

    Args:
        value (`Any`):
            The hidden states of shape `(len(positions), H)`. With a function `with_lm_head`, what that returned.
        aux_loss (`torch.Tensor` of shape `()` or `None`):
            Load-balancing loss of a mixture of experts, if its router logits were asked for.
    """

    value: Any
    aux_loss: Tensor | None


def logit_transform(config: PreTrainedConfig) -> tuple[float, float | None]:
    """Scale and soft cap that the architectures of transformers apply to their logits (checked with 5.23)."""
    config = config.get_text_config()
    scale = next(
        (
            value
            for option in ("logit_scale", "output_multiplier", "lm_head_multiplier")
            if (value := getattr(config, option, None)) is not None
        ),
        None,
    )
    if scale is None and (divisor := getattr(config, "logits_scaling", None)) is not None:
        scale = divisor if config.model_type == "hyperclovax" else 1 / divisor
    return 1.0 if scale is None else scale, getattr(config, "final_logit_softcapping", None)


def lm_head_of(model: nn.Module) -> LMHead:
    """The LM head of a causal language model that is not wrapped in an adapter, as this process holds it."""
    lm_head = model.get_output_embeddings()
    # A frozen head is not read through DeepSpeed's attribute access. Inside the forward of another module, that access
    # makes ZeRO-3 gather the parameter in this and every later forward and backward pass. Only a gradient needs that.
    own = dict(lm_head.named_parameters(recurse=False))
    if "weight" in own and not any(parameter.requires_grad for parameter in own.values()):
        return LMHead(own["weight"], own.get("bias"), *logit_transform(model.config))
    return LMHead(lm_head.weight, lm_head.bias, *logit_transform(model.config))


@contextmanager
def whole_lm_head(head: LMHead) -> Iterator[LMHead]:
    """Gather an LM head that may be split over the processes, while the context lasts. No module may run meanwhile:
    under ZeRO-3 an embedding that shares the weight would release it."""
    with gathered([head.weight, head.bias]):
        yield replace(head, weight=full_tensor(head.weight), bias=full_tensor(head.bias))


def add_head_access(model: nn.Module) -> str | None:
    """
    Let `model(..., positions=indices, with_lm_head=function)` return `function(hidden_states, lm_head)`, and
    `model(..., positions=indices)` the hidden states alone.

    The function is called inside the forward, so it can use the head under any wrapper of the model, within
    [`whole_lm_head`]. `model.has_head_access` tells whether this can be relied on. Without `positions` the forward is
    the original one. `model(..., beside=function)` first calls `function()`, also inside the forward, and returns a
    `dict` with `"outputs"` and `"beside"`.

    Args:
        model (`torch.nn.Module`):
            Causal language model with a `base_model` and output embeddings. Patch it before it is wrapped.

    Returns:
        `str` or `None`: why the model's logits cannot be computed from its last hidden states and LM head, if so.
    """
    original_forward = model.forward

    @functools.wraps(type(model).forward)  # `generate` reads the signature
    def forward(
        self: nn.Module,
        *args: Any,
        positions: Tensor | None = None,
        with_lm_head: Callable[[Tensor, LMHead], Any] | None = None,
        beside: Callable[[], Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        if beside is not None:
            result = beside()
            return {"outputs": original_forward(*args, **kwargs), "beside": result}
        if positions is None:
            return original_forward(*args, **kwargs)
        # Looked up in each call: PEFT and FSDP replace them after patching
        outputs = self.base_model(*args, **kwargs | {"use_cache": False})
        value = outputs.last_hidden_state.flatten(0, 1)[positions]
        if with_lm_head is not None:
            value = with_lm_head(value, lm_head_of(self))
        if not kwargs.get("output_router_logits"):
            return HeadOutput(value=value, aux_loss=None)
        aux_loss = router_loss(self, outputs.router_logits, kwargs.get("attention_mask"))
        return HeadOutput(value=value, aux_loss=aux_loss)

    model.forward = types.MethodType(forward, model)
    model.forward_without_head_access = original_forward
    problem = [_head_problem(model)]
    if torch.distributed.is_initialized():  # FSDP may load the weights on the main process only
        broadcast_object_list(problem)
    (problem,) = problem
    model.has_head_access = problem is None
    return problem


def remove_head_access(model: nn.Module) -> None:
    """Give a model its own forward back, if [`add_head_access`] has patched it in another run. What that run has put
    around the forward, such as autocast, goes too. The next run prepares the model anew."""
    forward = vars(model).pop("forward_without_head_access", None)
    if forward is not None:
        model.forward = forward
        # Private to accelerate, checked with 1.15: a model with this mark is not prepared again
        vars(model).pop("_is_accelerate_prepared", None)


def router_loss(model: nn.Module, router_logits: tuple[Tensor, ...], attention_mask: Tensor | None) -> Tensor:
    """
    Load-balancing loss of a mixture of experts, as the forward of its class computes it.

    Checked with transformers 5.23. Most families have a copy of Mixtral's function. They keep the number of experts in
    the model or in its config.

    Args:
        model (`torch.nn.Module`):
            Causal language model that is not wrapped in an adapter.
        router_logits (`tuple[torch.Tensor, ...]`):
            What its backbone returned for `output_router_logits=True`.
        attention_mask (`torch.Tensor` of shape `(B, L)`, *optional*):
            Which tokens count.

    Returns:
        `torch.Tensor` of shape `()`.
    """
    modules = (sys.modules[cls.__module__] for cls in type(model).__mro__)  # FSDP2 and users make subclasses
    function = next(
        module.load_balancing_loss_func for module in modules if hasattr(module, "load_balancing_loss_func")
    )
    config = model.config.get_text_config()
    num_experts, top_k = (
        getattr(model, name) if hasattr(model, name) else getattr(config, name)
        for name in ("num_experts", "num_experts_per_tok")
    )
    if "num_keys" in inspect.signature(function).parameters:  # Doge, whose experts lie on a square of keys
        return function(router_logits, num_experts, math.isqrt(num_experts), top_k, attention_mask)
    return function(router_logits, num_experts, top_k, attention_mask)


def _head_problem(model: nn.Module) -> str | None:
    """Try the head on a few tokens. This detects an architecture whose logits [`logit_transform`] does not know."""
    if getattr(model, "base_model", model) is model:
        return "it has no base model that returns hidden states"
    lm_head = model.get_output_embeddings()
    weight = getattr(lm_head, "weight", None)
    if weight is None or len(whole_shape(weight)) != 2 or not hasattr(lm_head, "bias"):
        return f"its output embeddings ({type(lm_head).__name__}) are not a linear layer"
    device = weight.device
    inputs = {"input_ids": torch.arange(8, device=device).view(1, -1)}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    dtypes = set()

    def logits(hidden: Tensor, head: LMHead) -> Tensor:
        with whole_lm_head(head) as head:
            hidden = hidden.to(head.weight.device)
            dtypes.add(matmul_dtype(hidden))
            return head.logits(hidden)

    with evaluating(model), runnable(model):
        expected = model(**inputs, use_cache=False).logits[0].float()
        ours = model(**inputs, positions=torch.arange(8, device=device), with_lm_head=logits)["value"]
    largest, error = expected.abs().max(), (ours - expected).abs().max()
    tolerance = 1e-3 if dtypes == {torch.float32} else 2e-2  # half precision rounds the two at different places
    if error > tolerance * largest + 1e-6:
        return f"its logits are not those of its LM head (up to {largest:.2g}, they differ by up to {error:.2g})"
    return None
