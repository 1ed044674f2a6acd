"""Engines that split models and data over processes."""
