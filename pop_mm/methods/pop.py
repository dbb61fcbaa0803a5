"""POP, the paper's method (Chen et al. 2026, arXiv 2602.06822, sections 3.2 and 3.3)."""

from __future__ import annotations

from ..partition import Sizes, partition_sizes
from .base import ChannelMethod


class Pop(ChannelMethod):
    """R and P are fixed by the prompt; each step scores the candidates C again and keeps the better half."""

    name = "pop"
    about = "Partition-guided Online Pruning, the paper"

    def sizes(self, channels: int, ratio: float, gamma: float, round_to: int = 1) -> Sizes:
        """Half of C lies on each side of the cut."""
        return partition_sizes(channels, ratio, gamma, round_to, "pop")


__all__ = ["Pop"]
