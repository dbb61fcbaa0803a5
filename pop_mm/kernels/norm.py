"""Root mean square norms of a few tokens, each in one call of the compiled library instead of six of torch's operators."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from .functions import FLOAT, INT, INTEGER, POINTER, functions, untraced

KINDS = ("rounded before the weight", "rounded once", "rounded once, with the weight added to 1")


class RMSNorm:
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last axis, in float32 and rounded where transformers' modules round.

    Parameters
    ----------
    library : ctypes.CDLL
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self._functions = functions(library, "rms_norm", *[POINTER] * 3, INTEGER, INTEGER, FLOAT, INT)

    def takes(self, x: Tensor, weight: Tensor) -> bool:
        """Whether it can compute these: ``[..., n]`` and ``[n]`` on the CPU, contiguous, both float32 or both bfloat16."""
        return (
            x.dtype in self._functions
            and x.dtype == weight.dtype
            and x.is_cpu
            and weight.is_cpu
            and weight.shape == x.shape[-1:]
            and x.is_contiguous()
            and weight.is_contiguous()
        )

    @untraced
    def __call__(self, x: Tensor, weight: Tensor, eps: float, kind: int) -> Tensor:
        """The normalised ``x``.

        Parameters
        ----------
        x : Tensor
            ``[..., n]``.
        weight : Tensor
            ``[n]``.
        eps : float
        kind : int
            Number of one of :data:`KINDS`: Llama's, GPT-OSS's, Gemma's.
        """
        out = torch.empty(x.shape, dtype=x.dtype, device="cpu")
        size = weight.numel()
        self._functions[x.dtype](x.data_ptr(), weight.data_ptr(), out.data_ptr(), x.numel() // size, size, eps, kind)
        return out
