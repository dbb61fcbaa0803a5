"""Sums over numbers of weights, one of every channel, which tell that others stand there: in C on a CPU, in torch elsewhere."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from struct import pack

import torch
from torch import Tensor

from ..kernels.functions import untraced
from ..weights.exchange import as_integers
from .library import library

Sampled = tuple[Tensor, Tensor | None]


@untraced
@torch.no_grad()
def sample(matrices: Sequence[Sampled]) -> list[int]:
    """Of each matrix a sum over its numbers' bits, each times an odd factor of its own, modulo 2**64.

    Parameters
    ----------
    matrices : sequence of tuple of Tensor and Tensor or None
        ``[U, D, n]``, of any float dtype of 2, 4 or 8 bytes and any strides; and where channel d of unit u stands among the D,
        ``[U, D]``, int64; None if in its own place. Of channel d of unit u counts its number ``(u D + d) % n``.
    """
    found: dict[int, int] = {}
    compiled: dict[torch.dtype, list[int]] = {}
    in_torch: dict[torch.device, list[tuple[int, Tensor]]] = {}
    for number, (matrix, places) in enumerate(matrices):
        if matrix.is_cpu and matrix.numel() and library(matrix.dtype) is not None:
            compiled.setdefault(matrix.dtype, []).append(number)
        else:
            in_torch.setdefault(matrix.device, []).append((number, _by_torch(matrix, places)))
    for dtype, numbers in compiled.items():
        found.update(zip(numbers, _by_library(dtype, [matrices[number] for number in numbers]), strict=True))
    for several in in_torch.values():  # one wait for each device
        sums = torch.stack([total for _, total in several]).tolist()
        found.update(zip((number for number, _ in several), sums, strict=True))
    return [found[number] for number in range(len(matrices))]


def _by_library(dtype: torch.dtype, matrices: Sequence[Sampled]) -> list[int]:
    functions = library(dtype)
    assert functions is not None
    held = [None if places is None else places.cpu().contiguous() for _, places in matrices]
    sums = (ctypes.c_int64 * len(matrices))()
    described = b"".join(
        pack("=8q", matrix.data_ptr(), 0 if places is None else places.data_ptr(), *matrix.shape, *matrix.stride())
        for (matrix, _), places in zip(matrices, held, strict=True)
    )
    functions.sample(described, len(matrices), sums, torch.get_num_threads())
    return list(sums)


def _by_torch(matrix: Tensor, places: Tensor | None) -> Tensor:
    units, size, width = matrix.shape
    unit, channel, turn = _places(units, size, matrix.device)
    places = channel if places is None else places.to(matrix.device)
    numbers = as_integers(matrix)[unit, places, turn % max(width, 1)]
    return (numbers * (2 * turn + 1)).sum()


@cache
def _places(units: int, size: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """``[U, 1]``, ``[U, D]`` and ``[U, D]``: the unit, the channel and the running number of each channel."""
    with torch.inference_mode(False):
        turn = torch.arange(units * size, device=device).view(units, size)
        return torch.arange(units, device=device).unsqueeze(1), turn % size, turn
