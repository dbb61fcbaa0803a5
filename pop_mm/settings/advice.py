"""Settings that are known to spoil the answers of a model of some size, from figures measured with SmolLM2-135M.

docs/results.md and docs/frontier.md have the figures: POP at 20 % overall has a KL to the dense model of 0.39 nats a token, at
40 % of 1.17, where its answers loop; at the bytes of a budget of 0.75 POP has 0.69, thresholds 0.03, and 0.54 at 0.45.
"""

from __future__ import annotations

import warnings
from typing import Any

from ..errors import PopWarning
from .config import PopConfig

_SMALL = (50e6, 1e9)  # parameters; nothing was measured below, and larger models suffer less
_MOST_OUT = 0.3  # overall, that POP may leave out of such a model
_FEWEST_READ = {"pop": 0.75, "static": 0.75, "thresholds": 0.45}  # of the layers' weights, with a budget
_said: set[str] = set()


def advice(parameters: int, config: PopConfig) -> str | None:
    """Why these settings will hardly give good answers from a model of that size, and what to take; None if unknown."""
    if not _SMALL[0] <= parameters < _SMALL[1]:
        return None
    model = f"a model of {parameters / 1e6:.0f} million parameters"
    method = config.chosen_method
    whole = 0.75 if config.scope == "ffn" else 1.0  # of the layers' weights, about, are FFNs
    if method not in _FEWEST_READ:
        return None
    remedy = "Take method='thresholds' with budget=0.65, or ratio=0.2"
    if config.ratio is not None and config.ratio * whole >= _MOST_OUT:
        asked = f"ratio={config.ratio:g}"
        measured = "at 40 % SmolLM2-135M has three times the perplexity of the whole model, and repeats itself"
    elif config.budget is not None and 1 - (1 - config.budget) * whole <= _FEWEST_READ[method]:
        asked = f"budget={config.budget:g}"
        if method == "thresholds":
            measured = "at 45 % SmolLM2-135M has 1.8 times the perplexity of the whole model"
            remedy = "Take budget=0.65 or more"
        else:
            asked += " with POP"
            measured = "at 75 % the KL to the whole model is 27 times that of thresholds (SmolLM2-135M)"
    else:
        return None
    return f"{asked} is known to break {model}: {measured}. {remedy}; `pop-mm eval` measures it on your text."


def advise(model: Any, config: PopConfig) -> None:
    """Warn once of each such case."""
    said = advice(sum(parameter.numel() for parameter in model.parameters()), config)
    if said is not None and said not in _said:
        _said.add(said)
        warnings.warn(said, PopWarning, stacklevel=3)


__all__ = ["advice", "advise"]
