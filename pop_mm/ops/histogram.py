"""Counts of magnitudes by bins of the float32 format, as :func:`.reference.histogram`: in C on a CPU, in torch elsewhere."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.functions import untraced
from . import reference
from .library import library
from .reference import BINS, bin_edges

__all__ = ["BINS", "bin_edges", "histogram"]


@untraced
def histogram(x: Tensor, counts: Tensor, norms: Tensor | None = None, valid: Tensor | None = None) -> None:
    """Add the numbers of magnitudes in each bin to ``counts``; the same counts whatever computes them.

    Parameters
    ----------
    x : Tensor
        ``[T, n]``, of any float dtype: rounded to float32.
    counts : Tensor
        ``[BINS]``, int64, where ``x`` is.
    norms : Tensor, optional
        ``[n]``, float32: factors of the magnitudes.
    valid : Tensor, optional
        ``[T]``, boolean: tokens that count.
    """
    found = library(x.dtype) if x.is_cpu and counts.is_contiguous() else None
    if found is None or not x.numel():
        reference.histogram(x, counts, norms, valid)
        return
    x = x.detach()
    x = x if x.stride(1) == 1 else x.contiguous()
    norms = None if norms is None else norms.contiguous()
    valid = None if valid is None else valid.contiguous()
    found.histogram(
        x.data_ptr(),
        *x.shape,
        x.stride(0),
        None if norms is None else norms.data_ptr(),
        None if valid is None else valid.data_ptr(),
        counts.data_ptr(),
        torch.get_num_threads(),
    )
