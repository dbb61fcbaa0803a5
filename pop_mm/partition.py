"""The partition of an FFN's channels and the choice among its candidates: pure tensor functions (paper, sections 3.2-3.3).

Every function works on the last axis, so leading axes can be rows of a batch or experts of a layer. Sizes are exact
integers that depend on (channels, ratio, gamma) alone: no shape ever depends on the prompt.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import ConfigError

Choose = Callable[[Tensor, Tensor | None, Tensor], None]  # what :func:`step_chooser` makes


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


def dropped_candidates(scores: Tensor, sizes: Sizes) -> Tensor:
    """Which candidates a step leaves out: the lowest scores (paper 3.3).

    Parameters
    ----------
    scores : Tensor
        ``[..., |C|]``, one score a candidate, not negative. A score that is not finite ranks last.

    Returns
    -------
    Tensor
        ``[..., |C| - candidates_kept]``, int64 indices into the candidates.
    """
    ranked = torch.nan_to_num(scores, -1.0, -1.0)
    return torch.topk(ranked, sizes.candidates_dropped, -1, False, False)[1]


def shared_scores(candidates: Tensor, weight: Tensor, valid: Tensor | None) -> Tensor:
    """Scores for one choice that all sequences of a batch share: their norm over the sequences (paper 3.3).

    Parameters
    ----------
    candidates : Tensor
        ``[B, ..., |C|]``.
    weight : Tensor
        ``[|C|]``.
    valid : Tensor or None
        ``[B, ...]``, boolean: tokens that have a say, of more than one sequence.

    Returns
    -------
    Tensor
        ``[..., |C|]``.
    """
    if len(candidates) == 1:
        return (candidates[0] * weight).abs_()
    squared = candidates.to(weight.dtype).square()
    if valid is not None:
        squared = squared.masked_fill(~valid.unsqueeze(-1), 0)
    return squared.sum(0).sqrt_().mul_(weight)


def step_chooser(weight: Tensor, sizes: Sizes) -> Choose:
    """:func:`dropped_candidates` for steps of one token of each sequence.

    For one sequence in as few operations as it can be done: each costs more than its few numbers.

    Parameters
    ----------
    weight : Tensor
        ``[|C|]``, float32 or float64: of each candidate, not negative.

    Returns
    -------
    callable
        Takes activations of R and C, one token of each sequence ``[B, K]``, which it zeroes where a candidate is left out; which
        tokens have a say, ``[B]`` or None; and room for the indices of what is left out, ``[1, n]`` int64.
    """
    integer = {torch.float32: torch.int32, torch.float64: torch.int64}[weight.dtype]
    scores = torch.empty(1, len(weight), dtype=weight.dtype, device=weight.device)
    keys = torch.empty(1, len(weight), dtype=integer, device=weight.device)
    values = torch.empty(1, sizes.candidates_dropped, dtype=integer, device=weight.device)
    # twice the bits of a float rank as its magnitude does, without the sign; shifted so that infinity is the lowest integer
    bits = scores.view(integer)
    infinity = torch.full((1, 1), torch.inf, dtype=weight.dtype, device=weight.device)
    shift = torch.iinfo(integer).min - 2 * infinity.view(integer)

    def leave_out(h: Tensor, valid: Tensor | None, dropped: Tensor) -> None:
        candidates = h.narrow(1, sizes.retained, sizes.candidates)
        if len(h) > 1:
            found = dropped_candidates(shared_scores(candidates.detach(), weight, valid), sizes)
            candidates.scatter_(1, dropped.copy_(found).expand(len(h), -1), 0)
            return
        torch.mul(candidates.detach() if h.requires_grad else candidates, weight, out=scores)
        torch.add(shift, bits, alpha=2, out=keys)
        torch.topk(keys, sizes.candidates_dropped, -1, False, False, out=(values, dropped))
        candidates.scatter_(1, dropped, 0)

    return leave_out
