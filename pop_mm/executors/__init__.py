"""Executors carry out a plan: masked (the reference), narrow (channels in front), gathered (by row), rows (input-major)."""
