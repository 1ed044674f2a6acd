"""Makes the weak model of a run from what the user has given."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, is_peft_model
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl.trainer.utils import create_model_from_path, get_config_model_id

from ..distributed.engines import add_unit, engine_name
from ..distributed.sharding import gathered, in_zero3, runnable
from ..modeling.adapters import (
    active_adapter,
    copy_adapter,
    effect_on_base,
    load_adapter,
    load_adapter_config,
    trains_base,
)
from ..modeling.checks import check_whole
from ..modeling.lm_head import add_head_access, remove_head_access
from ..modeling.modes import evaluating, unwrap_adapter
from ..user_warnings import warn
from .adapters import DisabledAdapter, NamedAdapter
from .base import WeakModel
from .frozen import FrozenModel, InitialModel
from .joint import TrainedAdapter, TrainedModel
from .loading import check_same_vocabulary, load_tokenizer, load_weak_model, naming_weak_model, split_revision

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel

    from ..config import WMSSConfig


_NO_COPY = "the weak model is on the base of `model`, or is `model` before its first step"


def make_weak_reference(
    weak_model: str | nn.Module | None,
    current_strong: Callable[[], "PreTrainedModel | PeftModel"],
    args: "WMSSConfig",
    processing_class: PreTrainedTokenizerBase | None,
    accelerator: Accelerator,
    peft_config: "PeftConfig | None" = None,
    initial_model: PreTrainedModel | None = None,
) -> WeakModel:
    """
    The weak model of a run, prepared for its device and precision.

    Args:
        weak_model (`str` or [`~transformers.PreTrainedModel`], *optional*):
            Hub id, checkpoint folder or model. `None` stands for `args.weak_model_name_or_path` or else for the strong
            model as it is now (M0).
        current_strong (`Callable[[], transformers.PreTrainedModel | peft.PeftModel]`):
            Returns the model that is going to be trained. The engine may wrap it later, so it is asked for each time.
        args ([`WMSSConfig`]):
            Arguments of the run.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Tokenizer of the strong model.
        accelerator ([`~accelerate.Accelerator`]):
            Accelerator of the run.
        peft_config ([`~peft.PeftConfig`], *optional*):
            Configuration of an adapter that has only now been put on the strong model.
        initial_model ([`~transformers.PreTrainedModel`], *optional*):
            Copy of the model as it was handed in, if the adapter has left no other trace of it.

    Raises:
        ValueError: If the options contradict each other, or the weak model cannot be mixed with the strong one.
    """
    strong = current_strong()
    name, init_kwargs = args.weak_model_name_or_path, args.weak_model_init_kwargs
    if weak_model is not None and name is not None:
        raise ValueError(f"Both `weak_model` and `weak_model_name_or_path={name!r}` are set. Keep one of them.")
    weak_model = name if weak_model is None else weak_model
    owned = not isinstance(weak_model, nn.Module)
    if init_kwargs and not isinstance(weak_model, str):
        raise ValueError(
            f"`weak_model_init_kwargs={init_kwargs}` apply to a weak model that is loaded by name or path. Set "
            "`weak_model_name_or_path`, or remove them."
        )
    if args.weak_dtype is not None:
        if isinstance(weak_model, nn.Module):
            raise refused_dtype(
                args, "is not applied to a model that is handed in as an object. Load it in this precision"
            )
        if weak_model is not None:
            init_kwargs = {**(init_kwargs or {}), "dtype": args.weak_dtype}
    if weak_model is None and initial_model is not None:
        weak_model = initial_model
        check_same_vocabulary(strong, weak_model)
    elif weak_model is None:
        weak_model = initial_reference(current_strong, args, peft_config)
        if isinstance(weak_model, WeakModel):
            if args.weak_dtype is not None:
                raise refused_dtype(args, f"cannot be applied: {_NO_COPY}. Pass the folder of a whole model")
            return weak_model
    else:
        if isinstance(weak_model, str):
            init_kwargs = {"trust_remote_code": args.trust_remote_code, **(init_kwargs or {})}
            weak_model = split_revision(weak_model, init_kwargs)
            with naming_weak_model(weak_model):
                weak_tokenizer = load_tokenizer(weak_model, init_kwargs)
                config = load_adapter_config(weak_model, init_kwargs) if is_peft_model(strong) else None
                # Only a base that stays as it is can be shared
                if (
                    config is not None
                    and not trains_base(strong)
                    and {*map(effect_on_base, (config, strong.active_peft_config))} == {"none"}
                ):
                    if args.weak_dtype is not None:
                        raise refused_dtype(args, f"cannot be applied: {_NO_COPY}. Merge the adapter into its base")
                    check_same_vocabulary(strong, strong, processing_class, weak_tokenizer)
                    name = load_adapter(strong, weak_model, config, init_kwargs)
                    return (TrainedAdapter if args.train_weak else NamedAdapter)(current_strong, name)
                weak_model = load_weak_model(weak_model, strong, **init_kwargs)
        else:
            if {id(p) for p in weak_model.parameters()} & {id(p) for p in strong.parameters()}:
                raise ValueError(
                    "`weak_model` shares parameters with `model`, so it would change while that is trained. Omit "
                    "`weak_model`, or load it separately."
                )
            remove_head_access(unwrap_adapter(weak_model))
            folder = get_config_model_id(weak_model.config)
            weak_tokenizer = load_tokenizer(folder, {}) if folder and Path(folder).is_dir() else None
        check_whole(weak_model, "weak_model", "weak_model_init_kwargs")
        check_same_vocabulary(strong, weak_model, processing_class, weak_tokenizer)
    check_not_quantised(weak_model, args)
    head_problem = add_head_access(unwrap_adapter(weak_model))
    if not args.train_weak:
        reference = FrozenModel(weak_model, accelerator, head_problem, owned)
        reference.starts_as_strong = initial_model is None and getattr(weak_model, "dtype", None) in (
            None,
            strong.dtype,
        )
        return reference
    if is_peft_model(strong):
        raise ValueError(
            "`train_weak=True` trains a second adapter beside the model's own, but `weak_model` is a whole model. "
            "Pass the folder of an adapter for the same base, or no `weak_model`."
        )
    if getattr(weak_model, "is_quantized", False):
        raise ValueError("`train_weak=True` cannot train a quantised `weak_model`. Load it without quantisation.")
    if engine_name(accelerator) == "replicated":
        weak_model = accelerator.prepare_model(weak_model, evaluation_mode=True)
    add_unit(strong, weak_model, accelerator)
    return TrainedModel(weak_model, strong, head_problem)


def keep_initial_model(
    model: "str | PreTrainedModel",
    args: "WMSSConfig",
    peft_config: "PeftConfig | None",
    quantization_config: Any = None,
) -> PreTrainedModel | None:
    """A copy of the model as it is handed in, if `peft_config` is going to leave no other trace of it."""
    if peft_config is None or args.changes_weak_model or effect_on_base(peft_config) in ("none", "moved"):
        return None
    warn(
        "`peft_config` replaces or trains weights of the base, so the weak model is a copy of the whole model as it "
        "is handed in, which takes the memory of a second base.",
        stacklevel=3,
    )
    if not isinstance(model, str):
        return frozen_copy(model, args)
    init_kwargs = {"device_map": None, "trust_remote_code": args.trust_remote_code, **(args.model_init_kwargs or {})}
    if quantization_config is not None:
        init_kwargs["quantization_config"] = quantization_config
    if args.weak_dtype is not None:
        init_kwargs["dtype"] = args.weak_dtype
    return create_model_from_path(model, **init_kwargs)


def initial_reference(
    current_strong: Callable[[], "PreTrainedModel | PeftModel"], args: "WMSSConfig", peft_config: "PeftConfig | None"
) -> WeakModel | PreTrainedModel:
    """
    The model as it was handed in (M0), as a weak model.

    The strong model still is M0, or has it as its base. The result is a reference to that part, or a copy of the whole
    model.

    Raises:
        ValueError: If a new adapter changes the model, or the model cannot have a second adapter.
    """
    strong = current_strong()
    if peft_config is not None and args.changes_weak_model:
        check_start_of_adapter(strong, args, peft_config)
    elif peft_config is not None and effect_on_base(peft_config) == "none" and not trains_base(strong):
        reference = DisabledAdapter(current_strong)
        reference.starts_as_strong = starts_as_base(strong)
        return reference
    if not args.mixes_logits:
        return InitialModel(strong)
    if is_peft_model(strong):
        problem = "weights of its base are trained with it"
        if not trains_base(strong):
            try:
                name = copy_adapter(strong)
                return (TrainedAdapter if args.train_weak else NamedAdapter)(current_strong, name)
            except ValueError as error:  # some adapters can only be there once
                problem = str(error)
        if args.train_weak:
            raise ValueError(
                f"`train_weak=True` needs a second adapter beside the model's own, but {problem}. Set "
                "`train_weak=False`, or use another adapter."
            )
        warn(
            f"The adapter cannot be kept beside itself as the weak model ({problem}), so the whole model is copied, "
            "which takes the memory of a second base.",
            stacklevel=5,
        )
    return frozen_copy(strong, args)


def check_start_of_adapter(strong: "PeftModel", args: "WMSSConfig", peft_config: "PeftConfig") -> None:
    """
    Check that a new adapter can be copied as the start of a weak model that changes.

    Raises:
        ValueError: If the model with its adapter is not the one that was handed in.
    """
    effect = effect_on_base(peft_config)
    if effect == "replaced" or (effect != "moved" and not starts_as_base(strong)):
        option = "train_weak=True" if args.train_weak else "weak_refresh='epoch'"
        raise ValueError(
            f"`{option}` needs a weak model that starts as the model that was handed in, but the adapter of type "
            f"{peft_config.peft_type.value} in `peft_config` changes its outputs before it is trained. Use an "
            "initialisation that does not (such as `init_lora_weights=True`), or pass a `weak_model`."
        )


def starts_as_base(model: "PeftModel") -> bool:
    """Try whether an adapter leaves the outputs of its base unchanged. Most do before they are trained."""
    device = model.get_input_embeddings().weight.device
    inputs = {"input_ids": torch.arange(8, device=device).view(1, -1), "use_cache": False}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    with evaluating(model), runnable(model):
        adapted = model(**inputs).logits.float()
        with active_adapter(model, None):
            base = model(**inputs).logits.float()
    tolerance = 1e-5 if model.dtype == torch.float32 else 2e-2
    result = [bool((adapted - base).abs().max() <= tolerance * base.abs().max())]
    if torch.distributed.is_initialized():  # FSDP may load the weights on the main process only
        broadcast_object_list(result)
    return result[0]


def refused_dtype(args: "WMSSConfig", problem: str) -> ValueError:
    return ValueError(f"`weak_dtype={args.weak_dtype!r}` {problem}, or remove `weak_dtype`.")


def check_not_quantised(model: PreTrainedModel, args: "WMSSConfig") -> None:
    if args.weak_dtype is not None and getattr(unwrap_adapter(model), "is_quantized", False):
        raise refused_dtype(args, "cannot be applied to weights that are quantised. Pass a `weak_model` that is not")


def frozen_copy(model: PreTrainedModel, args: "WMSSConfig") -> PreTrainedModel:
    """
    Copy of a model for use as the weak model, on the same device.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            A model that the SFTTrainer has taken in.
        args ([`WMSSConfig`]):
            Arguments of the run, of which `weak_dtype` is the copy's precision.

    Raises:
        ValueError: If the model is split over several devices, or is quantised and has a `weak_dtype`.
    """
    check_not_quantised(model, args)
    base = unwrap_adapter(model)
    if hasattr(base, "_old_forward"):
        raise ValueError(
            "The model is dispatched over several devices with `device_map`, so it cannot be copied as the weak "
            "model. Pass `weak_model` as a path or hub id, or load the model on one device."
        )
    weak = copy.deepcopy(model)
    for parameter, copied in zip(model.parameters(), weak.parameters(), strict=True):
        if in_zero3(parameter):  # the copy is empty
            with gathered([parameter]):
                copied.data = parameter.data.to("cpu", copy=True)
    if args.weak_dtype not in (None, "auto"):
        cast_parameters(weak, getattr(torch, args.weak_dtype))
    # A patched forward (TRL 1.16's fused LM head, ours) is an attribute of the instance. It runs the original model
    for patch in ("forward", "forward_without_head_access"):
        vars(unwrap_adapter(weak)).pop(patch, None)
    return weak


def cast_parameters(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Cast a model in place to what `from_pretrained(dtype=...)` would load: buffers such as the frequencies of rotary
    embeddings stay as they are, and so do weights that their architecture wants in float32."""
    base = unwrap_adapter(model)
    kept = {*(getattr(base, "_keep_in_fp32_modules_strict", None) or ())}
    if dtype == torch.float16:
        kept |= {*(getattr(base, "_keep_in_fp32_modules", None) or ())}
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not any(part in name for part in kept):
            parameter.data = parameter.data.to(dtype)
    base.config.dtype = dtype
