"""The keywords of :func:`pop_mm.prune` with their types, so that editors complete them and mypy checks them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

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


__all__ = ["Settings"]
