"""Entropy of next-token distributions, from logits or tile by tile from hidden states."""

import torch
from torch import Tensor

from .tiles import block_rows_of, compute_dtype_of, matmul_dtype, project, softmax_statistics, transform_logits_

# Size of a float32 tile of logits
_TILE_BYTES = 64 * 2**20


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
    dtype = compute_dtype_of(logits)
    entropy = torch.zeros(len(logits), dtype=dtype, device=logits.device)
    for rows in mask.nonzero().squeeze(-1).split(max(1, _TILE_BYTES // (4 * logits.size(-1)))):
        # `entr` is -p log p, and 0 at p = 0
        entropy[rows] = torch.special.entr(logits[rows].to(dtype).softmax(-1)).sum(-1)
    return entropy


def linear_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    buffer_bytes: int = 256 * 2**20,
) -> Tensor:
    """
    Predictive entropy from hidden states and LM head, with the logits of one tile of tokens at a time.

    Args:
        hidden (`torch.Tensor` of shape `(N, H)`):
            Last hidden states.
        weight (`torch.Tensor` of shape `(V, H)`), bias (`torch.Tensor` of shape `(V,)`, *optional*):
            LM head.
        scale, softcap:
            See [`~wmss_trl.losses.linear_mixed_cross_entropy`].
        buffer_bytes (`int`, *optional*, defaults to 256 MiB):
            Memory for the tiles.

    Returns:
        `torch.Tensor` of shape `(N,)`: entropies in nats, without gradient.
    """
    dtype, compute_dtype, vocab_size = matmul_dtype(hidden), compute_dtype_of(hidden), weight.size(0)
    on_cpu = hidden.device.type == "cpu"
    if on_cpu:  # to touch new memory costs more there than larger products save
        buffer_bytes = min(buffer_bytes, _TILE_BYTES)
    tile_rows = max(1, buffer_bytes // (2 * vocab_size * compute_dtype.itemsize))
    block_rows = min(tile_rows, block_rows_of(hidden.device, vocab_size)) if on_cpu else tile_rows
    tile = torch.empty(min(tile_rows, len(hidden)), vocab_size, dtype=compute_dtype, device=hidden.device)
    scratch = torch.empty_like(tile[:block_rows])
    entropies = [hidden.new_zeros(0, dtype=compute_dtype)]
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        weight = weight.to(dtype)
        for h in hidden.to(dtype).split(tile_rows):
            logits = transform_logits_(project(tile[: len(h)], h, weight, bias), scale, softcap)
            entropies += [softmax_statistics(z, z, scratch[: len(z)])[0] for z in logits.split(block_rows)]
    return torch.cat(entropies)


def next_token_targets(labels: Tensor, ignore_index: int = -100) -> Tensor:
    """
    Targets of each position under the causal shift: the logits at position t-1 predict the token at t.

    Args:
        labels (`torch.Tensor` of shape `(batch, sequence)`):
            Labels as the data collator returns them.
        ignore_index (`int`, *optional*, defaults to `-100`):
            Target of the last position. That one predicts nothing.

    Returns:
        `torch.Tensor` of shape `(batch * sequence,)`: the targets of the flattened logits. The logits need no shifted
        copy.
    """
    return torch.nn.functional.pad(labels[:, 1:], (0, 1), value=ignore_index).reshape(-1)
