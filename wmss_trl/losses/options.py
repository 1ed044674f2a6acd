"""Options that the loss and its kernels share."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class MixOptions:
    """What the mixed loss depends on besides its tensors. Pairs are (strong, weak)."""

    mixing_lambda: float
    anchor_weight: float
    ignore_index: int | None
    grad_enabled: bool
    scales: tuple[float, float] = (1.0, 1.0)
    softcaps: tuple[float | None, float | None] = (None, None)
    logit_statistics: bool = False
    loss_type: str = "nll"
    # Of the fused form
    buffer_bytes: int | None = None
    dtype: torch.dtype | None = None

    def __post_init__(self):
        if self.loss_type not in ("nll", "dft"):
            raise ValueError(f"`loss_type` must be 'nll' or 'dft', got {self.loss_type!r}.")
