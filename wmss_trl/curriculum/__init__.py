"""From entropies to a list of examples."""

from .sampler import CurriculumSampler
from .weights import CURRICULUM_VARIANTS, draw_active_set, sampling_weights

__all__ = ["CURRICULUM_VARIANTS", "CurriculumSampler", "draw_active_set", "sampling_weights"]
