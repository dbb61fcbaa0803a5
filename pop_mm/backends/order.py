"""The order of channels in the weights: how it is changed with the fewest exchanges, and put back exactly."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..partition import Partition, Sizes


class ChannelOrder:
    """The present order of one FFN's (or one expert's) channels in its weights.

    Parameters
    ----------
    size : int
        D, how many channels there are.
    device : torch.device
        Where the weights are.
    swap : callable
        ``swap(first, second)`` exchanges channels in the weights, as :meth:`pop_mm.layout.FFN.swap`.

    Attributes
    ----------
    channel_at : Tensor
        ``[D]``: original channel at each position.
    position_of : Tensor
        ``[D]``: position of each original channel.
    moved : bool
        Whether the order differs from the original one.
    """

    def __init__(self, size: int, device: torch.device, swap: Callable[[Tensor, Tensor], None]) -> None:
        self._swap = swap
        self.channel_at = torch.arange(size, device=device)
        self.position_of = self.channel_at.clone()
        self.moved = False

    def target_zones(self, partition: Partition) -> Tensor:
        """``[D]``: for each position the zone where its channel belongs: 0 retained, 1 candidate, 2 pruned."""
        zones = torch.zeros_like(self.channel_at, dtype=torch.uint8)
        zones[self.position_of[partition.candidates]] = 1
        zones[self.position_of[partition.pruned]] = 2
        return zones

    def place(self, partition: Partition, zones: Tensor) -> int:
        """Bring R to the front and C behind it; how many channels moved.

        ``zones`` is what :meth:`target_zones` gave, on the host.
        """
        moved = 0
        for first, second in zone_swaps(zones, partition.sizes):
            self.swap(first, second)
            moved += 2 * len(first)
        return moved

    def candidates(self, partition: Partition) -> Tensor:
        """``[|C|]``: which of the candidates in ascending order stands at each place behind R."""
        return torch.searchsorted(
            partition.candidates, self.channel_at[partition.sizes.retained : partition.sizes.width]
        )

    def swap(self, first: Tensor, second: Tensor) -> None:
        """Exchange the channels at positions ``first[i]`` and ``second[i]``."""
        if not len(first):
            return
        self.moved = True
        first, second = first.to(self.channel_at.device), second.to(self.channel_at.device)
        self._swap(first, second)
        at = self.channel_at.clone()
        at[first], at[second] = self.channel_at[second], self.channel_at[first]
        self.channel_at = at
        self.position_of = torch.empty_like(at).scatter_(0, at, torch.arange(len(at), device=at.device))

    def restore(self) -> None:
        """Put every channel back: bit for bit, since only whole channels were ever exchanged."""
        if not self.moved:
            return
        for first, second in _involutions(self.channel_at.tolist()):
            self.swap(torch.tensor(first), torch.tensor(second))
        assert bool((self.channel_at[1:] > self.channel_at[:-1]).all())
        self.moved = False


def zone_swaps(zones: Tensor, sizes: Sizes) -> list[tuple[Tensor, Tensor]]:
    """The fewest exchanges that bring every channel into its zone, as two rounds of disjoint swaps.

    Parameters
    ----------
    zones : Tensor
        ``[D]`` on the host, from :meth:`ChannelOrder.target_zones`.
    """
    here = torch.tensor([0, 1, 2], dtype=zones.dtype).repeat_interleave(
        torch.tensor([sizes.retained, sizes.candidates, sizes.pruned])
    )
    strayed = {(i, j): ((here == i) & (zones == j)).nonzero().squeeze(-1) for i in range(3) for j in range(3) if i != j}
    firsts, seconds = [], []
    for i, j in ((0, 1), (0, 2), (1, 2)):  # pairs that are each in the other's zone
        n = min(len(strayed[i, j]), len(strayed[j, i]))
        firsts.append(strayed[i, j][:n])
        seconds.append(strayed[j, i][:n])
        strayed[i, j], strayed[j, i] = strayed[i, j][n:], strayed[j, i][n:]
    # what is left runs round the three zones one way or the other, and takes two exchanges each
    around = ((0, 1), (1, 2), (2, 0)) if len(strayed[0, 1]) else ((0, 2), (2, 1), (1, 0))
    a, b, c = (strayed[edge] for edge in around)
    return [(torch.cat([*firsts, a]), torch.cat([*seconds, b])), (a, c)]


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
