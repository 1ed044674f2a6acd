"""
The mixed-logit loss of Weak-Driven Learning (arXiv 2602.08222).

    z_mix = λ z_strong + (1 - λ) z_weak
    loss  = a CE(z_strong, y) + (1 - a) CE(z_mix, y)            (a = 0 in the paper)

    ∂loss/∂z_strong = a (P_strong - e_y) + (1 - a) λ (P_mix - e_y)
    ∂loss/∂z_weak   = (1 - a) (1 - λ) (P_mix - e_y)

`loss_type="dft"` weighs each cross-entropy by the probability of its target: the one of the anchor by P_strong(y), the
mixed one by P_mix(y). No gradient passes through these. At λ = 1 it is Dynamic Fine-Tuning (arXiv 2508.05629).

The label stays the target. The weak model is never imitated: it gives probability back to plausible wrong tokens.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .options import MixOptions
from .tiles import (
    GradientInForward,
    matmul_dtype,
    mix_hidden_states,
    mix_logits,
)


@dataclass
class MixedLossOutput:
    """
    A mixed loss and the detached per-token statistics that training logs, all zero on ignored positions.

    Args:
        loss (`torch.Tensor` of shape `()`):
            `a CE(z_strong) + (1 - a) CE(z_mix)` in nats, each term weighted as `loss_type` says. It is the sum over
            valid targets, divided by `num_items`.
        strong_log_probs, mixed_log_probs (`torch.Tensor` of shape `(N,)`):
            Log-probability of the target under the strong logits and under the mixed logits.
        strong_entropy, weak_entropy, mixed_entropy (`torch.Tensor` of shape `(N,)`):
            Entropy of each distribution in nats.
        is_top1 (`torch.Tensor` of shape `(N,)`):
            Whether the target is the strong model's most probable token.
        mask (`torch.Tensor` of shape `(N,)`):
            Whether the position has a target.
        strong_logit_mean, weak_logit_mean (`torch.Tensor` of shape `(N,)`, *optional*):
            Mean of the logits over the vocabulary. It may drift without any effect.
        strong_logit_norm, weak_logit_norm (`torch.Tensor` of shape `(N,)`, *optional*):
            Norm of the centered logits, `||z - mean(z)||_2`: how sharp they are, whatever their mean.
    """

    loss: Tensor
    strong_log_probs: Tensor
    mixed_log_probs: Tensor
    strong_entropy: Tensor
    weak_entropy: Tensor
    mixed_entropy: Tensor
    is_top1: Tensor
    mask: Tensor
    strong_logit_mean: Tensor | None = None
    weak_logit_mean: Tensor | None = None
    strong_logit_norm: Tensor | None = None
    weak_logit_norm: Tensor | None = None


def mixed_cross_entropy(
    strong_logits: Tensor,
    weak_logits: Tensor,
    targets: Tensor,
    mixing_lambda: float,
    num_items: Tensor | int | None = None,
    ignore_index: int = -100,
    anchor_weight: float = 0.0,
    loss_type: str = "nll",
) -> Tensor:
    """
    Mixed-logit cross-entropy of Weak-Driven Learning.

    Args:
        strong_logits (`torch.Tensor` of shape `(N, V)`):
            Logits of the model being trained.
        weak_logits (`torch.Tensor` of shape `(N, V)`):
            Logits of the weak model. They receive a gradient only if they require one.
        targets (`torch.Tensor` of shape `(N,)`):
            Target token ids; positions equal to `ignore_index` do not count.
        mixing_lambda (`float`):
            Weight of the strong logits in the mix.
        num_items (`torch.Tensor` or `int`, *optional*):
            What the summed loss is divided by: the number of targets in the whole accumulated batch. Defaults to the
            number of valid targets.
        ignore_index (`int`, *optional*, defaults to `-100`):
            Target value that marks ignored positions.
        anchor_weight (`float`, *optional*, defaults to `0.0`):
            Weight `a` of the strong model's own cross-entropy.
        loss_type (`str`, *optional*, defaults to `"nll"`):
            `"nll"`, or `"dft"` to weigh each token's cross-entropy by the detached probability of its target: `a
            P_strong(y) CE(z_strong) + (1 - a) P_mix(y) CE(z_mix)`.

    Returns:
        `torch.Tensor` of shape `()`: the loss in nats, differentiable zero if every target is ignored.

    Raises:
        ValueError: If the logits differ in shape, or `loss_type` is unknown.
    """
    return mixed_loss(
        strong_logits, weak_logits, targets, mixing_lambda, num_items, ignore_index, anchor_weight, loss_type
    ).loss


def mixed_loss(
    strong_logits: Tensor,
    weak_logits: Tensor,
    targets: Tensor,
    mixing_lambda: float,
    num_items: Tensor | int | None = None,
    ignore_index: int = -100,
    anchor_weight: float = 0.0,
    loss_type: str = "nll",
) -> MixedLossOutput:
    """Like [`mixed_cross_entropy`], and returns the per-token statistics with the loss as a [`MixedLossOutput`]."""
    if strong_logits.shape != weak_logits.shape:
        raise ValueError(
            f"`strong_logits` {tuple(strong_logits.shape)} and `weak_logits` {tuple(weak_logits.shape)} must have the "
            "same shape: both models must share one vocabulary."
        )
    options = MixOptions(mixing_lambda, anchor_weight, ignore_index, torch.is_grad_enabled(), loss_type=loss_type)
    loss, *statistics = GradientInForward.apply(mix_logits, options, strong_logits, weak_logits, targets)
    mask = targets != ignore_index
    num_items = mask.sum() if num_items is None else torch.as_tensor(num_items, device=loss.device)
    return MixedLossOutput(loss / num_items.clamp(min=1), *statistics, mask=mask)


def linear_mixed_cross_entropy(
    strong_hidden: Tensor,
    strong_weight: Tensor,
    weak_hidden: Tensor,
    weak_weight: Tensor,
    targets: Tensor,
    mixing_lambda: float,
    strong_bias: Tensor | None = None,
    weak_bias: Tensor | None = None,
    num_items: Tensor | int | None = None,
    ignore_index: int | None = -100,
    anchor_weight: float = 0.0,
    *,
    strong_scale: float = 1.0,
    weak_scale: float = 1.0,
    strong_softcap: float | None = None,
    weak_softcap: float | None = None,
    buffer_bytes: int | None = None,
    logit_statistics: bool = False,
    loss_type: str = "nll",
) -> MixedLossOutput:
    """
    [`mixed_cross_entropy`] from hidden states and LM heads. The logits exist one tile of tokens at a time.

    The gradients are computed in the forward, while a tile's logits are there. The backward only scales them by the
    upstream gradient. With a frozen weak model this takes 4 matrix products with the vocabulary, as many as in TRL's
    fused SFT head. Products run in the autocast dtype, or without autocast in the dtype of the hidden states. The rest
    is float32.

    Args:
        strong_hidden (`torch.Tensor` of shape `(N, H_s)`), weak_hidden (`torch.Tensor` of shape `(N, H_w)`):
            Last hidden states. Only positions with a target are projected.
        strong_weight (`torch.Tensor` of shape `(V, H_s)`), weak_weight (`torch.Tensor` of shape `(V, H_w)`):
            Weights of the LM heads.
        targets (`torch.Tensor` of shape `(N,)`):
            Target token ids. Positions equal to `ignore_index` do not count. `ignore_index=None` promises that all
            count. That saves a GPU one synchronisation.
        mixing_lambda (`float`):
            Weight of the strong logits in the mix.
        strong_bias, weak_bias (`torch.Tensor` of shape `(V,)`, *optional*):
            Biases of the LM heads.
        num_items, ignore_index, anchor_weight:
            See [`mixed_cross_entropy`].
        strong_scale, weak_scale (`float`, *optional*, defaults to `1.0`):
            What each model multiplies its logits by (Cohere's `logit_scale`, the inverse of Granite's
            `logits_scaling`).
        strong_softcap, weak_softcap (`float`, *optional*):
            Soft cap `c` of each model's logits, `c tanh(z / c)` (Gemma's `final_logit_softcapping`).
        buffer_bytes (`int`, *optional*):
            Memory for the tiles of logits. At least one token's logits are held. Defaults to 256 MiB on a CPU, and on
            a GPU to [`~wmss_trl.losses.buffer.default_buffer_bytes`].
        logit_statistics (`bool`, *optional*, defaults to `False`):
            Whether to return the means and the centered norms of the logits too.
        loss_type:
            See [`mixed_cross_entropy`].

    Returns:
        [`MixedLossOutput`]: the loss and the statistics of each position. The loss is a differentiable zero if every
        target is ignored. Only inputs that require a gradient get one, and only they cost work.

    Raises:
        ValueError: If `loss_type` is unknown.
    """
    options = MixOptions(
        mixing_lambda=mixing_lambda,
        anchor_weight=anchor_weight,
        ignore_index=ignore_index,
        scales=(strong_scale, weak_scale),
        softcaps=(strong_softcap, weak_softcap),
        buffer_bytes=buffer_bytes,
        dtype=matmul_dtype(strong_hidden),
        grad_enabled=torch.is_grad_enabled(),
        logit_statistics=logit_statistics,
        loss_type=loss_type,
    )
    mask = torch.ones_like(targets, dtype=torch.bool) if ignore_index is None else targets != ignore_index
    num_items = mask.sum() if num_items is None else torch.as_tensor(num_items, device=strong_hidden.device)
    loss, *statistics, is_top1 = GradientInForward.apply(
        mix_hidden_states,
        options,
        strong_hidden,
        strong_weight,
        strong_bias,
        weak_hidden,
        weak_weight,
        weak_bias,
        targets,
    )
    # Divided here and not in the tiles. In float16 the gradients of a large batch would underflow there, before the
    # factor of a loss scaler reaches them
    loss = loss / num_items.clamp(min=1)
    return MixedLossOutput(loss, *statistics[:5], is_top1, mask, *statistics[5:])
