"""Decode steps on narrow views by kernels of our own, in front of torch's: for :mod:`.narrow`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..decoding.channel_engine import ChannelEngine
from ..kernels import Matvec
from ..kernels.ffn import FFNStep, Scratch
from ..kernels.gpu import FusedStep, fits
from ..tracking.phase import Forward
from .base import dense_ffn, voices

if TYPE_CHECKING:
    from .narrow import ResidentCandidates

Compute = Callable[[Tensor, Forward | None], Tensor]


def triton_forward(
    engine: ChannelEngine, index: int, resident: Mapping[int, ResidentCandidates], stock: Compute
) -> Compute:
    """The FFN as one function, for one token of each of 1 to 8 sequences; anything else is left to ``stock``.

    Parameters
    ----------
    index : int
        Number of the FFN; its weights are read where they are now.
    resident : mapping
        FFN -> the candidates as they stand in the weights at the time of a step.
    stock : callable
        What computes the same by torch's kernels, as :func:`.direct.direct_forward` makes it.
    """
    ffn, sizes = dense_ffn(engine, index), engine.sizes[index]
    if not fits(ffn):
        return stock
    step = FusedStep(ffn, sizes)
    loaded: ResidentCandidates | None = None

    def compute(x: Tensor, current: Forward | None) -> Tensor:
        nonlocal loaded
        rows = x.reshape(-1, x.shape[-1])
        if current is None or current.length != 1 or current.rows != len(rows) or not step.takes(rows):
            return stock(x, current)
        if not sizes.candidates:
            return step(rows).view(x.shape)
        here = resident[index]
        if here is not loaded:
            step.load(here.weight)
            loaded = here
        valid = voices(current)
        out = step(rows, None if valid is None else valid.to(x.device))
        current.state.ffns[index].steps.add(step.dropped, here.ranks)
        return out.view(x.shape)

    return compute


def compiled_forward(
    engine: ChannelEngine,
    index: int,
    resident: Mapping[int, ResidentCandidates],
    matvec: Matvec,
    scratch: Scratch,
    stock: Compute,
) -> Compute:
    """The same on a CPU by the compiled library."""
    ffn, sizes = dense_ffn(engine, index), engine.sizes[index]
    if not FFNStep.fits(ffn):
        return stock
    step = FFNStep(matvec, ffn, sizes, scratch)

    def compute(x: Tensor, current: Forward | None) -> Tensor:
        if current is None or not current.few or not step.takes(x):
            return stock(x, current)
        if not sizes.candidates:
            return step(x)
        here = resident[index]
        if here.weight.dtype is not torch.float32:  # of a scorer that wants more digits
            return stock(x, current)
        return step(x, here.weight, voices(current), here.slot())

    return compute
