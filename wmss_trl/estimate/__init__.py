"""Memory, communication and time of a run. Everything here is estimated."""

from .costs import Hardware, communication, communication_bound_from, compute, times
from .memory import ENGINES, WEAK_REFERENCES, Memory, Setup, activation_bytes, memory
from .models import PRESETS, ModelSize, load_config

__all__ = [
    "ENGINES",
    "PRESETS",
    "WEAK_REFERENCES",
    "Hardware",
    "Memory",
    "ModelSize",
    "Setup",
    "activation_bytes",
    "communication",
    "communication_bound_from",
    "compute",
    "load_config",
    "memory",
    "times",
]
