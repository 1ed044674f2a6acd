"""The command `wmss-trl`."""

from .main import main

__all__ = ["main"]
