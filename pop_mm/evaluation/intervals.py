"""Means over texts with bootstrap intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

RESAMPLES = 10_000
_AT_ONCE = 1 << 21  # values that are drawn at once


@dataclass(frozen=True)
class Interval:
    """A figure over all texts with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float

    def to_list(self) -> list[float]:
        """``[value, low, high]``."""
        return [self.value, self.low, self.high]


def bootstrap(
    values: Sequence[float] | Tensor, base: Sequence[float] | Tensor | None = None, seed: int = 0
) -> Interval:
    """Mean over texts, or the quotient of two means, with a 95 % interval.

    Texts are resampled, the same ones for both (paired): texts differ more than methods do.

    Parameters
    ----------
    values, base : sequence of float or Tensor
        One value a text.
    """
    values = torch.as_tensor(values, dtype=torch.float64)
    base = None if base is None else torch.as_tensor(base, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for size in torch.arange(RESAMPLES).split(max(1, _AT_ONCE // len(values))):
        picks = torch.randint(len(values), (len(size), len(values)), generator=generator)
        part = values[picks].mean(-1)
        parts.append(part if base is None else part / base[picks].mean(-1))
    resampled, value = torch.cat(parts), values.mean() if base is None else values.mean() / base.mean()
    low, high = resampled.quantile(torch.tensor([0.025, 0.975], dtype=resampled.dtype)).tolist()
    return Interval(float(value), low, high)


def difference(values: Sequence[float], other: Sequence[float], seed: int = 0) -> Interval:
    """Mean of ``values - other``, text by text (paired), with a 95 % interval."""
    return bootstrap([a - b for a, b in zip(values, other, strict=True)], seed=seed)


__all__ = ["Interval", "bootstrap", "difference"]
