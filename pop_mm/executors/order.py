"""The order of channels in the weights: how it is changed with the fewest exchanges, and put back exactly."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..interrupts import uninterrupted
from ..partition import Sizes

Numbers = NDArray[np.int64]
Zones = NDArray[np.uint8]


class ChannelOrder:
    """The present order of one FFN's (or one expert's) channels in its weights, kept on the host.

    Parameters
    ----------
    size : int
        D, how many channels there are.
    device : torch.device
        Where the weights are.
    swap : callable
        ``swap(first, second)`` exchanges channels in the weights, as :meth:`pop_mm.weights.layout.FFN.swap`.

    Attributes
    ----------
    channel_at : array
        ``[D]``: original channel at each position.
    moved : bool
        Whether the order differs from the original one.
    """

    def __init__(self, size: int, device: torch.device, swap: Callable[[Tensor, Tensor], None]) -> None:
        self._device = device
        self._swap = swap
        self.channel_at: Numbers = np.arange(size)
        self._position_of: Tensor | None = None
        self.moved = False

    @property
    def position_of(self) -> Tensor:
        """``[D]``: position of each original channel."""
        if self._position_of is None:
            positions = np.empty_like(self.channel_at)
            positions[self.channel_at] = np.arange(len(positions))
            self._position_of = self._on_device(positions)
        return self._position_of

    def place(self, zones: Zones, sizes: Sizes) -> int:
        """Bring R to the front and C behind it; how many channels moved.

        Parameters
        ----------
        zones : array
            ``[D]``: of each original channel, from :meth:`pop_mm.partition.Partition.zones`.
        """
        moved = 0
        for first, second in zone_swaps(zones[self.channel_at], sizes):
            self.swap(first, second)
            moved += 2 * len(first)
        return moved

    def front(self, width: int) -> Tensor:
        """``[K]``: original channels of the first ``width`` positions."""
        return self._on_device(self.channel_at[:width].copy())

    def candidate_ranks(self, zones: Zones, sizes: Sizes) -> Tensor:
        """``[|C|]``: which of the candidates in ascending order stands at each place behind R, once they are placed."""
        ranks = np.cumsum(zones == 1) - 1
        return self._on_device(ranks[self.channel_at[sizes.retained : sizes.width]])

    def swap(self, first: Numbers, second: Numbers) -> None:
        """Exchange the channels at positions ``first[i]`` and ``second[i]``, disjoint and without repeats."""
        if not len(first):
            return
        self.moved = True
        self._swap(torch.from_numpy(first).to(self._device), torch.from_numpy(second).to(self._device))
        at = self.channel_at
        at[first], at[second] = at[second], at[first]
        self._position_of = None

    @uninterrupted()
    def restore(self) -> None:
        """Put every channel back: bit for bit, since only whole channels were ever exchanged."""
        if not self.moved:
            return
        for first, second in _involutions(self.channel_at.tolist()):
            self.swap(np.array(first, np.int64), np.array(second, np.int64))
        assert bool((self.channel_at[1:] > self.channel_at[:-1]).all())
        self.moved = False

    @torch.inference_mode(False)  # tensors that may be used in and out of inference mode
    def _on_device(self, numbers: Numbers) -> Tensor:
        return torch.from_numpy(numbers).to(self._device)


def zone_swaps(zones: Zones, sizes: Sizes) -> list[tuple[Numbers, Numbers]]:
    """The fewest exchanges that bring every channel into its zone, as two rounds of disjoint swaps.

    Parameters
    ----------
    zones : array
        ``[D]``: for each position the zone where its channel belongs: 0 retained, 1 candidate, 2 pruned.
    """
    home = np.repeat(np.arange(3, dtype=np.uint8), (sizes.retained, sizes.candidates, sizes.pruned))
    away = np.flatnonzero(zones != home)
    journeys = 3 * home[away] + zones[away]  # from which zone to which
    away = away[journeys.argsort(kind="stable")]
    ends = np.bincount(journeys, minlength=9).cumsum().tolist()
    strayed = {(i, j): away[ends[3 * i + j - 1] : ends[3 * i + j]] for i in range(3) for j in range(3) if i != j}
    firsts, seconds = [], []
    for i, j in ((0, 1), (0, 2), (1, 2)):  # pairs that are each in the other's zone
        n = min(len(strayed[i, j]), len(strayed[j, i]))
        firsts.append(strayed[i, j][:n])
        seconds.append(strayed[j, i][:n])
        strayed[i, j], strayed[j, i] = strayed[i, j][n:], strayed[j, i][n:]
    # what is left runs round the three zones one way or the other, and takes two exchanges each
    around = ((0, 1), (1, 2), (2, 0)) if len(strayed[0, 1]) else ((0, 2), (2, 1), (1, 0))
    a, b, c = (strayed[edge] for edge in around)
    return [(np.concatenate([*firsts, a]), np.concatenate([*seconds, b])), (a, c)]


def _involutions(channel_at: list[int]) -> list[tuple[list[int], list[int]]]:
    """Two rounds of disjoint swaps that sort a permutation: every cycle is a product of two reflections."""
    rounds: list[tuple[list[int], list[int]]] = [([], []), ([], [])]
    seen = [False] * len(channel_at)
    for start in range(len(channel_at)):
        cycle = []
        position = start
        while not seen[position]:
            seen[position] = True
            cycle.append(position)
            position = channel_at[position]
        n = len(cycle)
        # content of cycle[i] belongs to cycle[i + 1]: reflect i <-> n - 1 - i, then i <-> n - i
        for (firsts, seconds), total in zip(rounds, (n - 1, n), strict=True):
            for i in range(n):
                j = (total - i) % n
                if i < j:
                    firsts.append(cycle[i])
                    seconds.append(cycle[j])
    return rounds
