"""
Triton kernels of the fused mixed loss: what [`~wmss_trl.losses.linear_mixed_cross_entropy`] does to a tile of logits.

cuBLAS computes the products with the LM heads. One kernel reads both tiles once and folds them into the online softmax
statistics of the three distributions. A second one overwrites the tiles with the gradients.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .options import MixOptions

_BLOCK_SIZE = 1024
# Neighbouring logits that one lane of the statistics reads at a time: 16 bytes of them in 16 bits
_LANE_WIDTH = 8
# Stands for a logit that is not there. Its exponential is 0. It is finite, because 0 times infinity would be NaN
_NO_LOGIT = tl.constexpr(-1e30)


@triton.jit
def _exp(x):
    return tl.exp2(1.4426950408889634 * x)


@triton.jit
def _transform(z, scale, softcap, HAS_SOFTCAP: tl.constexpr):
    z = z * scale
    if HAS_SOFTCAP:
        z = softcap * (2 * tl.sigmoid(z * (2 / softcap)) - 1)  # tanh
    return z


@triton.jit
def _fold(z, lane_max, sum_exp, sum_exp_d):
    """Fold a block of logits `(lanes, columns)` into lanes' maxima, `sum exp(d)` and `sum exp(d) d`; `d = z - max`."""
    new_max = tl.maximum(lane_max, tl.max(z, axis=1))
    shift = lane_max - new_max
    rescale = _exp(shift)
    d = z - new_max[:, None]
    e = _exp(d)
    sum_exp_d = (sum_exp_d + shift * sum_exp) * rescale + tl.sum(e * d, axis=1)
    return new_max, sum_exp * rescale + tl.sum(e, axis=1), sum_exp_d


@triton.jit
def _combine(lane_max, sum_exp, sum_exp_d):
    """Maximum of a row, log-normaliser beyond that maximum, and entropy, from what its lanes have seen."""
    row_max = tl.max(lane_max, axis=0)
    shift = lane_max - row_max
    weight = _exp(shift)
    row_sum = tl.sum(sum_exp * weight, axis=0)
    log_sum = tl.log(row_sum)
    return row_max, log_sum, log_sum - tl.sum((sum_exp_d + shift * sum_exp) * weight, axis=0) / row_sum


@triton.jit
def _sum(x):
    return tl.sum(tl.sum(x, axis=1), axis=0)


@triton.jit
def _fold_moments(z, mask, count, mean, squares):
    """Fold a block of logits into their mean and sum of squared deviations (Chan et al., 1979)."""
    block_count = _sum(mask.to(tl.float32))
    block_mean = _sum(tl.where(mask, z, 0.0)) / block_count
    deviation = tl.where(mask, z - block_mean, 0.0)
    delta = block_mean - mean
    share = block_count / (count + block_count)
    return mean + delta * share, squares + _sum(deviation * deviation) + delta * delta * count * share


@triton.jit
def _statistics_kernel(
    strong_ptr,
    weak_ptr,
    stride,
    targets_ptr,
    strong_log_probs_ptr,
    mixed_log_probs_ptr,
    strong_entropy_ptr,
    weak_entropy_ptr,
    mixed_entropy_ptr,
    strong_mean_ptr,
    weak_mean_ptr,
    strong_norm_ptr,
    weak_norm_ptr,
    is_top1_ptr,
    strong_log_z_ptr,
    mixed_log_z_ptr,
    vocab_size,
    mixing_lambda,
    strong_scale,
    weak_scale,
    strong_softcap,
    weak_softcap,
    STRONG_HAS_SOFTCAP: tl.constexpr,
    WEAK_HAS_SOFTCAP: tl.constexpr,
    HAS_MOMENTS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    LANE_WIDTH: tl.constexpr,
):
    # One program per token. Each lane keeps statistics of its own columns. They meet once, after the last block:
    # reductions over a whole block would take most of the time
    # Before PyTorch 2.15, `torch.compile` passes Python floats as fp64
    mixing_lambda = tl.cast(mixing_lambda, tl.float32)
    strong_scale = tl.cast(strong_scale, tl.float32)
    weak_scale = tl.cast(weak_scale, tl.float32)
    strong_softcap = tl.cast(strong_softcap, tl.float32)
    weak_softcap = tl.cast(weak_softcap, tl.float32)
    NUM_LANES: tl.constexpr = BLOCK_SIZE // LANE_WIDTH
    row = tl.program_id(0).to(tl.int64)
    strong_row, weak_row = strong_ptr + row * stride, weak_ptr + row * stride
    target = tl.load(targets_ptr + row)
    s_max = tl.full((NUM_LANES,), _NO_LOGIT, tl.float32)
    w_max, m_max, max_before_target = s_max, s_max, s_max
    s_sum = tl.zeros((NUM_LANES,), tl.float32)
    w_sum, m_sum, s_sum_d, w_sum_d, m_sum_d = s_sum, s_sum, s_sum, s_sum, s_sum
    s_mean, w_mean, s_squares, w_squares = 0.0, 0.0, 0.0, 0.0
    columns = tl.arange(0, NUM_LANES)[:, None] * LANE_WIDTH + tl.arange(0, LANE_WIDTH)[None, :]
    for start in range(0, vocab_size, BLOCK_SIZE):
        offsets = start + columns
        mask = offsets < vocab_size
        z_strong = tl.load(strong_row + offsets, mask=mask, other=0.0).to(tl.float32)
        z_weak = tl.load(weak_row + offsets, mask=mask, other=0.0).to(tl.float32)
        z_strong = _transform(z_strong, strong_scale, strong_softcap, STRONG_HAS_SOFTCAP)
        z_weak = _transform(z_weak, weak_scale, weak_softcap, WEAK_HAS_SOFTCAP)
        if HAS_MOMENTS:
            s_mean, s_squares = _fold_moments(z_strong, mask, start, s_mean, s_squares)
            w_mean, w_squares = _fold_moments(z_weak, mask, start, w_mean, w_squares)
        z_strong, z_weak = tl.where(mask, z_strong, _NO_LOGIT), tl.where(mask, z_weak, _NO_LOGIT)
        z_mix = z_weak + mixing_lambda * (z_strong - z_weak)
        s_max, s_sum, s_sum_d = _fold(z_strong, s_max, s_sum, s_sum_d)
        w_max, w_sum, w_sum_d = _fold(z_weak, w_max, w_sum, w_sum_d)
        m_max, m_sum, m_sum_d = _fold(z_mix, m_max, m_sum, m_sum_d)
        # Up to the last block that ends before the target. The columns between are looked at below
        max_before_target = tl.where(start + BLOCK_SIZE <= target, s_max, max_before_target)

    s_target = _transform(
        tl.load(strong_row + target).to(tl.float32), strong_scale, strong_softcap, STRONG_HAS_SOFTCAP
    )
    w_target = _transform(tl.load(weak_row + target).to(tl.float32), weak_scale, weak_softcap, WEAK_HAS_SOFTCAP)
    m_target = w_target + mixing_lambda * (s_target - w_target)
    s_row_max, s_log_sum, s_entropy = _combine(s_max, s_sum, s_sum_d)
    _, _, w_entropy = _combine(w_max, w_sum, w_sum_d)
    m_row_max, m_log_sum, m_entropy = _combine(m_max, m_sum, m_sum_d)
    tl.store(strong_log_probs_ptr + row, s_target - s_row_max - s_log_sum)
    tl.store(mixed_log_probs_ptr + row, m_target - m_row_max - m_log_sum)
    tl.store(strong_entropy_ptr + row, s_entropy)
    tl.store(weak_entropy_ptr + row, w_entropy)
    tl.store(mixed_entropy_ptr + row, m_entropy)
    if HAS_MOMENTS:
        tl.store(strong_mean_ptr + row, s_mean)
        tl.store(weak_mean_ptr + row, w_mean)
        tl.store(strong_norm_ptr + row, tl.sqrt(s_squares))
        tl.store(weak_norm_ptr + row, tl.sqrt(w_squares))
    # Of equal maxima the first counts, as for `argmax`
    offsets = target // BLOCK_SIZE * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    z_before = tl.load(strong_row + offsets, mask=offsets < target, other=0.0).to(tl.float32)
    z_before = _transform(z_before, strong_scale, strong_softcap, STRONG_HAS_SOFTCAP)
    max_in_block = tl.max(tl.where(offsets < target, z_before, -float("inf")), axis=0)
    max_before = tl.maximum(tl.max(max_before_target, axis=0), max_in_block)
    tl.store(is_top1_ptr + row, (s_target >= s_row_max) & (s_target > max_before))
    tl.store(strong_log_z_ptr + row, s_row_max + s_log_sum)
    tl.store(mixed_log_z_ptr + row, m_row_max + m_log_sum)


@triton.jit
def _gradient_kernel(
    strong_ptr,
    weak_ptr,
    stride,
    targets_ptr,
    strong_log_probs_ptr,
    mixed_log_probs_ptr,
    strong_log_z_ptr,
    mixed_log_z_ptr,
    vocab_size,
    mixing_lambda,
    anchor_weight,
    strong_scale,
    weak_scale,
    strong_softcap,
    weak_softcap,
    STRONG_HAS_SOFTCAP: tl.constexpr,
    WEAK_HAS_SOFTCAP: tl.constexpr,
    HAS_ANCHOR: tl.constexpr,
    IS_DFT: tl.constexpr,
    NEEDS_WEAK: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    # One program per token and block of the vocabulary. Overwrites the products with their gradients
    # Before PyTorch 2.15, `torch.compile` passes Python floats as fp64
    mixing_lambda = tl.cast(mixing_lambda, tl.float32)
    anchor_weight = tl.cast(anchor_weight, tl.float32)
    strong_scale = tl.cast(strong_scale, tl.float32)
    weak_scale = tl.cast(weak_scale, tl.float32)
    strong_softcap = tl.cast(strong_softcap, tl.float32)
    weak_softcap = tl.cast(weak_softcap, tl.float32)
    row = tl.program_id(0).to(tl.int64)
    offsets = tl.program_id(1) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    mask = offsets < vocab_size
    strong_ptrs, weak_ptrs = strong_ptr + row * stride + offsets, weak_ptr + row * stride + offsets
    z_strong = tl.load(strong_ptrs, mask=mask, other=0.0).to(tl.float32)
    z_weak = tl.load(weak_ptrs, mask=mask, other=0.0).to(tl.float32)
    z_strong = _transform(z_strong, strong_scale, strong_softcap, STRONG_HAS_SOFTCAP)
    z_weak = _transform(z_weak, weak_scale, weak_softcap, WEAK_HAS_SOFTCAP)
    z_mix = z_weak + mixing_lambda * (z_strong - z_weak)
    one_hot = (offsets == tl.load(targets_ptr + row)).to(tl.float32)
    g_mix = (1 - anchor_weight) * (_exp(z_mix - tl.load(mixed_log_z_ptr + row)) - one_hot)
    if IS_DFT:
        g_mix *= _exp(tl.load(mixed_log_probs_ptr + row))
    g_strong = mixing_lambda * g_mix
    if HAS_ANCHOR:
        g_anchor = anchor_weight * (_exp(z_strong - tl.load(strong_log_z_ptr + row)) - one_hot)
        if IS_DFT:
            g_anchor *= _exp(tl.load(strong_log_probs_ptr + row))
        g_strong += g_anchor
    if STRONG_HAS_SOFTCAP:
        g_strong *= 1 - z_strong * z_strong * (1 / (strong_softcap * strong_softcap))
    tl.store(strong_ptrs, (g_strong * strong_scale).to(strong_ptr.dtype.element_ty), mask=mask)
    if NEEDS_WEAK:
        g_weak = (1 - mixing_lambda) * g_mix
        if WEAK_HAS_SOFTCAP:
            g_weak *= 1 - z_weak * z_weak * (1 / (weak_softcap * weak_softcap))
        tl.store(weak_ptrs, (g_weak * weak_scale).to(weak_ptr.dtype.element_ty), mask=mask)


def mix_tile(
    z_strong: Tensor,
    z_weak: Tensor,
    targets: Tensor,
    statistics: Tensor,
    is_top1: Tensor,
    options: MixOptions,
    needs_strong: bool,
    needs_weak: bool,
) -> None:
    """The counterpart of `tiles._mix_tile`, with the same arguments."""
    num_rows, vocab_size = z_strong.shape
    strong_log_z, mixed_log_z = torch.empty(2, num_rows, dtype=torch.float32, device=z_strong.device)
    moments = statistics[5:] if options.logit_statistics else [strong_log_z] * 4  # unused pointers still need a tensor
    head = {
        "strong_scale": options.scales[0],
        "weak_scale": options.scales[1],
        "strong_softcap": options.softcaps[0] or 1.0,
        "weak_softcap": options.softcaps[1] or 1.0,
        "STRONG_HAS_SOFTCAP": options.softcaps[0] is not None,
        "WEAK_HAS_SOFTCAP": options.softcaps[1] is not None,
        "BLOCK_SIZE": _BLOCK_SIZE,
    }
    _statistics_kernel[(num_rows,)](
        z_strong,
        z_weak,
        z_strong.stride(0),
        targets,
        *statistics[:5],
        *moments,
        is_top1,
        strong_log_z,
        mixed_log_z,
        vocab_size,
        options.mixing_lambda,
        HAS_MOMENTS=options.logit_statistics,
        LANE_WIDTH=_LANE_WIDTH,
        **head,
    )
    if needs_strong or needs_weak:
        _gradient_kernel[(num_rows, triton.cdiv(vocab_size, _BLOCK_SIZE))](
            z_strong,
            z_weak,
            z_strong.stride(0),
            targets,
            *statistics[:2],
            strong_log_z,
            mixed_log_z,
            vocab_size,
            options.mixing_lambda,
            options.anchor_weight,
            HAS_ANCHOR=options.anchor_weight > 0,
            IS_DFT=options.loss_type == "dft",
            NEEDS_WEAK=needs_weak,
            **head,
        )
