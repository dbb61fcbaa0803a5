"""From the overall ratio that the paper quotes to the ratio of each FFN (paper, table 8)."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from ..errors import ConfigError

_EXACT = 1e-9  # what floats round away
_ROUNDING = 1e-3  # what users round away


@dataclass(frozen=True)
class LayerWeights:
    """Weights that one decoder layer reads per token, without biases and norms.

    Attributes
    ----------
    attention : int
        Attention projections (and other token mixers).
    ffn : int
        FFN projections; of routed experts, the top-k that a token uses.
    """

    attention: int
    ffn: int


def ffn_ratios(
    ratio: float, scope: str, layers: Mapping[int, LayerWeights], overrides: Mapping[int, float]
) -> dict[int, float]:
    """The FFN ratio of every layer.

    With ``scope="overall"`` one ratio r solves ``sum(r_l * ffn_l) = ratio * sum(attention_l + ffn_l)``; overridden
    layers keep their own r_l. Without overrides this is the paper's ``ratio * (P_attn + P_ffn) / P_ffn``.

    Raises
    ------
    ConfigError
        An override of a layer without an FFN; an overall ratio that the FFNs alone cannot give (the message names the
        largest ratio that they can), or that overrides of every FFN contradict.
    """
    prunable = [layer for layer, weights in layers.items() if weights.ffn]
    unknown = sorted(set(overrides) - set(prunable))
    if unknown:
        raise ConfigError(f"layer_ratios names layers {unknown}; layers with a prunable FFN: {_span(prunable)}.")
    free = [layer for layer in prunable if layer not in overrides]
    uniform = ratio
    total = sum(w.attention + w.ffn for w in layers.values())
    fixed = sum(r * layers[layer].ffn for layer, r in overrides.items())
    if scope == "overall" and not free and abs(fixed / total - ratio) > _ROUNDING:
        raise ConfigError(
            f"layer_ratios sets every FFN, and these ratios leave out {fixed / total:.1%} overall instead of the ratio of "
            f"{ratio:g}. Leave a layer out of layer_ratios, or set ratio={fixed / total:.3f}, or scope='ffn', where each "
            "FFN's own ratio is all that counts."
        )
    if scope == "overall" and free:
        free_ffn = sum(layers[layer].ffn for layer in free)
        uniform = (ratio * total - fixed) / free_ffn
        if uniform >= 1:
            largest = math.floor((free_ffn + fixed) / total * 1000) / 1000  # rounded up, it would not work
            raise ConfigError(
                f"An overall ratio of {ratio:g} needs {uniform:.1%} of every FFN, since attention is not pruned. The "
                f"ratio must stay below {largest:.3f} for this model; or set scope='ffn' to give the FFN's own ratio."
            )
        if fixed / total > ratio + _EXACT:
            raise ConfigError(
                f"layer_ratios alone leave out {fixed / total:.1%}, more than the overall ratio of {ratio:g}. Lower "
                "them, or raise the ratio."
            )
        uniform = max(uniform, 0.0)
    return {layer: overrides.get(layer, uniform) for layer in layers}


def _span(layers: Collection[int]) -> str:
    numbers = sorted(layers)
    if numbers and numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f"{numbers[0]} to {numbers[-1]}"
    return ", ".join(map(str, numbers)) or "none"
