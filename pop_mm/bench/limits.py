"""How much faster a decode step could be: by the bytes that it reads, and by the share of its time that the FFNs take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..adapters import adapter_for
from ..config import PopConfig
from ..experts import Experts
from ..report import FFNPlan
from ..session import PART_NAMES, plan_ffns, weights_per_token


@dataclass(frozen=True)
class StepBytes:
    """Bytes that one decode step of a batch reads, by part. Biases, norms, routers and embedding rows are not counted.

    Attributes
    ----------
    parts : dict of str to float
        "attention", "lm_head", "KV cache", and as the model has them "FFN", "routed experts", "shared experts".
    """

    parts: dict[str, float]

    @property
    def ffn(self) -> float:
        """Of all kinds of FFNs."""
        return sum(self.parts.get(name, 0) for name in PART_NAMES.values())

    @property
    def total(self) -> float:
        """Of all parts."""
        return sum(self.parts.values())


def step_bytes(model: Any, config: PopConfig, batch: int, context: float) -> StepBytes:
    """What a decode step of ``batch`` rows reads from the model's own tensors; weights are read once for all rows.

    An FFN in place is read on K = |R| + |C| of its D channels, a gathered one on K for each row, at most D, and a masked one
    whole. Of E routed experts,
    ``min(batch * top_k, E)`` count: how many different ones a batch really needs is not known beforehand.

    Parameters
    ----------
    config : PopConfig
        ``PopConfig(0.0)`` is the dense model.
    context : float
        Positions in the KV cache of each row.
    """
    adapter = adapter_for(model)
    plans = plan_ffns(model, config, adapter)
    size = model.dtype.itemsize
    parts: dict[str, float] = {name: size * count for name, count in weights_per_token(model, adapter, plans).items()}
    for role, name in PART_NAMES.items():
        if name in parts:
            parts[name] = size * sum(_weights_read(plan, batch) for plan in plans if plan.ffn.role == role)
    return StepBytes({**parts, "KV cache": cache_bytes(model, batch, context)})


def _weights_read(plan: FFNPlan, batch: int) -> float:
    count: float = plan.ffn.weight_count
    if isinstance(plan.ffn, Experts):
        count *= min(batch * plan.ffn.top_k, plan.ffn.count) / plan.ffn.top_k
    width, whole = plan.sizes.width, plan.sizes.channels
    return count * {"inplace": width, "gathered": min(batch * width, whole)}.get(plan.backend, whole) / whole


@torch.no_grad()
def cache_bytes(model: Any, batch: int, context: float) -> float:
    """Bytes of keys and values of ``batch`` rows of ``context`` positions, as a forward of two tokens leaves them.

    A layer with a sliding window holds no more positions than that; states of linear attention are not counted.
    """
    ids = torch.ones(1, 2, dtype=torch.long, device=model.device)
    cache = model(input_ids=ids, use_cache=True).past_key_values
    total = 0.0
    for layer in getattr(cache, "layers", ()):
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        if keys is not None and values is not None:
            window = getattr(layer, "sliding_window", None) or context
            total += (keys.nbytes + values.nbytes) / keys.shape[-2] * min(context, window)
    return batch * total


def amdahl_limit(ffn_share: float, ffn_bytes: float) -> float:
    """``T / (T - F + F * b)``: the dense step's time T with that of the FFNs, F, scaled by their bytes.

    Parameters
    ----------
    ffn_share : float
        F / T, measured.
    ffn_bytes : float
        b, the FFNs' bytes pruned : dense.
    """
    return 1 / (1 - ffn_share + ffn_share * ffn_bytes)


__all__ = ["StepBytes", "amdahl_limit", "cache_bytes", "step_bytes"]
