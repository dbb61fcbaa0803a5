"""How much faster a decode step could be: by the bytes that it reads, and by the share of its time that what is pruned takes."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch

from ..adapters import adapter_for
from ..report.footprint import FFN_PARTS, AsStored, footprint
from ..session.plans import plans_of
from ..settings.config import PopConfig
from ..tracking.caches import cache_of


@dataclass(frozen=True)
class StepBytes:
    """Bytes that one decode step of a batch reads, by part. Biases, norms, routers and embedding rows are not counted.

    Attributes
    ----------
    parts : dict of str to float
        "attention", "lm_head", "KV cache", and as the model has them "FFN", "routed experts", "shared experts".
    projections : float
        Of attention's, those of modules that thresholds can leave inputs out of.
    """

    parts: dict[str, float]
    projections: float = 0.0

    @property
    def ffn(self) -> float:
        """Of all kinds of FFNs."""
        return sum(self.parts.get(name, 0) for name in FFN_PARTS.values())

    @property
    def total(self) -> float:
        """Of all parts."""
        return sum(self.parts.values())


def backends_of(model: Any, config: PopConfig, batch: int) -> dict[str, int]:
    """How many of the plans run on each backend in a step of ``batch`` rows; rows are read for one sequence alone."""
    found = Counter(plan.backend for plan in plans_of(model, config))
    if batch > 1 and (count := found.pop("rows", 0)):
        found["masked"] += count
    return dict(found)


def step_bytes(model: Any, config: PopConfig, batch: int, context: float) -> StepBytes:
    """What a decode step of ``batch`` rows reads from the model's own tensors; weights are read once for all rows.

    The weights are those of :func:`pop_mm.footprint.footprint`.

    Parameters
    ----------
    config : PopConfig
        ``PopConfig(0.0)`` is the dense model.
    context : float
        Positions in the KV cache of each row.
    """
    adapter = adapter_for(model)
    found = footprint(model, adapter, plans_of(model, config), batch=batch)
    groups = sum(map(AsStored(model).of_record, adapter.input_groups(model)))
    left_out = found.dense["attention"] - found.read["attention"]
    return StepBytes({**found.read, "KV cache": cache_bytes(model, batch, context)}, groups - left_out)


@torch.no_grad()
def cache_bytes(model: Any, batch: int, context: float) -> float:
    """Bytes of keys and values of ``batch`` rows of ``context`` positions, as a forward of two tokens leaves them.

    A layer with a sliding window holds no more positions than that; states of linear attention are not counted.
    """
    ids = torch.ones(1, 2, dtype=torch.long, device=model.device)
    cache = cache_of(model(input_ids=ids, use_cache=True))
    total = 0.0
    for layer in getattr(cache, "layers", ()):
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        if keys is not None and values is not None:
            window = getattr(layer, "sliding_window", None) or context
            total += (keys.nbytes + values.nbytes) / keys.shape[-2] * min(context, window)
    return batch * total


def amdahl_limit(ffn_share: float, ffn_bytes: float, other_share: float = 0.0, other_bytes: float = 1.0) -> float:
    """``T / (T - F + F * b)``: the dense step's time T with that of the FFNs, F, scaled by their bytes.

    Parameters
    ----------
    ffn_share : float
        F / T, measured.
    ffn_bytes : float
        b, the FFNs' bytes pruned : dense.
    other_share, other_bytes : float
        Likewise of what else is pruned: attention's projections.
    """
    return 1 / (1 - ffn_share * (1 - ffn_bytes) - other_share * (1 - other_bytes))


__all__ = ["StepBytes", "amdahl_limit", "backends_of", "cache_bytes", "step_bytes"]
