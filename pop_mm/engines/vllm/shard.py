"""One rank's part of an input under tensor parallelism. Every rank makes the same choices, those of one process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Collective = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Shard:
    """Which entries of an input a rank has.

    Attributes
    ----------
    start, width : int
        The first of them, and how many they are.
    size : int
        Entries on all ranks together.
    all_gather : callable or None
        Joins ``[..., width]`` of all ranks to ``[..., size]``; None where a rank has every entry.
    all_reduce : callable or None
        Sums a tensor over the ranks.
    """

    start: int
    width: int
    size: int
    all_gather: Collective | None = None
    all_reduce: Collective | None = None

    @property
    def whole(self) -> bool:
        """Whether this rank has every entry."""
        return self.width == self.size

    def gathered(self, values: Tensor) -> Tensor:
        """``[size]`` from ``[width]`` of each rank."""
        if self.whole:
            return values
        assert self.all_gather is not None
        return self.all_gather(values.contiguous())

    def summed(self, values: Tensor) -> Tensor:
        """The sum over ranks that have different entries."""
        if self.whole:
            return values
        assert self.all_reduce is not None
        return self.all_reduce(values)

    def own(self, values: Tensor) -> Tensor:
        """``[..., width]`` from ``[..., size]``."""
        return values.narrow(-1, self.start, self.width)

    def pick(self, values: Tensor, entries: Tensor) -> Tensor:
        """Some entries of each token, which any rank may have.

        Parameters
        ----------
        values : Tensor
            ``[N, width]``.
        entries : Tensor
            ``[N, n]``, int64, from 0 to ``size - 1``.

        Returns
        -------
        Tensor
            ``[N, n]``, the same on every rank.
        """
        if self.whole:
            return values.gather(1, entries)
        places = entries - self.start
        here = (places >= 0) & (places < self.width)
        found = values.gather(1, places.clamp(0, self.width - 1))
        return self.summed(found.masked_fill_(~here, 0))

    def without(self, active: Tensor, entries: Tensor) -> Tensor:
        """``[N, width]``, boolean: ``active``, but false at some entries of each token, ``[N, n]`` from 0 to ``size - 1``."""
        if self.whole:
            return active.scatter(1, entries, False)
        places = entries - self.start
        here = (places >= 0) & (places < self.width)
        wide = torch.cat([active, active.new_ones(len(active), 1)], 1)  # the last column takes what other ranks have
        return wide.scatter_(1, places.masked_fill_(~here, self.width), False)[:, :-1]


__all__ = ["Shard"]
