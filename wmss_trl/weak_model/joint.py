"""Weak models that are trained with the strong one."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from ..modeling.adapters import (
    active_adapter,
    adapter_parameters,
    keeping_requires_grad,
    recomputing_with,
    sibling,
)
from ..modeling.fingerprint import fingerprint
from ..modeling.lm_head import LMHead, lm_head_of
from ..modeling.modes import evaluating, unwrap_adapter
from .adapters import NamedAdapter

if TYPE_CHECKING:
    from peft import PeftModel

from .base import T, WeakModel, backbone_states


class TrainedModel(WeakModel):
    """
    A weak model of its own that is trained with the strong one (the paper's Algorithm 1).

    It becomes a submodule of the strong model. So one optimizer, gradient clipping and data parallelism cover both. It
    is left out when the strong model is saved.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The weak model.
        strong ([`~transformers.PreTrainedModel`]):
            The strong model.
        head_problem (`str`, *optional*):
            See [`WeakModel`].
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

    def before_forward(self, inputs: dict[str, Any], positions: Tensor) -> None:
        return None  # its gradients go the same way as the strong model's

    def inside_forward(
        self,
        inputs: dict[str, Any],
        positions: Tensor,
        hidden: Tensor | None,
        function: Callable[[Tensor, LMHead], T],
    ) -> T:
        return self.model(**inputs, positions=positions, with_lm_head=function)["value"]

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

    def before_forward(self, inputs: dict[str, Any], positions: Tensor) -> None:
        return None

    def inside_forward(
        self,
        inputs: dict[str, Any],
        positions: Tensor,
        hidden: Tensor | None,
        function: Callable[[Tensor, LMHead], T],
    ) -> T:
        with active_adapter(self.model, self.name), recomputing_with(self.model, self.name):
            hidden = backbone_states(self.model, inputs, positions)
            head = lm_head_of(unwrap_adapter(self.model))
        return function(hidden, head)

    def logits(self, inputs: dict[str, Any]) -> Tensor:
        # This runs in the middle of the model's own forward. Accelerate runs that forward in one autocast context. The
        # context must not be entered twice, or it would stay on. The model under the adapter is not wrapped in it.
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
