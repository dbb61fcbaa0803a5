"""Norms of rows and columns of a weight, whatever it is stored as."""

from __future__ import annotations

import torch
from torch import Tensor

_NORM_WEIGHTS = 1 << 18  # whose norms are taken at once


def weight_norms(matrix: Tensor, dim: int, dtype: torch.dtype, scale: Tensor | None = None) -> Tensor:
    """Norms along one axis of a matrix, in pieces: on a CPU torch first makes a copy of all that it is given in ``dtype``.

    ``scale`` (``[out, 1]``) has a factor for each row.
    """
    if scale is None and (matrix.dtype == dtype or not matrix.is_cpu):
        return torch.linalg.vector_norm(matrix, dim=dim, dtype=dtype)
    length, count = matrix.shape[dim], matrix.shape[1 - dim]
    lines = min(max(1, _NORM_WEIGHTS // length), count)
    room, norms = (torch.empty(n, dtype=dtype, device=matrix.device) for n in (lines * length, count))
    for start in range(0, count, lines):
        piece = matrix.narrow(1 - dim, start, min(lines, count - start))
        wide = room[: piece.numel()].view(piece.shape).copy_(piece)
        if scale is not None:
            wide *= scale if dim == 0 else scale[start : start + lines]
        torch.linalg.vector_norm(wide, dim=dim, out=norms[start : start + lines])
    return norms
