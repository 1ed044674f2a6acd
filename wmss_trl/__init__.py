"""Weak-Driven Learning (WMSS) for TRL."""
# ruff: noqa: E402

from ._version import __version__
from .compatibility import check_versions, warn_of_changes

check_versions()  # first: what is missing in another version would fail with an error that does not name it

from .config import WMSSConfig
from .curriculum import CurriculumSampler, draw_active_set, sampling_weights
from .losses import linear_mixed_cross_entropy, mixed_cross_entropy
from .scoring import score_entropy
from .trainer import WMSSTrainer

warn_of_changes()

__all__ = [
    "CurriculumSampler",
    "WMSSConfig",
    "WMSSTrainer",
    "__version__",
    "draw_active_set",
    "linear_mixed_cross_entropy",
    "mixed_cross_entropy",
    "sampling_weights",
    "score_entropy",
]
