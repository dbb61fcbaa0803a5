"""Decode speed through ``generate``, dense and pruned in turn."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..bench.timing import generate, generate_timed
from ..session.session import prune
from ..settings.config import PopConfig


@dataclass(frozen=True)
class Speed:
    """Of one setting, at batch 1; decode steps alone, without prefill and without turning weights.

    Attributes
    ----------
    dense_tokens_per_s, tokens_per_s : float
        Medians over rounds.
    speedups : list of float
        Of each round: pruned over the dense model on torch's kernels.
    """

    dense_tokens_per_s: float
    tokens_per_s: float
    speedups: list[float]

    @property
    def speedup(self) -> float:
        """Median over rounds."""
        return statistics.median(self.speedups)


def measure_speed(
    model: Any,
    config: PopConfig,
    prompts: Sequence[Tensor],
    new_tokens: int,
    rounds: int,
    tick: Callable[[], object],
    reference: Any = None,
) -> Speed:
    """Decode speed of a setting beside the dense model's.

    Parameters
    ----------
    prompts : sequence of Tensor
        ``[1, tokens]`` each; a round has one of them.
    new_tokens : int
        Decoded in a round by each, exactly.
    rounds : int
        The model that comes first changes from round to round.
    tick : callable
        Called after each round.
    reference : PreTrainedModel, optional
        The dense model, if it is another one.
    """
    dense = model if reference is None else reference
    found: dict[bool, list[float]] = {False: [], True: []}
    for number in range(rounds):
        ids = prompts[number % len(prompts)]
        for pruned in (False, True) if number % 2 == 0 else (True, False):
            gc.collect()
            with prune(model, config) if pruned else nullcontext():
                generate(model if pruned else dense, ids, 2)  # a first call is slower, and turns the weights
                run = generate_timed(model if pruned else dense, ids, new_tokens)
            found[pruned].append((new_tokens - 1) / run.decode)
        tick()
    ratios = [mine / other for other, mine in zip(found[False], found[True], strict=True)]
    return Speed(statistics.median(found[False]), statistics.median(found[True]), ratios)


__all__ = ["Speed", "measure_speed"]
