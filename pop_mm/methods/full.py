"""The choice among all channels: the paper's variant 2 (table 6), an upper bound on quality."""

from __future__ import annotations

from ..partition import Sizes, partition_sizes
from .base import ChannelMethod


class Full(ChannelMethod):
    """Every channel is a candidate, so every channel is computed."""

    name = "full"
    about = "the best of all channels at every step; saves nothing (the paper's variant 2)"
    saves_time = False

    def sizes(self, channels: int, ratio: float, gamma: float, round_to: int = 1) -> Sizes:
        """C alone."""
        return partition_sizes(channels, ratio, 0.0, round_to, "full")


__all__ = ["Full"]
