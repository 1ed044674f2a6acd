"""PEFT adapters beside each other on one base: the strong one and the weak one."""

import copy
import functools
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn
from transformers.utils.peft_utils import find_adapter_config_file

from ..distributed.sharding import named_state, plain_names

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel

# Name of the weak adapter beside the strong one
WEAK_ADAPTER = "wmss_weak"


def effect_on_base(config: "PeftConfig") -> Literal["none", "moved", "replaced", "trained"]:
    """
    What PEFT 0.21 does to the weights of a model when it puts an adapter of this configuration on it.

    Returns:
        `str`: `"none"` if they stay as they are. `"moved"` if a part of them moves into the adapter; base and adapter
        together are still the same model. `"replaced"` if the old weights are lost. `"trained"` if they are trained
        with the adapter.
    """
    init = str(getattr(config, "init_lora_weights", True)).lower()
    moved = init.startswith(("pissa", "corda", "olora", "lora_ga"))
    kept = init in ("true", "false", "gaussian", "orthogonal", "eva", "mica")
    if getattr(config, "layer_replication", None) or getattr(config, "kasa_config", None) or not (moved or kept):
        return "replaced"
    if getattr(config, "bias", "none") != "none":
        return "trained"
    return "moved" if moved else "none"


def trains_base(model: "PeftModel") -> bool:
    """Whether the base of an adapter is, or may be, trained with it."""
    own = {id(parameter) for parameter in adapter_parameters(model, model.active_adapter).values()}
    others = (parameter for parameter in model.parameters() if id(parameter) not in own)
    return effect_on_base(model.active_peft_config) == "trained" or any(p.requires_grad for p in others)


@contextmanager
def keeping_requires_grad(model: nn.Module) -> Iterator[None]:
    """Restore every `requires_grad` at the end: PEFT changes them when it switches adapters."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad = flag


@contextmanager
def active_adapter(model: nn.Module, name: str | None) -> Iterator[None]:
    """
    Let a model, or one of its layers, use another of its adapters, or none.

    PEFT's own `set_adapter` and `disable_adapter` also change `requires_grad`. FSDP2 reads that when it gathers a
    layer for the first time, and a backward pass reads it when it recomputes one. Private to PEFT, checked with 0.21.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    modules = [module for module in model.modules() if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))]
    before = [(module._active_adapter, module._disable_adapters) for module in modules]
    try:
        for module in modules:
            module._disable_adapters = name is None or (
                isinstance(module, AuxiliaryTrainingWrapper) and name not in module._adapters
            )
            if not module._disable_adapters:
                module._active_adapter = [name]
        yield
    finally:
        for module, (adapter, disabled) in zip(modules, before, strict=True):
            module._active_adapter, module._disable_adapters = adapter, disabled


@contextmanager
def recomputing_with(model: "PeftModel", name: str) -> Iterator[None]:
    """
    Recompute with the adapter `name` the layers that run now under activation checkpointing. Another adapter may be
    active by the time of the backward pass. Private to transformers, checked with 5.23: each checkpointed layer holds
    its checkpoint function.
    """
    layers = [layer for layer in model.modules() if getattr(layer, "gradient_checkpointing", False)]
    functions = [(layer, layer._gradient_checkpointing_func) for layer in layers if layer.training]
    try:
        for layer, function in functions:
            layer._gradient_checkpointing_func = functools.partial(
                function, context_fn=lambda layer=layer: (nullcontext(), active_adapter(layer, name))
            )
        yield
    finally:
        for layer, function in functions:
            layer._gradient_checkpointing_func = function


def keep_trainable_on_cpu(model: nn.Module) -> None:
    """
    Stop bitsandbytes from packing 4-bit weights on a CPU. It packs them in the first forward in eval mode, and no
    gradient passes through packed weights. So a scoring pass would end the training of all adapters in lower layers.
    Private to bitsandbytes, checked with 0.50.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def adapter_parameters(model: "PeftModel", name: str) -> dict[str, nn.Parameter]:
    """Parameters of one adapter of a model, by their names."""
    parameters = plain_names(model.named_parameters())
    return {key: parameter for key, parameter in parameters.items() if re.search(rf"\.{name}(\.|$)", key)}


def adapter_state(model: "PeftModel", name: str) -> dict[str, torch.Tensor]:
    """Parameters and buffers of one adapter of a model, by their names; several names may share a tensor."""
    return {key: tensor for key, tensor in named_state(model).items() if re.search(rf"\.{name}(\.|$)", key)}


def sibling(parameter_name: str, adapter: str, other: str) -> str:
    """Name of the parameter of another adapter in the same place."""
    return re.sub(rf"\.{adapter}(\.|$)", rf".{other}\1", parameter_name)


def copy_adapter(model: "PeftModel") -> str:
    """
    Copy the active adapter of a model beside it.

    Returns:
        `str`: name of the copy.

    Raises:
        ValueError: If PEFT supports only one adapter of this kind in a model.
    """
    active = model.active_adapter
    config = copy.deepcopy(model.peft_config[active])
    if hasattr(config, "init_lora_weights"):
        # PiSSA and the like would change the base a second time
        config.init_lora_weights, config.layer_replication = True, None
    with keeping_requires_grad(model), torch.random.fork_rng(devices=[]):
        model.add_adapter(WEAK_ADAPTER, config)
        model.set_adapter(active)
    weak_state = adapter_state(model, WEAK_ADAPTER)
    for name, tensor in adapter_state(model, active).items():
        weak_state[sibling(name, active, WEAK_ADAPTER)].data = tensor.data.clone()
    return WEAK_ADAPTER


def load_adapter_config(name_or_path: str, init_kwargs: dict[str, Any]) -> "PeftConfig | None":
    """Configuration of the adapter in a folder or on the Hub, or `None` if there is a whole model."""
    hub_kwargs = {key: init_kwargs[key] for key in ("revision", "token", "cache_dir") if key in init_kwargs}
    if find_adapter_config_file(name_or_path, **hub_kwargs) is None:
        return None
    from peft import PeftConfig

    return PeftConfig.from_pretrained(name_or_path, **hub_kwargs)


def load_adapter(strong: "PeftModel", name_or_path: str, config: "PeftConfig", init_kwargs: dict[str, Any]) -> str:
    """
    Load an adapter for the base of `strong` beside the one that it has.

    Returns:
        `str`: name of the adapter.

    Raises:
        ValueError: If the adapter is for another base or cannot be put beside the one of `strong`.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    active = strong.active_adapter
    remedy = "To use it anyway, merge it into its base (`merge_and_unload`) and pass the folder of the whole model."
    bases = [config.base_model_name_or_path, strong.peft_config[active].base_model_name_or_path]
    if all(bases) and not same_place(*bases):
        raise ValueError(
            f"`weak_model={name_or_path!r}` is an adapter for {bases[0]!r}, but the model is one for {bases[1]!r}. "
            f"{remedy}"
        )
    if config.is_prompt_learning:
        raise ValueError(
            f"`weak_model={name_or_path!r}` is an adapter of type {config.peft_type.value}, which adds virtual tokens "
            f"that the model does not have. Use a method that keeps the sequence, such as LoRA."
        )
    unused = init_kwargs.keys() - {"revision", "token", "cache_dir", "trust_remote_code"}
    if unused:
        raise ValueError(
            f"`weak_model_init_kwargs` {sorted(unused)} do not apply to an adapter, which is loaded onto the model's "
            "own base. Remove them."
        )
    hub_kwargs = {key: init_kwargs[key] for key in ("revision", "token", "cache_dir") if key in init_kwargs}
    with keeping_requires_grad(strong), torch.random.fork_rng(devices=[]):
        try:
            strong.load_adapter(name_or_path, WEAK_ADAPTER, is_trainable=False, **hub_kwargs)
        except (ValueError, RuntimeError) as error:
            raise ValueError(
                f"`weak_model={name_or_path!r}` cannot be put beside the model's own adapter: {error}. {remedy}"
            ) from error
        strong.set_adapter(active)
    if isinstance(strong.get_output_embeddings(), BaseTunerLayer):
        raise ValueError(
            f"`weak_model={name_or_path!r}` has an adapter on the LM head, but the loss multiplies with the weight of "
            f"that directly. {remedy}"
        )
    return WEAK_ADAPTER


def same_place(first: str, second: str) -> bool:
    """Whether two names stand for the same folder or the same hub id."""
    return first == second or (Path(first).exists() and Path(first).resolve() == Path(second).resolve())
