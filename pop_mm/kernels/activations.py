"""The activations that our own kernels know, recognised by what they compute."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
}


def activation_name(module: nn.Module | None) -> str | None:
    """Which of the activations that the kernels know a module is, as far as a few points can tell; None if it is another."""
    x = torch.linspace(-20, 20, 321)
    try:
        with torch.no_grad():
            y = None if module is None else module.forward(x)
    except Exception:  # one with parameters, on another device or without values
        return None
    if not isinstance(y, Tensor) or y.shape != x.shape or y.dtype != x.dtype:
        return None
    return next((name for name, f in ACTIVATIONS.items() if torch.allclose(y, f(x), rtol=1e-5, atol=1e-5)), None)
