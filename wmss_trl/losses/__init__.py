"""The mixed loss: plain PyTorch, to be read and tested alone."""

from .entropy import linear_entropy, next_token_targets, token_entropy
from .mixed import MixedLossOutput, linear_mixed_cross_entropy, mixed_cross_entropy, mixed_loss

__all__ = [
    "MixedLossOutput",
    "linear_entropy",
    "linear_mixed_cross_entropy",
    "mixed_cross_entropy",
    "mixed_loss",
    "next_token_targets",
    "token_entropy",
]
