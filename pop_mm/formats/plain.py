"""Weights as plain floats: float32, bfloat16, float16 or float64."""

from __future__ import annotations

from typing import Any

from torch import nn

from .asking import is_wide_float
from .base import Stored


class Plain:
    """An ``nn.Parameter`` of floats, and no subclass of it."""

    name = "plain"

    def holds(self, weight: Any) -> bool:
        """Whether it is one."""
        return type(weight) is nn.Parameter

    def why_not(self, weight: Any) -> str | None:
        """A reason for integers, floats of 8 bits and tensors with other than two axes."""
        if not is_wide_float(weight.dtype) or weight.dim() != 2:
            return f"is {weight.dtype} with shape {tuple(weight.shape)}"
        return None

    def stored(self, weight: Any) -> Stored:
        """Itself."""
        return Stored(weight, None, weight.dtype)
