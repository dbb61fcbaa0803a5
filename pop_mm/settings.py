"""The keywords of :func:`pop_mm.prune` with their types, so that editors complete them and mypy checks them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from typing_extensions import TypedDict

from .methods import Method
from .scoring import Scorer


class Settings(TypedDict, total=False):
    """Fields of :class:`pop_mm.PopConfig`, which says what they mean."""

    ratio: float | None
    scope: Literal["overall", "ffn"]
    gamma: float
    prefill: Literal["dense", "partition"]
    batch: Literal["shared", "per_sequence"]
    backend: Literal["auto", "masked", "inplace"]
    scorer: str | Scorer
    layer_ratios: Mapping[int, float]
    round_to: int
    variant: Literal["pop", "static", "full"]
    min_tokens: int
    unseen: Literal["dense", "weights"]
    expert_score: Literal["plain", "routed"]
    prune_shared: bool
    modality_weights: Mapping[str, float]
    kernels: Literal["auto", "stock", "compiled", "triton"]
    probe_tokens: int
    budget: float | None
    method: str | Method
    head_budget: float | None
    tp_partition: Literal["shard", "global"]


def with_amount(settings: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Settings in which a ratio or budget that is given replaces either of them, and with it a method that does not take it.

    Parameters
    ----------
    settings : mapping
        Plain values, as ``PopConfig.changes`` gives them.
    given : mapping
        Has ``"ratio"`` or ``"budget"``, or neither; None is not given.
    """
    amounts = {name: given[name] for name in ("ratio", "budget") if given.get(name) is not None}
    if not amounts:
        return dict(settings)
    kept = {name: value for name, value in settings.items() if name not in ("ratio", "budget")}
    if "ratio" in amounts and kept.get("method") == "thresholds":
        del kept["method"]
    return {**kept, **amounts}


__all__ = ["Settings", "with_amount"]
