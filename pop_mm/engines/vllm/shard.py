"""One rank's part of an input under tensor parallelism. Every rank makes the same choices, those of one process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ...weights.shards import Part

Collective = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Shard(Part):
    """Which entries of an input a rank has.

    Attributes
    ----------
    all_gather : callable or None
        Joins ``[..., size]`` of all ranks to ``[..., whole]``; None where a rank has every entry.
    all_reduce : callable or None
        Sums a tensor over the ranks.
    """

    all_gather: Collective | None = None
    all_reduce: Collective | None = None

    def gathered(self, values: Tensor) -> Tensor:
        """``[whole]`` from ``[size]`` of each rank."""
        if self.size == self.whole:
            return values
        assert self.all_gather is not None
        return self.all_gather(values.contiguous())

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over ranks that have different entries."""
        if self.size == self.whole:
            return tensor
        assert self.all_reduce is not None
        return self.all_reduce(tensor)

    def without(self, active: Tensor, entries: Tensor) -> Tensor:
        """``[N, size]``, boolean: ``active``, but false at some entries of each token, ``[N, n]`` from 0 to ``whole - 1``."""
        if self.size == self.whole:
            return active.scatter(1, entries, False)
        places, here = self.places(entries)
        wide = torch.cat([active, active.new_ones(len(active), 1)], 1)  # the last column takes what other ranks have
        return wide.scatter_(1, places.masked_fill_(~here, self.size), False)[:, :-1]


__all__ = ["Shard"]
