"""What a weight was made of that somebody put in the place of one whose channels stand elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Literal

import torch
from torch import Tensor

from ..weights.exchange import Matrix

_LIKE = 0.7  # cosine of what was made of a weight, where few channels tell
_FEWEST = 64  # numbers that can be alike by more than chance
_ALIKE, _SHARE = 0.99, 0.1  # cosine of a channel with the one that it was made of; how many of those that are looked at
_CHANNELS, _NUMBERS, _FEWEST_OF_A_CHANNEL = 64, 256, 24  # that are compared with every channel

Origin = Literal["moved", "unclear", "other"]


class _Likeness:
    """How like two lists of numbers are, which come in pieces."""

    def __init__(self) -> None:
        self._product = self._a = self._b = 0.0

    def add(self, a: Tensor, b: Tensor) -> None:
        """One more piece of each."""
        self._product += float((a * b).sum())
        self._a += float(a.square().sum())
        self._b += float(b.square().sum())

    @property
    def cosine(self) -> float:
        """Without its sign; 0 of zeros."""
        return abs(self._product) / (self._a * self._b) ** 0.5 if self._a and self._b else 0.0

    @property
    def rest(self) -> float:
        """Share of the squares of the first that is left of it without its multiple of the second."""
        return 1 - self.cosine**2


def _magnitudes(values: Tensor) -> Tensor:
    sizes = values.abs()
    return sizes - sizes.mean() if sizes.numel() else sizes


def origin(
    new: Tensor,
    stored: Tensor,
    matrices: Callable[[Tensor, int | None], Iterable[Matrix]],
    positions: Mapping[int | None, Tensor],
) -> Origin:
    """What a weight was made of.

    Parameters
    ----------
    new, stored : Tensor
        The weight, and the one that it replaced, with its channels as they stand.
    matrices : callable
        As :class:`pop_mm.weights.exchange.ChannelTensor` has it.
    positions : mapping
        Expert (None for a dense FFN) -> ``[D]``, the position of each original channel in ``stored``.

    Returns
    -------
    {"moved", "unclear", "other"}
        ``"moved"``: what stood there, times one number, so that its channels stand there too. ``"unclear"``: made of it in a
        way that leaves their order unknown, or of what stood there before other channels moved. ``"other"``: neither.
    """
    standing, own, magnitudes, own_magnitudes = _Likeness(), _Likeness(), _Likeness(), _Likeness()
    channels = numbers = 0
    elsewhere: list[Tensor] = []
    for expert, at in positions.items():
        moved = (at != torch.arange(len(at), device=at.device)).nonzero().flatten()
        channels += len(moved)
        for (after, axis), (before, _) in zip(matrices(new, expert), matrices(stored, expert), strict=True):
            found = after.index_select(axis, moved.to(after.device)).to(before.device, torch.float64)
            here = before.index_select(axis, moved).double()
            there = before.index_select(axis, at[moved]).double()
            numbers += found.numel()
            standing.add(found, here)
            own.add(found, there)
            magnitudes.add(_magnitudes(found), _magnitudes(here))
            own_magnitudes.add(_magnitudes(found), _magnitudes(there))
            if found.shape[1 - axis] >= _FEWEST_OF_A_CHANNEL:
                elsewhere.append(_stood_elsewhere(found, before, axis, moved, at))
    narrowest = max(torch.finfo(t.dtype).eps if t.is_floating_point() else 0 for t in (new, stored))
    if standing.rest < own.rest and standing.rest <= max(16 * narrowest**2, 1e-12):
        return "moved"
    alike = any(
        a.cosine - b.cosine > min(_LIKE, 8 / max(channels, 1) ** 0.5)
        for a, b in ((standing, own), (magnitudes, own_magnitudes))
    )
    if numbers >= _FEWEST and alike:
        return "unclear"
    return "unclear" if elsewhere and float(torch.cat(elsewhere).double().mean()) > _SHARE else "other"


def _stood_elsewhere(found: Tensor, stored: Tensor, axis: int, moved: Tensor, at: Tensor) -> Tensor:
    """Of some moved channels, boolean: whether each is like one that stands neither at its place nor where it belongs."""
    step = -(-found.shape[1 - axis] // _NUMBERS)
    some = torch.arange(0, len(moved), -(-max(len(moved), 1) // _CHANNELS), device=moved.device)

    def unit(matrix: Tensor) -> Tensor:
        rows = (matrix if axis == 0 else matrix.t())[:, ::step].double()
        return torch.nn.functional.normalize(rows, dim=1)

    likeness = (unit(found.index_select(axis, some)) @ unit(stored).t()).abs()
    places = torch.stack([moved[some], at[moved[some]]], 1)
    expected = likeness.gather(1, places).amax(1)
    best = likeness.amax(1)
    return (best > _ALIKE) & (expected < best - 0.05)
