"""From a budget, the share of weight bytes that a decoded token may read, to what a method keeps of each matrix."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import ConfigError
from ..partition import Sizes
from .ratio import LayerWeights, ffn_ratios
from .thresholds import hidden_share

if TYPE_CHECKING:
    from ..settings.config import PopConfig
    from ..weights.experts import Experts
    from ..weights.layout import FFN

_HALVINGS = 60  # of [0, 1], which ends below what floats tell apart


@dataclass(frozen=True)
class Weights:
    """Weights that a decoded token reads from the dense model, by what decides about them.

    Attributes
    ----------
    x : int
        Of matrices whose input is thresholded as it is: attention, gate and up.
    h : int
        Of down projections.
    dense : int
        Of what is always read whole.
    """

    x: int
    h: int
    dense: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.x + self.h + self.dense

    def read(self, rho: float, kappa: float) -> float:
        """Share of them that is read where so much of x and h is kept."""
        return (self.x * rho + self.h * kappa + self.dense) / self.total


def threshold_shares(weights: Weights, budget: float) -> tuple[float, float]:
    """Rho and kappa, the shares of x and h to keep, so that a token reads ``budget`` of the weights.

    Raises
    ------
    ConfigError
        What stays dense takes as much by itself.
    """
    if budget == 1:
        return 1.0, 1.0
    _check_minimum("thresholds", budget, weights.read(0, 0))
    rho = least(lambda rho: -weights.read(rho, hidden_share(rho)), -budget)
    return rho, hidden_share(rho)


def pop_ratio(read: Callable[[float], float], method: str, budget: float) -> float:
    """The ratio of every FFN at which POP, or a variant of it, reads ``budget`` of the weights, or a little less.

    Parameters
    ----------
    read : callable
        From a ratio in [0, 1) to the share of the weights that is read: R and C of gate, up and down.

    Raises
    ------
    ConfigError
        Even the largest ratio reads more.
    """
    if budget == 1:
        return 0.0
    _check_minimum(method, budget, read(1 - 2**-20))
    return 1 - least(lambda kept: -read(1 - kept), -budget)


def least(falling: Callable[[float], float], bound: float) -> float:
    """The largest number in [0, 1] at which a falling function is still ``bound`` or more."""
    low, high = 0.0, 1.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if falling(middle) >= bound else (low, middle)
    return low


def _check_minimum(method: str, budget: float, minimum: float) -> None:
    if budget <= minimum:
        named = math.ceil(1000 * minimum + 1e-6) / 1000
        what = "it reads every channel" if minimum >= 1 else "the rest is always read"
        advice = "Give ratio= instead." if minimum >= 1 else f"The budget must be more than {named:.3f}."
        raise ConfigError(
            f"A budget of {budget:g} cannot be met by method={method!r} on this model, which reads at least {minimum:.1%} "
            f"of these weights: {what}. {advice}"
        )


def ffn_sizes(ffn: FFN | Experts, ratio: float, config: PopConfig) -> Sizes:
    """R, C and P of one FFN by the config's method; experts' are rounded to what their products are aligned to."""
    method = config.channel_method
    return method.sizes(ffn.size, ratio, method.gamma, 1 if ffn.experts is None else 16 // ffn.float_dtype.itemsize)


def budget_ratios(
    records: Sequence[FFN | Experts], layers: Mapping[int, LayerWeights], config: PopConfig
) -> dict[int, float]:
    """The FFN ratio of every layer with which a token reads ``config.budget`` of the weights in ``config.scope``.

    Layers in ``layer_ratios`` keep their own; the others have one ratio. A budget of 1 leaves nothing out.

    Raises
    ------
    ConfigError
        Even one channel of each FFN reads more (the message names the minimum).
    """
    budget = config.budget
    assert budget is not None
    attention = sum(weights.attention for weights in layers.values()) if config.scope == "overall" else 0
    total = attention + sum(ffn.weight_count for ffn in records)

    def ratios(ratio: float) -> dict[int, float]:
        return ffn_ratios(ratio, "ffn", layers, config.layer_ratios)

    def read(ratio: float) -> float:
        by_layer, found = ratios(ratio), float(attention)
        for ffn in records:
            kept_whole = ffn.role == "shared_expert" and not config.experts.prune_shared
            most = 1 - 1 / ffn.size
            sizes = ffn_sizes(ffn, 0.0 if kept_whole else min(by_layer[ffn.layer], most), config)
            found += ffn.weight_count * sizes.width / sizes.channels
        return found / total

    return ratios(min(pop_ratio(read, config.chosen_method, budget), *(1 - 1 / ffn.size for ffn in records)))


__all__ = ["Weights", "budget_ratios", "ffn_sizes", "pop_ratio", "threshold_shares"]
