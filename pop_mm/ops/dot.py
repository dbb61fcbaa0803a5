"""Decode steps of one token on row-major weights in other forms than floats, on a CPU by compiled C.

For floats :class:`pop_mm.kernels.Matvec` does the same, for a few tokens.
"""

from __future__ import annotations

from struct import pack

import torch
from torch import Tensor

from ..formats import Stored
from ..kernels.functions import untraced
from .library import library
from .rows import TakesOne


class Dot(TakesOne):
    """``y = W x * scale + b`` of one matrix, or its first outputs or inputs.

    Parameters
    ----------
    matrix : Tensor
        ``[out, in]``, with contiguous rows: as it is stored, or a narrow view.
    scale : Tensor
        ``[out, 1]``, float32, contiguous.
    bias : Tensor or None
        ``[out]``, contiguous.
    dtype : torch.dtype
        Of inputs, bias and outputs.
    """

    def __init__(self, matrix: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        found = library(dtype, matrix.dtype)
        if found is None or (matrix.stride(1) != 1 and matrix.shape[1] > 1):
            raise RuntimeError("there is no compiled product: fits() was not asked")
        self._function, self._kept = found.dot, (matrix, scale, bias)  # as the memory is
        self.dtype, (self._outputs, self.columns) = dtype, matrix.shape
        addresses = (matrix.data_ptr(), 0 if bias is None else bias.data_ptr(), scale.data_ptr())
        self._matrix = pack("=5q", *addresses, matrix.stride(0), self._outputs)

    @staticmethod
    def fits(stored: Stored, bias: Tensor | None) -> bool:
        """Whether the library can read a weight, as it is stored now."""
        matrix, scale = stored.matrix, stored.scale
        return (
            scale is not None
            and matrix.is_cpu
            and (matrix.stride(1) == 1 or matrix.shape[1] == 1)
            and (bias is None or (bias.dtype is stored.dtype and bias.is_contiguous()))
            and library(stored.dtype, matrix.dtype) is not None
        )

    @untraced
    def __call__(self, x: Tensor) -> Tensor:
        """``[..., in]`` of one token to ``[..., out]``."""
        x = x.contiguous()
        out = torch.empty(*x.shape[:-1], self._outputs, dtype=self.dtype, device="cpu")
        wide = torch.empty(self.columns, dtype=torch.float32, device="cpu")
        addresses = x.data_ptr(), self.columns, wide.data_ptr(), out.data_ptr()
        self._function(self._matrix, 1, *addresses, torch.get_num_threads())
        return out


__all__ = ["Dot"]
