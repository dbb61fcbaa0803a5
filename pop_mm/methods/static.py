"""A static mask from the prompt: the paper's variant 1 (table 6)."""

from __future__ import annotations

from ..partition import Sizes, partition_sizes
from .base import ChannelMethod


class Static(ChannelMethod):
    """The prompt's best channels, the same at every step: there are no candidates."""

    name = "static"
    about = "the prompt's best channels by POP's score, at every step (the paper's variant 1)"

    def sizes(self, channels: int, ratio: float, gamma: float, round_to: int = 1) -> Sizes:
        """R and P alone, but for rounding."""
        return partition_sizes(channels, ratio, 0.0, round_to, "static")


__all__ = ["Static"]
