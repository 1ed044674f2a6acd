"""How much memory the tiles of logits get."""

from math import ceil

MIN_BUFFER_BYTES = 256 * 2**20
# Each tile of a GPU reads and writes the gradient of a whole LM head, which takes as long as the products of some 800
# rows take
_MAX_TILES = 3
_MAX_SHARE = 1 / 16


def default_buffer_bytes(
    num_tokens: int, vocab_size: int, itemsize: int, device_memory: int | None = None, trains_weak: bool = False
) -> int:
    """
    Memory for the tiles of logits of the mixed loss, where it is not set.

    Args:
        num_tokens (`int`):
            Tokens of a micro-batch that carry loss.
        vocab_size (`int`):
            Size of the vocabulary.
        itemsize (`int`):
            Bytes per logit.
        device_memory (`int`, *optional*):
            Bytes of memory that the GPU has; `None` for a CPU.
        trains_weak (`bool`, *optional*, defaults to `False`):
            Whether the weak logits need a tile of the same size, which they do if they are trained.

    Returns:
        `int`: bytes. 256 MiB on a CPU; on a GPU what lets the strong logits pass in 3 tiles, but at least 256 MiB and
        beyond that at most 1/16 of the memory.
    """
    if device_memory is None:
        return MIN_BUFFER_BYTES
    tile_rows = ceil(ceil(num_tokens / _MAX_TILES) / 128) * 128
    # The logits of a frozen weak model pass through a third of that
    buffer_rows = 2 * tile_rows if trains_weak else ceil(tile_rows * 4 / 3)
    return max(MIN_BUFFER_BYTES, min(buffer_rows * vocab_size * itemsize, int(device_memory * _MAX_SHARE)))
