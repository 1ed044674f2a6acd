"""Where weak logits come from: what a training step and the scoring ask of a weak model."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, TypeVar

from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn

from ..distributed.sharding import in_zero3, parameters_at_rest
from ..modeling.fingerprint import fingerprint
from ..modeling.lm_head import LMHead, lm_head_of
from ..modeling.modes import unwrap_adapter

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
            Only for a weak model that stands for the strong one as handed in. Whether the strong model still has the
            same outputs when training starts.
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
        """The weak model's LM head, as this process holds it. See [`~wmss_trl.modeling.lm_head.whole_lm_head`]."""
        with self.activated() as model:
            return lm_head_of(unwrap_adapter(extract_model_from_parallel(model)))

    def keep_only_lm_head(self) -> None:  # noqa: B027
        """Free the memory of all but the LM head, if possible. For hidden states that are read from a cache."""

    def before_forward(self, inputs: dict[str, Any], positions: Tensor) -> Tensor | None:
        """
        What a training step can do with the weak model before the strong model's forward. Its memory is free again by
        then.

        Args:
            inputs (`dict[str, Any]`):
                Inputs of a forward.
            positions (`torch.Tensor` of shape `(N,)`):
                Flat indices of the supervised positions.

        Returns:
            `torch.Tensor` of shape `(N, H)` or `None`: the hidden states at these positions. `None` if they can only
            be computed inside the strong model's forward.
        """
        if self.on_strong_base and in_zero3(next(self.model.parameters())):
            # ZeRO-3 expects the modules in the order of the last steps. A separate forward would break that order
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
        What a training step does with the weak model inside the strong model's forward.

        Args:
            inputs (`dict[str, Any]`), positions (`torch.Tensor` of shape `(N,)`):
                See [`before_forward`].
            hidden (`torch.Tensor` of shape `(N, H)`, *optional*):
                The hidden states, if they are known.
            function (`Callable`):
                Called with the weak hidden states and the weak LM head. It may use the head.

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
        """Identity of the weights as they are now. `fingerprint` is their identity at the start."""
        return fingerprint(self._parameters())

    def _parameters(self) -> dict[str, nn.Parameter]:
        return parameters_at_rest(self.model)


def backbone_states(model: nn.Module, inputs: dict[str, Any], positions: Tensor) -> Tensor:
    """Run the backbone of a model that is in the middle of its forward once more, for its hidden states."""
    outputs = unwrap_adapter(model).base_model(**inputs | {"use_cache": False})
    return outputs.last_hidden_state.flatten(0, 1)[positions]
