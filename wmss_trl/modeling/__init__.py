"""Reaching into a model of transformers."""
