"""Executors: what makes a plan act on a model. ``masked`` is the reference, which saves no time."""
