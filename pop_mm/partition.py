"""The partition of an FFN's channels into R, C and P: pure tensor functions (paper, section 3.2).

Every function works on the last axis, so leading axes can be rows of a batch or experts of a layer. Sizes are exact
integers that depend on (channels, ratio, gamma) alone: no shape ever depends on the prompt.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import ConfigError


@dataclass(frozen=True)
class Sizes:
    """How many channels of one FFN are in each part.

    Attributes
    ----------
    channels : int
        D, the intermediate size.
    retained : int
        |R|, active at every decode step.
    candidates : int
        |C|, scored again at every decode step.
    candidates_kept : int
        How many of the candidates a step keeps.
    """

    channels: int
    retained: int
    candidates: int
    candidates_kept: int

    @property
    def pruned(self) -> int:
        """|P|, out for the whole prompt."""
        return self.channels - self.retained - self.candidates

    @property
    def kept(self) -> int:
        """Active channels at every decode step."""
        return self.retained + self.candidates_kept

    @property
    def width(self) -> int:
        """K = |R| + |C|: the channels whose gate and up a decode step computes."""
        return self.retained + self.candidates

    @property
    def candidates_dropped(self) -> int:
        """Candidates that a step leaves out."""
        return self.candidates - self.candidates_kept

    @property
    def dense(self) -> bool:
        """Whether nothing is ever left out."""
        return self.kept == self.channels


def partition_sizes(channels: int, ratio: float, gamma: float, round_to: int = 1, variant: str = "pop") -> Sizes:
    """Sizes of R, C and P for one FFN (paper 3.2; exact integers instead of quantile thresholds).

    Parameters
    ----------
    channels : int
        D, the intermediate size.
    ratio : float
        Share of the FFN's channels to leave out at each step, in [0, 1).
    gamma : float
        Wanted |C| / D, in [0, 1]; clamped to what the ratio allows (|C| / 2 fits on both sides of the cut).
    round_to : int
        |R| + |C| is rounded up to a multiple of this with the best channels of P; ``kept`` does not change.
    variant : {"pop", "static", "full"}
        The paper's ablations (table 6): ``static`` has no candidates, in ``full`` every channel is one.

    Raises
    ------
    ConfigError
        The ratio is so near 1 that no channel is left.
    """
    kept = channels - int(ratio * channels + 1e-6)
    if kept == 0:
        raise ConfigError(
            f"A ratio of {ratio!r} leaves none of an FFN's {channels} channels; it must not exceed {1 - 1 / channels:.6g}."
        )
    if variant == "full":
        return Sizes(channels, 0, channels, kept)
    half = min(round(gamma * channels / 2), kept, channels - kept) if variant == "pop" else 0
    width = min(channels, -(-(kept + half) // round_to) * round_to)
    retained = kept - half
    return Sizes(channels, retained, width - retained, half)


@dataclass(frozen=True)
class Partition:
    """R, C and P of one FFN (or of several, along leading axes), as ascending original channel numbers.

    Attributes
    ----------
    retained, candidates, pruned : Tensor
        ``[..., |R|]``, ``[..., |C|]``, ``[..., |P|]``, int64.
    sizes : Sizes
    """

    retained: Tensor
    candidates: Tensor
    pruned: Tensor
    sizes: Sizes

    def __getitem__(self, index: int | Tensor) -> Partition:
        """The same along the first leading axis: one of the partitions, or some of them."""
        return Partition(self.retained[index], self.candidates[index], self.pruned[index], self.sizes)

    def front(self) -> Tensor:
        """R and C together, ``[..., K]``: the channels that a decode step computes."""
        return torch.cat([self.retained, self.candidates], -1)

    def zones(self) -> Tensor:
        """``[..., D]``, uint8: 0 for each channel of R, 1 of C, 2 of P."""
        shape = (*self.pruned.shape[:-1], self.sizes.channels)
        zones = torch.zeros(shape, dtype=torch.uint8, device=self.pruned.device)
        return zones.scatter_(-1, self.candidates, 1).scatter_(-1, self.pruned, 2)

    def allowed(self) -> Tensor:
        """Boolean ``[..., D]``: true on R and C."""
        shape = (*self.pruned.shape[:-1], self.sizes.channels)
        return torch.ones(shape, dtype=torch.bool, device=self.pruned.device).scatter_(-1, self.pruned, False)


def partition(scores: Tensor, sizes: Sizes) -> Partition:
    """Rank the channels by score and cut the ranking into R, C and P; ties go to the lower channel number.

    Parameters
    ----------
    scores : Tensor
        ``[..., D]``, finite.
    """
    zones = 2 - _best(scores, sizes.retained) - _best(scores, sizes.width)
    by_zone = zones.argsort(dim=-1, stable=True)  # of small integers, several times as fast as of scores
    retained, candidates, pruned = by_zone.split([sizes.retained, sizes.candidates, sizes.pruned], -1)
    return Partition(retained, candidates, pruned, sizes)


def _best(scores: Tensor, count: int) -> Tensor:
    """``[..., D]``, uint8: 1 for the ``count`` highest scores; ties go to the lower channel number."""
    channels = scores.shape[-1]
    if count in (0, channels):
        return torch.full_like(scores, bool(count), dtype=torch.uint8)
    if scores.is_cpu:
        last = scores.kthvalue(channels - count + 1, -1, keepdim=True).values
    else:  # where kthvalue may not be had in deterministic mode
        last = scores.sort(-1, descending=True).values[..., count - 1 : count]
    above, tied = scores > last, scores == last
    wanted = count - above.sum(-1, keepdim=True, dtype=torch.int32)
    return (above | (tied & (tied.cumsum(-1, dtype=torch.int32) <= wanted))).to(torch.uint8)
