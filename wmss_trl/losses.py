"""
The mixed-logit loss of Weak-Driven Learning (arXiv 2602.08222).

    z_mix = λ z_strong + (1 - λ) z_weak
    loss  = a CE(z_strong, y) + (1 - a) CE(z_mix, y)            (a = 0 in the paper)

    ∂loss/∂z_strong = a (P_strong - e_y) + (1 - a) λ (P_mix - e_y)
    ∂loss/∂z_weak   = (1 - a) (1 - λ) (P_mix - e_y)

The label stays the target: the weak model is never imitated, it gives probability back to plausible wrong tokens.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

# Size of one float32 tile of logits. The handful of tiles alive at a time is all the memory the functions below need
# besides the gradient itself.
_TILE_BYTES = 64 * 2**20


@dataclass
class MixedLossOutput:
    """
    A mixed loss and the detached per-token statistics that training logs, all zero on ignored positions.

    Args:
        loss (`torch.Tensor` of shape `()`):
            `a CE(z_strong) + (1 - a) CE(z_mix)` in nats: the sum over valid targets, divided by `num_items`.
        strong_log_probs, mixed_log_probs (`torch.Tensor` of shape `(N,)`):
            Log-probability of the target under the strong logits and under the mixed logits.
        strong_entropy, weak_entropy, mixed_entropy (`torch.Tensor` of shape `(N,)`):
            Entropy of each distribution in nats.
        is_top1 (`torch.Tensor` of shape `(N,)`):
            Whether the target is the strong model's most probable token.
        mask (`torch.Tensor` of shape `(N,)`):
            Whether the position has a target.
    """

    loss: Tensor
    strong_log_probs: Tensor
    mixed_log_probs: Tensor
    strong_entropy: Tensor
    weak_entropy: Tensor
    mixed_entropy: Tensor
    is_top1: Tensor
    mask: Tensor


def mixed_cross_entropy(
    strong_logits: Tensor,
    weak_logits: Tensor,
    targets: Tensor,
    mixing_lambda: float,
    num_items: Tensor | int | None = None,
    ignore_index: int = -100,
    anchor_weight: float = 0.0,
) -> Tensor:
    """
    Mixed-logit cross-entropy of Weak-Driven Learning.

    Args:
        strong_logits (`torch.Tensor` of shape `(N, V)`):
            Logits of the model being trained.
        weak_logits (`torch.Tensor` of shape `(N, V)`):
            Logits of the weak reference. They receive a gradient only if they require one.
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

    Returns:
        `torch.Tensor` of shape `()`: the loss in nats, differentiable zero if every target is ignored.
    """
    return mixed_loss(strong_logits, weak_logits, targets, mixing_lambda, num_items, ignore_index, anchor_weight).loss


def mixed_loss(
    strong_logits: Tensor,
    weak_logits: Tensor,
    targets: Tensor,
    mixing_lambda: float,
    num_items: Tensor | int | None = None,
    ignore_index: int = -100,
    anchor_weight: float = 0.0,
) -> MixedLossOutput:
    """Like [`mixed_cross_entropy`], and returns the per-token statistics with the loss as a [`MixedLossOutput`]."""
    if strong_logits.shape != weak_logits.shape:
        raise ValueError(
            f"`strong_logits` {tuple(strong_logits.shape)} and `weak_logits` {tuple(weak_logits.shape)} must have the "
            "same shape: both models must share one vocabulary."
        )
    loss, *statistics = _MixedCrossEntropy.apply(
        strong_logits, weak_logits, targets, mixing_lambda, anchor_weight, ignore_index
    )
    mask = targets != ignore_index
    num_items = mask.sum() if num_items is None else torch.as_tensor(num_items, device=loss.device)
    return MixedLossOutput(loss / num_items.clamp(min=1), *statistics, mask=mask)


class _MixedCrossEntropy(torch.autograd.Function):
    """
    Sum of the mixed loss over the valid targets, tile by tile over the tokens.

    Besides the logits that the models have built, the gradient is the only `(N, V)` tensor that is ever allocated, and
    only in the backward, where the softmaxes are computed anew.
    """

    @staticmethod
    def forward(ctx, strong_logits, weak_logits, targets, mixing_lambda, anchor_weight, ignore_index):
        ctx.save_for_backward(strong_logits, weak_logits, targets)
        ctx.mixing_lambda, ctx.anchor_weight, ctx.ignore_index = mixing_lambda, anchor_weight, ignore_index
        dtype = _compute_dtype(strong_logits)
        strong_log_probs, mixed_log_probs, strong_entropy, weak_entropy, mixed_entropy = (
            torch.zeros(len(targets), dtype=dtype, device=strong_logits.device) for _ in range(5)
        )
        is_top1 = torch.zeros(len(targets), dtype=torch.bool, device=strong_logits.device)

        for rows in _valid_tiles(targets != ignore_index, strong_logits.size(-1)):
            y = targets[rows].unsqueeze(-1)
            z_strong, z_weak = strong_logits[rows].to(dtype), weak_logits[rows].to(dtype)
            z_mix = torch.lerp(z_weak, z_strong, mixing_lambda)
            is_top1[rows] = z_strong.argmax(-1) == y.squeeze(-1)
            weak_entropy[rows] = _entropy(z_weak.softmax(-1))
            for z, log_probs, entropy in (
                (z_strong, strong_log_probs, strong_entropy),
                (z_mix, mixed_log_probs, mixed_entropy),
            ):
                log_p = z.log_softmax(-1)
                log_probs[rows] = log_p.gather(-1, y).squeeze(-1)
                entropy[rows] = _entropy(log_p.exp())

        statistics = strong_log_probs, mixed_log_probs, strong_entropy, weak_entropy, mixed_entropy, is_top1
        ctx.mark_non_differentiable(*statistics)
        loss = -(anchor_weight * strong_log_probs + (1 - anchor_weight) * mixed_log_probs).sum()
        return loss, *statistics

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, loss_grad, *_):
        strong_logits, weak_logits, targets = ctx.saved_tensors
        mixing_lambda, anchor_weight = ctx.mixing_lambda, ctx.anchor_weight
        strong_grad = torch.zeros_like(strong_logits) if ctx.needs_input_grad[0] else None
        weak_grad = torch.zeros_like(weak_logits) if ctx.needs_input_grad[1] else None
        dtype = _compute_dtype(strong_logits)

        for rows in _valid_tiles(targets != ctx.ignore_index, strong_logits.size(-1)):
            y = targets[rows].unsqueeze(-1)
            z_strong, z_weak = strong_logits[rows].to(dtype), weak_logits[rows].to(dtype)
            g_mix = _softmax_minus_onehot(torch.lerp(z_weak, z_strong, mixing_lambda), y)
            g_mix *= (1 - anchor_weight) * loss_grad
            if weak_grad is not None:
                weak_grad[rows] = ((1 - mixing_lambda) * g_mix).to(weak_grad.dtype)
            if strong_grad is not None:
                g_strong = mixing_lambda * g_mix
                if anchor_weight:
                    g_strong += anchor_weight * loss_grad * _softmax_minus_onehot(z_strong, y)
                strong_grad[rows] = g_strong.to(strong_grad.dtype)
        return strong_grad, weak_grad, None, None, None, None


def token_entropy(logits: Tensor, mask: Tensor) -> Tensor:
    """
    Predictive entropy of each masked-in position, `H = -sum_v P(v) log P(v)`.

    Args:
        logits (`torch.Tensor` of shape `(N, V)`):
            Logits, in any floating dtype; computed in float32 (float64 for float64 logits).
        mask (`torch.Tensor` of shape `(N,)`):
            Positions to score.

    Returns:
        `torch.Tensor` of shape `(N,)`: entropies in nats, zero where `mask` is false.
    """
    dtype = _compute_dtype(logits)
    entropy = torch.zeros(len(logits), dtype=dtype, device=logits.device)
    for rows in _valid_tiles(mask, logits.size(-1)):
        entropy[rows] = _entropy(logits[rows].to(dtype).softmax(-1))
    return entropy


def next_token_targets(labels: Tensor, ignore_index: int = -100) -> Tensor:
    """
    Targets of each position under the causal shift: the logits at position t-1 predict the token at t.

    Args:
        labels (`torch.Tensor` of shape `(batch, sequence)`):
            Labels as the data collator returns them.
        ignore_index (`int`, *optional*, defaults to `-100`):
            Target given to the last position, which predicts nothing.

    Returns:
        `torch.Tensor` of shape `(batch * sequence,)`: the targets of the flattened logits, so that these need no
        shifted copy.
    """
    return torch.nn.functional.pad(labels[:, 1:], (0, 1), value=ignore_index).reshape(-1)


def _softmax_minus_onehot(logits: Tensor, targets: Tensor) -> Tensor:
    return logits.softmax(-1).scatter_add_(-1, targets, -torch.ones_like(targets, dtype=logits.dtype))


def _entropy(probs: Tensor) -> Tensor:
    # `entr` is -p log p, and 0 at p = 0
    return torch.special.entr(probs).sum(-1)


def _compute_dtype(logits: Tensor) -> torch.dtype:
    return logits.dtype if logits.dtype == torch.float64 else torch.float32


def _valid_tiles(mask: Tensor, vocab_size: int) -> Iterator[Tensor]:
    return iter(mask.nonzero().squeeze(-1).split(max(1, _TILE_BYTES // (4 * vocab_size))))
