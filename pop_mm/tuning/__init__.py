"""The budget for a target: the smallest that keeps a quality, or the largest that reaches a speed, on a text."""

from __future__ import annotations

from .result import TuneError, TunePoint, TuneResult
from .run import tune

__all__ = ["TuneError", "TunePoint", "TuneResult", "tune"]
