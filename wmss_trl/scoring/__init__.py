"""Entropies of models over a data set, and what is kept of them."""

from .entropy import score_entropy
from .table import ScoreTable

__all__ = ["ScoreTable", "score_entropy"]
