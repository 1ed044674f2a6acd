"""Where weak logits come from: what a training step and the scoring ask of a weak model."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, TypeVar

from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn

from ..distributed.sharding import in_zero3, parameters_at_rest
from ..modeling.fingerprint import fingerprint
from ..modeling.lm_head import LMHead, lm_head_of
from ..modeling.modes import unwrap_adapter

if TYPE_CHECKING:
    pass


T = TypeVar("T")


class WeakModel(ABC):
    """
    A weak model of a run.

    Attributes:
        fingerprint (`str`):
            Identity of its weights when the run was set up.
        head_problem (`str` or `None`):
            Why its logits cannot be computed from its LM head, see [`~wmss_trl.modeling.lm_head.add_head_access`].
        trained (`bool`):
            Whether it is trained with the strong model.
        owned (`bool`):
            Whether nobody else uses the model, so that its memory can be given back.
        on_strong_base (`bool`):
            Whether it is the strong model with another adapter, or none.
        starts_as_strong (`bool`):
            Whether the strong model as it is handed in, where this stands for it, still has its outputs when training
            starts.
    """

    fingerprint: str
    head_problem: str | None
    model: nn.Module
    trained = False
    owned = False
    on_strong_base = False
    starts_as_strong = True

    @abstractmethod
    def activated(self) -> AbstractContextManager[nn.Module]:
        """The model to call for weak logits, in eval mode and without gradients while the context lasts."""

    def lm_head(self) -> LMHead:
        """The LM head of the weak model, wherever that is kept; see [`~wmss_trl.modeling.lm_head.whole_lm_head`]."""
        with self.activated() as model:
            return lm_head_of(unwrap_adapter(extract_model_from_parallel(model)))

    def keep_only_lm_head(self) -> None:  # noqa: B027
        """Give back the memory of what is not needed when hidden states are read from a cache, if it can be."""

    def before_forward(self, inputs: dict[str, Any], positions: Tensor) -> Tensor | None:
        """
        The weak model's part of a training step that can be done before the strong model's forward, so that its memory
        is free again in that.

        Args:
            inputs (`dict[str, Any]`):
                Inputs of a forward.
            positions (`torch.Tensor` of shape `(N,)`):
                Flat indices of the supervised positions.

        Returns:
            `torch.Tensor` of shape `(N, H)` or `None`: the hidden states at these positions. `None` where they can be
            had only inside the strong model's forward.
        """
        if self.on_strong_base and in_zero3(next(self.model.parameters())):
            # ZeRO-3 expects the modules in the order of the last steps, which a forward of its own would upset
            return None
        with self.activated() as model:
            return model(**inputs, positions=positions)["value"]

    def inside_forward(
        self,
        inputs: dict[str, Any],
        positions: Tensor,
        hidden: Tensor | None,
        function: Callable[[Tensor, LMHead], T],
    ) -> T:
        """
        The rest of it, inside the strong model's forward.

        Args:
            inputs (`dict[str, Any]`), positions (`torch.Tensor` of shape `(N,)`):
                As before the forward.
            hidden (`torch.Tensor` of shape `(N, H)`, *optional*):
                The hidden states, if they are known.
            function (`Callable`):
                Called with the weak hidden states and the weak LM head, where that can be reached.

        Returns:
            What the function returns.
        """
        if hidden is None:
            with self.activated() as model:
                hidden = backbone_states(model, inputs, positions)
        return function(hidden, self.lm_head())

    def logits(self, inputs: dict[str, Any]) -> Tensor:
        """The weak logits of a training step, of shape `(B, L, V)`, for a model whose LM head cannot be reached."""
        with self.activated() as model:
            return model(**inputs).logits

    def current_fingerprint(self) -> str:
        """Identity of the weights as they are now; `fingerprint` is that of the start."""
        return fingerprint(self._parameters())

    def _parameters(self) -> dict[str, nn.Parameter]:
        return parameters_at_rest(self.model)


def backbone_states(model: nn.Module, inputs: dict[str, Any], positions: Tensor) -> Tensor:
    """Hidden states of a model that is in the middle of its forward: its backbone is run again."""
    outputs = unwrap_adapter(model).base_model(**inputs | {"use_cache": False})
    return outputs.last_hidden_state.flatten(0, 1)[positions]
