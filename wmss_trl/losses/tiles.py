"""
Tiles of logits: how the mixed loss is computed, a few rows at a time, with its gradients.

The logits that exist at a time fit a buffer, however large the batch is. On a CPU the rows at work also fit its cache.
"""

from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from math import ceil

import torch
from torch import Tensor

from .buffer import default_buffer_bytes
from .options import MixOptions

# Rows that a CPU takes through all operations on logits at a time: few enough to stay in its cache in between
_BLOCK_ROWS = 16
# It comes with the CUDA builds of PyTorch
_TRITON_AVAILABLE = find_spec("triton") is not None


class GradientInForward(torch.autograd.Function):
    """
    Applies `compute(*tensors, options, needs_grad)`. That returns the summed loss, the statistics and the gradients
    that are needed, for an upstream gradient of 1.
    """

    @staticmethod
    def forward(ctx, compute, options, *tensors):
        needs_grad = ctx.needs_input_grad[2:] if options.grad_enabled else (False,) * len(tensors)
        loss, statistics, grads = compute(*tensors, options, needs_grad)
        ctx.save_for_backward(*tensors)
        ctx.compute, ctx.options, ctx.grads = compute, options, grads
        # The saved tensors cannot be asked in the backward: an engine that shards weights may have released them
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in tensors]
        ctx.mark_non_differentiable(*statistics)
        return loss, *statistics

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, loss_grad, *_):
        if ctx.grads is None:  # a second backward through a retained graph
            ctx.grads = ctx.compute(*ctx.saved_tensors, ctx.options, ctx.needs_input_grad[2:])[2]
        grads = [
            None if grad is None else _scaled(grad, loss_grad, dtype)
            for grad, dtype in zip(ctx.grads, ctx.dtypes, strict=True)
        ]
        ctx.grads = None
        return None, None, *grads


def _scaled(grad: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """`factor * grad` in `dtype`, rounded once. In place where possible: a copy would be as large as the LM head."""
    if grad.dtype == dtype:
        return grad.mul_(factor)
    return torch.mul(grad, factor.to(grad.dtype), out=torch.empty_like(grad, dtype=dtype))


@torch.no_grad()
def mix_logits(
    strong_logits: Tensor, weak_logits: Tensor, targets: Tensor, options: MixOptions, needs_grad: Sequence[bool]
) -> tuple[Tensor, tuple[Tensor, ...], list[Tensor | None]]:
    """The loss of full logits, a few rows at a time. Only the gradients take as much memory as the logits."""
    dtype = compute_dtype_of(strong_logits)
    grads = [
        torch.zeros_like(logits) if needed else None
        for logits, needed in zip((strong_logits, weak_logits), needs_grad, strict=False)
    ]
    statistics = torch.zeros(5, len(targets), dtype=dtype, device=strong_logits.device)
    is_top1 = torch.zeros(len(targets), dtype=torch.bool, device=strong_logits.device)
    block_rows = block_rows_of(strong_logits.device, strong_logits.size(-1))
    for rows in (targets != options.ignore_index).nonzero().squeeze(-1).split(block_rows):
        z_strong, z_weak = (logits[rows].to(dtype) for logits in (strong_logits, weak_logits))
        scratch = torch.empty_like(z_strong), torch.empty_like(z_strong)
        *values, is_top1[rows] = _mix_block(z_strong, z_weak, *scratch, targets[rows], options, *needs_grad[:2])
        statistics[:, rows] = torch.stack(values)
        for grad, z in zip(grads, (z_strong, z_weak), strict=True):
            if grad is not None:
                grad[rows] = z.to(grad.dtype)
    return _summed_loss(statistics, options), (*statistics.unbind(), is_top1), [*grads, None]


def _summed_loss(statistics: Tensor, options: MixOptions) -> Tensor:
    strong_log_probs, mixed_log_probs = statistics[:2]
    if options.loss_type == "dft":
        strong_log_probs, mixed_log_probs = (x.exp() * x for x in (strong_log_probs, mixed_log_probs))
    return -(options.anchor_weight * strong_log_probs + (1 - options.anchor_weight) * mixed_log_probs).sum()


@torch.no_grad()
def mix_hidden_states(
    strong_hidden: Tensor,
    strong_weight: Tensor,
    strong_bias: Tensor | None,
    weak_hidden: Tensor,
    weak_weight: Tensor,
    weak_bias: Tensor | None,
    targets: Tensor,
    options: MixOptions,
    needs_grad: Sequence[bool],
) -> tuple[Tensor, tuple[Tensor, ...], list[Tensor | None]]:
    """The loss of hidden states and LM heads, a tile of logits at a time."""
    inputs = (strong_hidden, strong_weight, strong_bias, weak_hidden, weak_weight, weak_bias)
    grads = [
        # Several tiles add up in a weight's gradient. In half precision their rounding errors would add up too
        torch.zeros_like(x, dtype=compute_dtype_of(x) if i % 3 else None) if needed else None
        for i, (x, needed) in enumerate(zip(inputs, needs_grad, strict=False))
    ]
    needs_strong, needs_weak = any(needs_grad[:3]), any(needs_grad[3:6])
    device, dtype, vocab_size = strong_hidden.device, options.dtype, strong_weight.size(0)
    compute_dtype = compute_dtype_of(strong_hidden)
    # Triton works on tiles in the dtype of the products, PyTorch on float32
    use_triton = _use_triton(device, dtype)
    tile_dtype = dtype if use_triton else compute_dtype
    if use_triton:
        from .triton_tiles import mix_tile
    else:
        mix_tile = _mix_tile
    valid_rows = None if options.ignore_index is None else (targets != options.ignore_index).nonzero().squeeze(-1)
    num_rows = len(targets) if valid_rows is None else len(valid_rows)
    buffer_bytes = options.buffer_bytes
    if buffer_bytes is None:
        equal_tiles = needs_weak or not use_triton
        buffer_bytes = default_buffer_bytes(
            num_rows, vocab_size, tile_dtype.itemsize, memory_of(device), trains_weak=equal_tiles
        )
    buffer_rows = buffer_bytes // (vocab_size * tile_dtype.itemsize)
    if not use_triton:
        buffer_rows -= 2 * block_rows_of(device, vocab_size)  # for scratch
        if tile_dtype != dtype:  # each product is computed in half precision and then copied into a tile
            buffer_rows = buffer_rows * 4 // 5

    strong_rows, weak_rows = _tile_rows(num_rows, buffer_rows, needs_weak, use_triton)
    strong_buffer, weak_buffer = (
        torch.empty(rows, vocab_size, dtype=tile_dtype, device=device) for rows in (strong_rows, weak_rows)
    )
    statistics = torch.empty(9 if options.logit_statistics else 5, num_rows, dtype=compute_dtype, device=device)
    is_top1 = torch.empty(num_rows, dtype=torch.bool, device=device)

    def rows_of(tile: slice) -> slice | Tensor:
        return tile if valid_rows is None else valid_rows[tile]

    with torch.autocast(device.type, enabled=False):
        strong_weight, weak_weight = strong_weight.to(dtype), weak_weight.to(dtype)
        for tile in _slices(0, num_rows, strong_rows):
            h_strong = strong_hidden[rows_of(tile)].to(dtype)
            z_strong = project(strong_buffer[: len(h_strong)], h_strong, strong_weight, strong_bias)
            for part in _slices(tile.start, tile.stop, weak_rows):
                h_weak = weak_hidden[rows_of(part)].to(dtype)
                z_weak = project(weak_buffer[: len(h_weak)], h_weak, weak_weight, weak_bias)
                mix_tile(
                    z_strong[part.start - tile.start : part.stop - tile.start],
                    z_weak,
                    targets[rows_of(part)],
                    statistics[:, part],
                    is_top1[part],
                    options,
                    needs_strong,
                    needs_weak,
                )
                if needs_weak:
                    _accumulate(grads[3:], rows_of(part), z_weak, h_weak, weak_weight)
            if needs_strong:
                _accumulate(grads[:3], rows_of(tile), z_strong, h_strong, strong_weight)

    loss = _summed_loss(statistics, options)
    if valid_rows is not None:
        statistics = statistics.new_zeros(len(statistics), len(targets)).index_copy_(1, valid_rows, statistics)
        is_top1 = is_top1.new_zeros(len(targets)).index_copy_(0, valid_rows, is_top1)
    return loss, (*statistics.unbind(), is_top1), [*grads, None]


def _tile_rows(num_rows: int, buffer_rows: int, needs_weak: bool, use_triton: bool) -> tuple[int, int]:
    """How many rows of strong and of weak logits to hold at a time, if the buffer has room for `buffer_rows`."""
    if not use_triton:
        largest = max(1, buffer_rows // 2)
        rows = ceil(num_rows / ceil(num_rows / largest)) if num_rows else 0
        return rows, rows
    # Every tile is added to the gradient of the strong weight. To read and write that gradient takes a GPU as long as
    # the product of some 800 rows. So strong tiles are large, and the logits of a frozen weak model get a small buffer
    largest = buffer_rows // 2 if needs_weak else buffer_rows * 3 // 4
    strong_rows = max(1, largest // 128 * 128 or largest)  # matrix products work on blocks of 128 rows
    weak_rows = max(1, min(strong_rows, buffer_rows - strong_rows))
    return min(strong_rows, num_rows), min(weak_rows, num_rows)


def block_rows_of(device: torch.device, vocab_size: int) -> int:
    """How many rows of logits PyTorch works on at a time. On a GPU, enough (16 MB) to be worth the kernel launches."""
    return _BLOCK_ROWS if device.type == "cpu" else max(1, 2**22 // vocab_size)


def memory_of(device: torch.device) -> int | None:
    """Bytes of memory that a GPU has."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None


def _slices(start: int, stop: int, length: int) -> Iterator[slice]:
    return (slice(first, min(first + length, stop)) for first in range(start, stop, length or 1))


def _mix_tile(
    z_strong: Tensor,
    z_weak: Tensor,
    targets: Tensor,
    statistics: Tensor,
    is_top1: Tensor,
    options: MixOptions,
    needs_strong: bool,
    needs_weak: bool,
) -> None:
    """
    Statistics of a tile, and the gradients of the summed loss with respect to the products `h W^T + b` in it.

    Args:
        z_strong, z_weak (`torch.Tensor` of shape `(n, V)`):
            Products of one tile. Overwritten: by their gradients where these are needed.
        targets (`torch.Tensor` of shape `(n,)`):
            Target token ids.
        statistics (`torch.Tensor` of shape `(5, n)` or `(9, n)`):
            Receives the strong and mixed log-probabilities, the strong, weak and mixed entropies and, with
            `options.logit_statistics`, the means and the centered norms of the strong and the weak logits.
        is_top1 (`torch.Tensor` of shape `(n,)`):
            Receives whether the target is the strong model's first choice.
        options ([`MixOptions`]):
            Options of the loss.
        needs_strong, needs_weak (`bool`):
            Which gradients are needed.
    """
    block_rows = min(block_rows_of(z_strong.device, z_strong.size(-1)), len(targets))
    scratch = z_strong.new_empty(2, block_rows, z_strong.size(-1))
    for block in _slices(0, len(targets), block_rows):
        y = targets[block]
        *values, top1 = _mix_block(
            z_strong[block], z_weak[block], *scratch[:, : len(y)], y, options, needs_strong, needs_weak
        )
        is_top1[block] = top1
        torch.stack(values, out=statistics[:, block])


def _mix_block(
    z_strong: Tensor,
    z_weak: Tensor,
    z_mix: Tensor,
    p: Tensor,
    targets: Tensor,
    options: MixOptions,
    needs_strong: bool,
    needs_weak: bool,
) -> tuple[Tensor, ...]:
    """Statistics of a few rows. `z_strong` and `z_weak` hold products at first, and their gradients at the end."""
    lam, anchor = options.mixing_lambda, options.anchor_weight
    y = targets.unsqueeze(-1)
    for z, scale, softcap in zip((z_strong, z_weak), options.scales, options.softcaps, strict=True):
        transform_logits_(z, scale, softcap)
    is_top1 = z_strong.argmax(-1) == targets
    strong_entropy, log_normaliser = softmax_statistics(z_strong, z_mix, p)
    strong_log_probs = z_mix.gather(-1, y).squeeze(-1) - log_normaliser
    weak_entropy, _ = softmax_statistics(z_weak, z_mix, p)
    torch.lerp(z_weak, z_strong, lam, out=z_mix)
    mixed_entropy, log_normaliser = softmax_statistics(z_mix, z_mix, p)
    mixed_log_probs = z_mix.gather(-1, y).squeeze(-1) - log_normaliser
    statistics = strong_log_probs, mixed_log_probs, strong_entropy, weak_entropy, mixed_entropy
    if options.logit_statistics:
        variances, means = zip(*(torch.var_mean(z, -1, correction=0) for z in (z_strong, z_weak)), strict=True)
        statistics = *statistics, *means, *((variance * z_mix.size(-1)).sqrt() for variance in variances)

    minus_one = -torch.ones_like(y, dtype=p.dtype)
    g_mix = p.mul_((-log_normaliser).exp().unsqueeze(-1)).scatter_add_(-1, y, minus_one)  # P_mix - e_y
    if options.loss_type == "dft":
        g_mix.mul_(mixed_log_probs.exp().unsqueeze(-1))
    if needs_weak:
        _chain_(z_weak, g_mix, (1 - anchor) * (1 - lam), options.scales[1], options.softcaps[1])
    if needs_strong and anchor:
        g_strong = torch.softmax(z_strong, -1, out=z_mix).scatter_add_(-1, y, minus_one)  # P_strong - e_y
        if options.loss_type == "dft":
            g_strong.mul_(strong_log_probs.exp().unsqueeze(-1))
        g_strong.mul_(anchor).add_(g_mix, alpha=(1 - anchor) * lam)
        _chain_(z_strong, g_strong, 1, options.scales[0], options.softcaps[0])
    elif needs_strong:
        _chain_(z_strong, g_mix, lam, options.scales[0], options.softcaps[0])
    return *statistics, is_top1


def project(out: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Write `h W^T + b` into `out`. The dtype of `out` may be wider."""
    if out.dtype == hidden.dtype:
        torch.mm(hidden, weight.t(), out=out)
    else:
        out.copy_(hidden @ weight.t())
    return out if bias is None else out.add_(bias)


def transform_logits_(logits: Tensor, scale: float, softcap: float | None) -> Tensor:
    """What a model does to the product of hidden states and LM head: `c tanh(scale * z / c)`, in place."""
    if scale != 1:
        logits *= scale
    return logits if softcap is None else logits.div_(softcap).tanh_().mul_(softcap)


def _chain_(logits: Tensor, logits_grad: Tensor, factor: float, scale: float, softcap: float | None) -> None:
    """Replace `logits` by `factor` times the gradient of the product that [`transform_logits_`] made them of."""
    if softcap is None:
        torch.mul(logits_grad, factor * scale, out=logits)
    else:
        logits.div_(softcap).square_().neg_().add_(1).mul_(factor * scale).mul_(logits_grad)


def softmax_statistics(logits: Tensor, shifted: Tensor, exps: Tensor) -> tuple[Tensor, Tensor]:
    """
    Entropy and log-normaliser of each row.

    `shifted` receives the logits minus their maximum, and `exps` the exponentials of these. The log-normaliser is that
    of the shifted logits. `shifted` may be `logits` itself.
    """
    torch.sub(logits, logits.amax(-1, keepdim=True), out=shifted)
    torch.exp(shifted, out=exps)
    total = exps.sum(-1)
    log_normaliser = total.log()
    return log_normaliser - torch.linalg.vecdot(exps, shifted) / total, log_normaliser


def _accumulate(
    grads: Sequence[Tensor | None], rows: Tensor | slice, logits_grad: Tensor, hidden: Tensor, weight: Tensor
) -> None:
    """Add a tile's part to the gradients of hidden states, weight and bias."""
    hidden_grad, weight_grad, bias_grad = grads
    if bias_grad is not None:
        bias_grad += logits_grad.sum(0, dtype=bias_grad.dtype)
    logits_grad = logits_grad.to(hidden.dtype)
    if hidden_grad is not None:
        hidden_grad[rows] = (logits_grad @ weight).to(hidden_grad.dtype)
    if weight_grad is None:
        return
    if weight_grad.dtype == hidden.dtype:
        weight_grad.addmm_(logits_grad.t(), hidden)
    elif hidden.device.type == "cuda":
        torch.addmm(weight_grad, logits_grad.t(), hidden, out_dtype=weight_grad.dtype, out=weight_grad)
    else:
        weight_grad += logits_grad.t() @ hidden


def _use_triton(device: torch.device, dtype: torch.dtype) -> bool:
    return _TRITON_AVAILABLE and device.type == "cuda" and dtype != torch.float64


def matmul_dtype(hidden: Tensor) -> torch.dtype:
    """Dtype of a matrix product with `hidden`: that of autocast where it is on."""
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


def compute_dtype_of(logits: Tensor) -> torch.dtype:
    return logits.dtype if logits.dtype == torch.float64 else torch.float32
