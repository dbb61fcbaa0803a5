"""A narrow ``down`` whose rows lie side by side in the weight's own memory, for as long as one prompt decodes.

At one token torch multiplies 16-bit numbers row by row on a CPU with AVX2 alone, where reading stops at the end of a narrow row:
57 % of the columns so take 85 % of the time of all, and 78 % as long as all. Side by side they take 56 and 75 %.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from ..interrupts import uninterrupted
from ..kernels import View
from ..weights.exchange import as_integers
from ..weights.layout import Projection, linear
from .moved import MovedWeights

_ROWS = 64  # moved through a copy while what is free in front of them is too small


class PackedDown:
    """A down projection on its first ``width`` columns.

    Parameters
    ----------
    moved : MovedWeights, optional
        Told of what is moved within the weight.

    Attributes
    ----------
    packed : bool
        Whether these lie side by side, so that nothing but :meth:`view` says where they are.
    """

    def __init__(self, down: Projection, width: int, moved: MovedWeights | None = None) -> None:
        self._down = down
        self._width = width
        self._moved = moved
        self._stored: Tensor | None = None  # what is packed, which may be the weight no more
        self.packed = False

    def fits(self) -> bool:
        """Whether the columns are narrow rows now."""
        weight = self._down.weight
        if self._down.stored.scale is not None:
            return False
        return weight.is_contiguous() and not self._down.transposed and self._width < weight.shape[1]

    def pays(self) -> bool:
        """Whether torch's kernels gain from it here."""
        weight = self._down.weight
        halves = weight.is_cpu and weight.element_size() == 2
        return halves and self.fits() and torch.backends.cpu.get_cpu_capability() == "AVX2"

    def view(self) -> View:
        """Weight as ``[width, out]`` and bias, as :meth:`Projection.narrow_views` gives them."""
        if not self.packed:
            return self._down.narrow_views(self._width)[0]
        weight = self._down.weight
        return weight.view(-1)[: len(weight) * self._width].view(-1, self._width).t(), self._down.bias

    def __call__(self, h: Tensor) -> Tensor:
        """Of ``[..., width]``, ``[..., out]``."""
        out = linear(h.reshape(-1, self._width), *self.view())
        return out.view(*h.shape[:-1], -1)

    @uninterrupted()
    @torch.inference_mode(False)
    @torch.no_grad()
    def pack(self) -> None:
        """Move the first columns together, and the others behind them."""
        with self._rearranging():
            weight = as_integers(self._down.weight)
            self._pack(weight, self._width)
            self._stored, self.packed = weight, True

    def _rearranging(self) -> AbstractContextManager[None]:
        return nullcontext() if self._moved is None else self._moved.rearranging()

    @staticmethod
    def _pack(weight: Tensor, width: int) -> None:
        (rows, size), flat = weight.shape, weight.view(-1)
        rest = weight[:, width:].clone()
        first = 0
        while first < rows:
            free = first * (size - width) // width  # rows that fit in front of where the next one is
            last = min(first + max(free, _ROWS), rows)
            block = weight[first:last, :width]
            flat[first * width : last * width].view_as(block).copy_(block if last - first <= free else block.clone())
            first = last
        flat[rows * width :].view_as(rest).copy_(rest)

    @uninterrupted()
    @torch.inference_mode(False)
    @torch.no_grad()
    def unpack(self) -> None:
        """Undo :meth:`pack`, if it was done."""
        if self._stored is None:
            return
        with self._rearranging():
            self._unpack(self._stored, self._width)
            self._stored, self.packed = None, False

    @staticmethod
    def _unpack(weight: Tensor, width: int) -> None:
        (rows, size), flat = weight.shape, weight.view(-1)
        rest = flat[rows * width :].view(rows, -1).clone()
        last = rows
        while last:
            free = -(-last * width // size)  # the first row that lies behind all that is to be moved
            first = max(min(free, last - _ROWS), 0)
            block = flat[first * width : last * width].view(-1, width)
            weight[first:last, :width].copy_(block if first >= free else block.clone())
            last = first
        weight[:, width:].copy_(rest)
