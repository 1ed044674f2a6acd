"""The mixed step: from the hidden states of both models to the mixed loss, and what is logged of it."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..losses import MixedLossOutput, linear_mixed_cross_entropy
from ..modeling.lm_head import LMHead, whole_lm_head
from ..weak_model.base import WeakModel


class MixedHead:
    """
    What takes the place of the strong model's LM head in a weak-driven step. It is called inside the strong model's
    forward, with its hidden states. There it can use the heads under FSDP2 and ZeRO-3 too.

    Args:
        weak_model ([`~wmss_trl.weak_model.base.WeakModel`]):
            The weak model.
        inputs (`dict[str, Any]`):
            Inputs of a forward.
        positions (`torch.Tensor` of shape `(N,)`):
            Flat indices of the supervised positions.
        weak_hidden (`torch.Tensor` of shape `(N, H)`, *optional*):
            The weak model's hidden states there, if they are known before the strong model's forward.
        options:
            What else [`~wmss_trl.losses.linear_mixed_cross_entropy`] takes.

    Attributes:
        output ([`~wmss_trl.losses.MixedLossOutput`]):
            The loss of the last call and the statistics of its tokens.
    """

    def __init__(
        self,
        weak_model: WeakModel,
        inputs: dict[str, Any],
        positions: Tensor,
        weak_hidden: Tensor | None,
        **options: Any,
    ):
        self.weak_model = weak_model
        self.inputs = inputs
        self.positions = positions
        self.weak_hidden = weak_hidden
        self.options = options
        self.output: MixedLossOutput | None = None

    def __call__(self, hidden: Tensor, head: LMHead) -> Tensor:
        mix = partial(self._mix, hidden, head)
        return self.weak_model.inside_forward(self.inputs, self.positions, self.weak_hidden, mix)

    def _mix(self, hidden: Tensor, head: LMHead, weak_hidden: Tensor, weak_head: LMHead) -> Tensor:
        with whole_lm_head(head) as strong, whole_lm_head(weak_head) as weak:
            if not self.weak_model.trained:
                weak = weak.detach()
            self.output = linear_mixed_cross_entropy(
                hidden.to(strong.weight.device),
                strong.weight,
                weak_hidden.to(weak.weight.device),
                weak.weight,
                strong_bias=strong.bias,
                weak_bias=weak.bias,
                strong_scale=strong.scale,
                weak_scale=weak.scale,
                strong_softcap=strong.softcap,
                weak_softcap=weak.softcap,
                ignore_index=None,
                **self.options,
            )
        return self.output.loss

    def output_of(self, loss: Tensor) -> MixedLossOutput:
        """The output, with the loss that the strong model's forward has returned. The gradient must pass through that
        loss. Its value is not used: FSDP2 rounds it under mixed precision."""
        self.output.loss = self.output.loss.detach() + (loss - loss.detach())
        return self.output


@torch.no_grad()
def token_sums(mixed: MixedLossOutput, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """What is logged, summed over the tokens of a batch. SFTTrainer's names are used where it has one. `num_tokens`
    counts all tokens and `items` those that have a target."""
    # Padding-free batches have no attention mask and no padding
    num_tokens = inputs["attention_mask"].sum() if "attention_mask" in inputs else inputs["input_ids"].numel()
    wrong_mass, mixed_wrong_mass = (
        (-torch.expm1(log_probs)).sum() for log_probs in (mixed.strong_log_probs, mixed.mixed_log_probs)
    )
    return {
        "num_tokens": torch.as_tensor(num_tokens, device=mixed.loss.device),
        "items": mixed.mask.sum(),
        "entropy": mixed.strong_entropy.sum(),
        "weak_entropy": mixed.weak_entropy.sum(),
        "mixed_entropy": mixed.mixed_entropy.sum(),
        "strong_nll": -mixed.strong_log_probs.sum(),
        "mixed_nll": -mixed.mixed_log_probs.sum(),
        "mean_token_accuracy": mixed.is_top1.sum(),
        "wrong_mass": wrong_mass,
        "mixed_wrong_mass": mixed_wrong_mass,
    }
