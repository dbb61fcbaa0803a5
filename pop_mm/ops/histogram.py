"""Counts of magnitudes by bins of the float32 format, as :func:`.reference.histogram`: in C on a CPU, in torch elsewhere."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.functions import untraced
from . import reference
from .library import library
from .reference import BINS, bin_edges

__all__ = ["BINS", "bin_edges", "histogram"]


_BLOCK = 1 << 22  # magnitudes that torch bins at once


@untraced
def histogram(x: Tensor, counts: Tensor, norms: Tensor | None = None, valid: Tensor | None = None) -> None:
    """Add the numbers of magnitudes in each bin to ``counts``; the same counts whatever computes them.

    Parameters
    ----------
    x : Tensor
        ``[T, n]``, of any float dtype: rounded to float32.
    counts : Tensor
        ``[BINS]`` or ``[B, BINS]``, int64, contiguous, where ``x`` is.
    norms : Tensor, optional
        ``[n]``, float32: factors of the magnitudes.
    valid : Tensor, optional
        ``[T]`` or ``[B, T]``, boolean: tokens that count, for each line of ``counts``. None: all.
    """
    found = library(x.dtype) if x.is_cpu else None
    if found is None or not x.numel():
        _by_torch(x, counts, norms, valid)
        return
    x = x if x.stride(1) == 1 else x.contiguous()
    norms = None if norms is None else norms.contiguous()
    valid = None if valid is None else valid.contiguous()
    address, tokens, width, stride = x.data_ptr(), *x.shape, x.stride(0)
    factors, into = None if norms is None else norms.data_ptr(), counts.data_ptr()
    which, threads = None if valid is None else valid.data_ptr(), torch.get_num_threads()
    for _ in range(counts.numel() // BINS):  # addresses are cheaper than views
        found.histogram(address, tokens, width, stride, factors, which, into, threads)
        into += BINS * counts.element_size()
        which = None if which is None else which + tokens


def _by_torch(x: Tensor, counts: Tensor, norms: Tensor | None, valid: Tensor | None) -> None:
    lines = counts.view(-1, BINS)
    masks = [None] * len(lines) if valid is None else valid.view(len(lines), -1)
    step = max(1, _BLOCK // max(1, x.shape[1]))
    for own, mine in zip(lines, masks, strict=True):
        for start in range(0, len(x), step):
            part = slice(start, start + step)
            reference.histogram(x[part], own, norms, None if mine is None else mine[part])
