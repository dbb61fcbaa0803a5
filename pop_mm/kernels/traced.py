"""The compiled kernel as an operator of torch, so that ``torch.compile`` can put it into a graph."""

from __future__ import annotations

import torch
from torch import Tensor

from . import Matvec, Rows, library

_LIBRARY = torch.library.Library("pop_mm", "DEF")
_LIBRARY.define("matvec(Tensor x, Tensor weight, Tensor? bias) -> Tensor", tags=(torch.Tag.needs_fixed_stride_order,))


def _kernel() -> Matvec:
    kernel = library()
    assert kernel is not None, "a step is traced with it only where a session has loaded it"
    return kernel


@torch.library.impl(_LIBRARY, "matvec", "CPU")
def _matvec(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return _kernel()((Rows([weight], [bias]),), x)


@torch.library.register_fake("pop_mm::matvec", lib=_LIBRARY)
def _shape(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(1, weight.shape[0])


def fits(x: Tensor, weight: Tensor) -> bool:
    """Whether :func:`matvec` takes one token ``[..., m]`` and ``[n, m]``."""
    return x.shape[:-1].numel() == 1 and x.dtype == weight.dtype and Rows.fit([weight])


def matvec(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x @ weight.T + bias`` for one token.

    Parameters
    ----------
    x : Tensor
        ``[1, m]``.
    weight : Tensor
        ``[n, m]``, for which :func:`fits` holds.
    bias : Tensor or None
        ``[n]``.

    Returns
    -------
    Tensor
        ``[1, n]``.
    """
    result: Tensor = torch.ops.pop_mm.matvec(x, weight, bias)
    return result
