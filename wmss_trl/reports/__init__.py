"""Metrics and figures of a run."""
