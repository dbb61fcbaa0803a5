"""Executors carry out a plan: masked (the reference), narrow (channels moved to the front), gathered (by row), rows (input-major)."""
