"""POP (arXiv 2602.06822) and its ablations: the sizes of an FFN's R, C and P, by a ratio or by a budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import lcm

from ..config import PopConfig
from ..experts import Experts
from ..layout import FFN
from ..partition import Sizes, partition_sizes
from ..ratio import LayerWeights, ffn_ratios
from .budget import pop_ratio


def ffn_sizes(ffn: FFN | Experts, ratio: float, config: PopConfig) -> Sizes:
    """R, C and P of one FFN; experts' are rounded to what their products are aligned to."""
    round_to = lcm(config.round_to, 16 // ffn.float_dtype.itemsize) if isinstance(ffn, Experts) else config.round_to
    return partition_sizes(ffn.size, ratio, config.gamma, round_to, config.variant)


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
            kept_whole = ffn.role == "shared_expert" and not config.prune_shared
            most = 1 - 1 / ffn.size
            sizes = ffn_sizes(ffn, 0.0 if kept_whole else min(by_layer[ffn.layer], most), config)
            found += ffn.weight_count * sizes.width / sizes.channels
        return found / total

    return ratios(min(pop_ratio(read, config.chosen_method, budget), *(1 - 1 / ffn.size for ffn in records)))


__all__ = ["budget_ratios", "ffn_sizes"]
