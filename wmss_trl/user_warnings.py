"""Warnings to the user: of what all processes of a run see, the main process warns."""

import os
import warnings

import torch.distributed as dist


def warn(message: str, stacklevel: int = 1) -> None:
    """Like `warnings.warn`, on the main process only."""
    # The launcher's variable, since some warnings come before processes are connected
    rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else int(os.environ.get("RANK", "0"))
    if rank == 0:
        warnings.warn(message, stacklevel=stacklevel + 1)
