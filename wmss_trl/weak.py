"""The weak reference: the frozen model whose logits are mixed into the loss, and where it comes from."""

import copy
import hashlib
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, extract_model_from_parallel, is_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl.trainer.utils import create_model_from_path, get_config_model_id

from .adapters import (
    active_adapter,
    adapter_parameters,
    copy_adapter,
    effect_on_base,
    keeping_requires_grad,
    load_adapter,
    load_adapter_config,
    recomputing_with,
    sibling,
    trains_base,
)
from .checks import check_whole
from .engines import add_unit, engine_name, prepare_frozen
from .lm_head import LMHead, add_head_access, evaluating, lm_head_of, remove_head_access, unwrap_adapter
from .sharding import gathered, in_zero3, is_sharded, parameters_at_rest, runnable, whole
from .weak_loading import check_same_vocabulary, load_tokenizer, load_weak_model, naming_weak_model, split_revision

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel

    from .config import WMSSConfig


T = TypeVar("T")


class WeakReference:
    """
    A weak model of its own, frozen.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The weak model. It is put into eval mode, its parameters stop requiring gradients, and it is prepared for
            the engine of the run.
        accelerator ([`~accelerate.Accelerator`]):
            Accelerator of the run.
        head_problem (`str`, *optional*):
            Why its logits cannot be computed from its LM head, see [`~wmss_trl.lm_head.add_head_access`].
        owned (`bool`, *optional*, defaults to `False`):
            Whether nobody else uses the model, so that its memory can be given back.
    """

    trained = False
    owned = False
    on_strong_base = False
    # Whether the strong model as it is handed in, where this stands for it, still has its outputs when training starts
    starts_as_strong = True

    def __init__(
        self, model: PreTrainedModel, accelerator: Accelerator, head_problem: str | None = None, owned: bool = False
    ):
        # Before it is prepared, so that it has the same identity under every engine
        self.fingerprint = fingerprint(dict(model.named_parameters()))
        self.model = prepare_frozen(model.requires_grad_(False).eval(), accelerator)
        self.owned = owned
        self.head_problem = head_problem

    @contextmanager
    def activated(self) -> Iterator[nn.Module]:
        """The model to call for weak logits, in eval mode and without gradients while the context lasts."""
        with torch.no_grad():
            yield self.model

    def lm_head(self) -> LMHead:
        """The LM head of the weak model, wherever that is kept; see [`~wmss_trl.lm_head.whole_lm_head`]."""
        with self.activated() as model:
            return lm_head_of(unwrap_adapter(extract_model_from_parallel(model)))

    def keep_only_lm_head(self) -> None:
        """Give back the memory of what is not needed when hidden states are read from a cache."""
        if self.owned and not is_sharded(self.model):
            head = self.lm_head()
            # Tensors of their own: PyTorch may swap what is inside the model's parameters
            bias = None if head.bias is None else head.bias.detach()
            head = replace(head, weight=head.weight.detach(), bias=bias)
            self.lm_head = lambda: head
            if getattr(self.model, "is_quantized", False):  # whose weights cannot be moved to the meta device
                self.model._modules.clear()
            else:
                self.model.to("meta")

    def states(
        self, inputs: dict[str, Any], positions: Tensor, hidden: Tensor | None = None
    ) -> Callable[[Callable[[Tensor, LMHead], T]], T]:
        """
        The weak model's part of a training step.

        Args:
            inputs (`dict[str, Any]`):
                Inputs of a forward.
            positions (`torch.Tensor` of shape `(N,)`):
                Flat indices of the supervised positions.
            hidden (`torch.Tensor` of shape `(N, H)`, *optional*):
                The hidden states at these positions, if they are known.

        Returns:
            `Callable`: to be called with a function inside the strong model's forward. Returns what that returns for
            the weak hidden states and the weak LM head.
        """
        if hidden is None and self.on_strong_base and in_zero3(next(self.model.parameters())):
            # ZeRO-3 expects the modules in the order of the last steps, which a forward of its own would upset

            def call(function: Callable[[Tensor, LMHead], T]) -> T:
                with self.activated() as model:
                    hidden = backbone_states(model, inputs, positions)
                return function(hidden, self.lm_head())

            return call
        if hidden is None:  # now, so that its memory is free again in the strong model's forward
            with self.activated() as model:
                hidden = model(**inputs, positions=positions)["value"]

        return lambda function: function(hidden, self.lm_head())

    def logits(self, inputs: dict[str, Any]) -> Tensor:
        """The weak logits of a training step, of shape `(B, L, V)`, for a model whose LM head cannot be reached."""
        with self.activated() as model:
            return model(**inputs).logits

    def current_fingerprint(self) -> str:
        """Identity of the weights as they are now; `fingerprint` is that of the start."""
        return fingerprint(self._parameters())

    def _parameters(self) -> dict[str, nn.Parameter]:
        return parameters_at_rest(self.model)


class InitialModel(WeakReference):
    """
    The model as it was handed in (M0) where only its entropies are needed. They are those of the strong model before
    its first step, so no second model is kept.

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


class DisabledAdapter(WeakReference):
    """
    The base of a PEFT model, which is the model with its adapter switched off: it costs no memory.

    Args:
        strong (`Callable[[], peft.PeftModel]`):
            Returns the strong model as it is now. Its adapter must have started as the identity, or the base is not
            the model that training started from.
    """

    on_strong_base = True

    def __init__(self, strong: Callable[[], "PeftModel"]):
        self.strong = strong
        self.head_problem = None  # it is the strong model's own head
        # Not kept: FSDP2 replaces the parameters, and these would stay in memory whole
        self.fingerprint = fingerprint({name: p for name, p in self.model.named_parameters() if not p.requires_grad})

    @property
    def model(self) -> "PeftModel":
        return self.strong()

    @contextmanager
    def activated(self) -> Iterator[nn.Module]:
        with evaluating(self.model), active_adapter(self.model, None):
            yield self.model


class NamedAdapter(WeakReference):
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


class TrainedModel(WeakReference):
    """
    A weak model of its own that is trained with the strong one (the paper's Algorithm 1).

    It becomes a submodule of the strong model, so that one optimizer, gradient clipping and data parallelism cover
    both; it is left out when that is saved.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The weak model.
        strong ([`~transformers.PreTrainedModel`]):
            The strong model.
        head_problem (`str`, *optional*):
            See [`WeakReference`].
    """

    trained = True

    def __init__(self, model: PreTrainedModel, strong: PreTrainedModel, head_problem: str | None = None):
        self.model = model.requires_grad_(True)
        self.strong = strong
        self.head_problem = head_problem
        self.fingerprint = fingerprint(dict(model.named_parameters()))
        strong.add_module("weak_branch", model)
        save_pretrained, tie_weights = strong.save_pretrained, strong.tie_weights

        def save_strong(*args: Any, state_dict: dict[str, Tensor] | None = None, **kwargs: Any) -> Any:
            if state_dict is not None:  # gathered from a sharded model, with the branch
                state_dict = {name: value for name, value in state_dict.items() if not name.startswith("weak_branch.")}
            with self.detached():
                return save_pretrained(*args, state_dict=state_dict, **kwargs)

        def tie_both(*args: Any, **kwargs: Any) -> Any:
            model.tie_weights()
            return tie_weights(*args, **kwargs)

        strong.save_pretrained = save_strong
        strong.tie_weights = tie_both

    @contextmanager
    def activated(self) -> Iterator[nn.Module]:
        with evaluating(self.model):
            yield self.model

    def states(
        self, inputs: dict[str, Any], positions: Tensor, hidden: Tensor | None = None
    ) -> Callable[[Callable[[Tensor, LMHead], T]], T]:
        return lambda function: self.model(**inputs, positions=positions, with_lm_head=function)["value"]

    def logits(self, inputs: dict[str, Any]) -> Tensor:
        return self.model(**inputs).logits

    def trained_parameters(self) -> list[nn.Parameter]:
        return list(self.model.parameters())

    @contextmanager
    def detached(self) -> Iterator[None]:
        branch = self.strong._modules.pop("weak_branch", None)
        try:
            yield
        finally:
            if branch is not None:
                self.strong.add_module("weak_branch", branch)

    def save(self, folder: Path) -> None:
        self.model.save_pretrained(folder)

    def load(self, folder: Path) -> None:
        saved = type(self.model).from_pretrained(folder, dtype=self.model.dtype)
        self.model.load_state_dict(saved.state_dict())


class TrainedAdapter(NamedAdapter):
    """
    A second adapter beside the strong one on the same base, trained with it (the paper's Algorithm 1).

    Args:
        strong (`Callable[[], peft.PeftModel]`):
            Returns the strong model, with both adapters, as it is now.
        name (`str`):
            Name of the weak adapter.
    """

    trained = True

    def __init__(self, strong: Callable[[], "PeftModel"], name: str):
        super().__init__(strong, name)
        active = self.model.active_adapter
        strong_parameters = adapter_parameters(self.model, active)
        for key, parameter in adapter_parameters(self.model, name).items():
            # An earlier adapter may be of another kind and in other layers
            same = strong_parameters.get(sibling(key, name, active))
            parameter.requires_grad_(same is None or same.requires_grad)

    def states(
        self, inputs: dict[str, Any], positions: Tensor, hidden: Tensor | None = None
    ) -> Callable[[Callable[[Tensor, LMHead], T]], T]:
        def call(function: Callable[[Tensor, LMHead], T]) -> T:
            with active_adapter(self.model, self.name), recomputing_with(self.model, self.name):
                hidden = backbone_states(self.model, inputs, positions)
                head = lm_head_of(unwrap_adapter(self.model))
            return function(hidden, head)

        return call

    def logits(self, inputs: dict[str, Any]) -> Tensor:
        # In the middle of the model's own forward. Accelerate runs that in one autocast context, which must not be
        # entered twice: it would stay on. What is under the adapter is not wrapped.
        with active_adapter(self.model, self.name), recomputing_with(self.model, self.name):
            return unwrap_adapter(self.model)(**inputs).logits

    def trained_parameters(self) -> list[nn.Parameter]:
        return [p for p in adapter_parameters(self.model, self.name).values() if p.requires_grad]

    @contextmanager
    def detached(self) -> Iterator[None]:
        yield  # the strong adapter is loaded by its name

    def save(self, folder: Path) -> None:
        self.model.save_pretrained(folder, selected_adapters=[self.name])

    def load(self, folder: Path) -> None:
        active = self.model.active_adapter
        with keeping_requires_grad(self.model):
            self.model.load_adapter(str(folder / self.name), self.name, is_trainable=True)
            self.model.set_adapter(active)


def make_weak_reference(
    weak_model: str | nn.Module | None,
    current_strong: Callable[[], "PreTrainedModel | PeftModel"],
    args: "WMSSConfig",
    processing_class: PreTrainedTokenizerBase | None,
    accelerator: Accelerator,
    peft_config: "PeftConfig | None" = None,
    initial_model: PreTrainedModel | None = None,
) -> WeakReference:
    """
    The weak reference of a run, prepared for its device and precision.

    Args:
        weak_model (`str` or [`~transformers.PreTrainedModel`], *optional*):
            Hub id, checkpoint folder or model. `None` stands for `args.weak_model_name_or_path` or else for the strong
            model as it is now (M0).
        current_strong (`Callable[[], transformers.PreTrainedModel | peft.PeftModel]`):
            Returns the model that is going to be trained as it is now: the engine may wrap it later.
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
    if weak_model is None and initial_model is not None:
        weak_model = initial_model
        check_same_vocabulary(strong, weak_model)
    elif weak_model is None:
        weak_model = initial_reference(current_strong, args, peft_config)
        if isinstance(weak_model, WeakReference):
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
    head_problem = add_head_access(unwrap_adapter(weak_model))
    if not args.train_weak:
        reference = WeakReference(weak_model, accelerator, head_problem, owned)
        reference.starts_as_strong = initial_model is None
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


def backbone_states(model: nn.Module, inputs: dict[str, Any], positions: Tensor) -> Tensor:
    """Hidden states of a model that is in the middle of its forward: its backbone is run again."""
    outputs = unwrap_adapter(model).base_model(**inputs | {"use_cache": False})
    return outputs.last_hidden_state.flatten(0, 1)[positions]


def keep_initial_model(
    model: "str | PreTrainedModel",
    args: "WMSSConfig",
    peft_config: "PeftConfig | None",
    quantization_config: Any = None,
) -> PreTrainedModel | None:
    """A copy of the model as it is handed in, if `peft_config` is going to leave no other trace of it."""
    if peft_config is None or args.changes_weak_model or effect_on_base(peft_config) in ("none", "moved"):
        return None
    warnings.warn(
        "`peft_config` replaces or trains weights of the base, so the weak model is a copy of the whole model as it "
        "is handed in, which takes the memory of a second base.",
        stacklevel=3,
    )
    if not isinstance(model, str):
        return frozen_copy(model)
    init_kwargs = {"device_map": None, "trust_remote_code": args.trust_remote_code, **(args.model_init_kwargs or {})}
    if quantization_config is not None:
        init_kwargs["quantization_config"] = quantization_config
    return create_model_from_path(model, **init_kwargs)


def initial_reference(
    current_strong: Callable[[], "PreTrainedModel | PeftModel"], args: "WMSSConfig", peft_config: "PeftConfig | None"
) -> WeakReference | PreTrainedModel:
    """
    The model as it was handed in (M0), which the strong one still is or has in it: a reference to that part, or a copy
    of the whole.

    Raises:
        ValueError: If an adapter that is new, or the only one that the model can have, stands against it.
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
        warnings.warn(
            f"The adapter cannot be kept beside itself as the weak model ({problem}), so the whole model is copied, "
            "which takes the memory of a second base.",
            stacklevel=5,
        )
    return frozen_copy(strong)


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
    """Tries whether an adapter leaves the outputs of its base as they are, as most do before they are trained."""
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


def frozen_copy(model: PreTrainedModel) -> PreTrainedModel:
    """
    Copy of a model for use as the weak reference, on the same device.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            A model that the SFTTrainer has taken in.

    Raises:
        ValueError: If the model is split over several devices.
    """
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
    # A patched forward (TRL 1.16's fused LM head, ours) is an instance attribute whose closure runs the original model
    for patch in ("forward", "forward_without_head_access"):
        vars(unwrap_adapter(weak)).pop(patch, None)
    return weak


def fingerprint(parameters: dict[str, nn.Parameter]) -> str:
    """Hash of the names, shapes and dtypes of parameters, of the sum of each one's bit patterns and of up to 64 of its
    values: cheap, and enough to tell even neighbouring checkpoints apart. All processes must call it together."""
    digest = hashlib.sha256()
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    for name, parameter in parameters.items():
        with gathered([parameter]):
            values = whole(parameter.detach())
            digest.update(f"{name} {tuple(values.shape)} {values.dtype}\n".encode())
            bits = values.view(integers[values.element_size()]).flatten()
            sample = bits[:: max(1, len(bits) // 64)][:64].long()
            digest.update(torch.cat([sample, bits.sum(dtype=torch.int64).view(1)]).cpu().numpy().tobytes())
    result = [digest.hexdigest()[:16]]
    if torch.distributed.is_initialized():  # FSDP may load the weights on the main process only
        broadcast_object_list(result)
    return result[0]
