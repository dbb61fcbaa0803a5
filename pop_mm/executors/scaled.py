"""Linear modules on the first channels of int8 weights, which have a scale for each output: by compiled C, else by torch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..formats import stored
from ..ops.dot import Dot
from ..weights.layout import Projection

Part = tuple[Tensor, Tensor, Tensor | None]  # rows of a matrix, their scales, and the biases


def narrow_forward(projection: Projection, width: int) -> Callable[[Tensor], Tensor]:
    """:meth:`Projection.narrow`, of weights in every form."""
    found = stored(projection.weight)
    if found is None or found.scale is None:
        return projection.narrow(width)
    bias = None if projection.bias is None else projection.bias.detach()
    parts: list[Part] = []
    for matrix, scale, b in projection.narrow_parts(width):
        assert scale is not None
        parts.append((matrix.t(), scale, None if b is None else b.detach()))
    kernels = None
    if Dot.fits(found, bias):
        kernels = [Dot(matrix, scale, b, found.dtype) for matrix, scale, b in parts]

    def forward(x: Tensor) -> Tensor:
        if kernels is not None and kernels[0].takes(x):
            out = [kernel(x) for kernel in kernels]
        else:
            out = [scaled_linear(x, *part) for part in parts]
        return out[0] if len(out) == 1 else torch.cat(out, -1)

    return forward


def scaled_linear(x: Tensor, matrix: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """``x @ (matrix * scale).T + bias`` as torchao computes it, ``[..., in]`` to ``[..., out]``."""
    out = (x.reshape(-1, x.shape[-1]) @ matrix.t().to(x.dtype)) * scale.to(x.dtype).flatten()
    out = out if bias is None else out + bias
    return out.view(*x.shape[:-1], -1)


__all__ = ["narrow_forward", "scaled_linear"]
