"""Settings as keywords of :func:`pop_mm.prune`, with their types, and as the plain values of command lines and files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from typing_extensions import TypedDict

from ..methods import ChannelMethod, Method, Thresholds
from .expert_policy import ExpertPolicy

OF_METHODS = (*ChannelMethod.settings, *Thresholds.settings)
OF_EXPERTS = {  # as command lines call them -> as :class:`ExpertPolicy` does
    "min_tokens": "min_tokens",
    "unseen": "unseen",
    "expert_score": "score",
    "prune_shared": "prune_shared",
}


class Settings(TypedDict, total=False):
    """Fields of :class:`pop_mm.PopConfig`, which says what they mean; so editors complete them and mypy checks them."""

    ratio: float | None
    scope: Literal["overall", "ffn"]
    batch: Literal["shared", "per_sequence"]
    backend: Literal["auto", "masked", "inplace"]
    layer_ratios: Mapping[int, float]
    modality_weights: Mapping[str, float]
    kernels: Literal["auto", "stock", "compiled", "triton"]
    budget: float | None
    method: str | Method
    experts: ExpertPolicy


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """Plain values as files have them, from values by bare names, as options and ``--model_args`` have them.

    Those of the method go under ``"method_settings"``, those of experts under ``"experts"``.
    """
    found = {name: value for name, value in values.items() if name not in (*OF_METHODS, *OF_EXPERTS)}
    method = {name: values[name] for name in OF_METHODS if name in values}
    experts = {own: values[name] for name, own in OF_EXPERTS.items() if name in values}
    for name, own in (("method_settings", method), ("experts", experts)):
        if own:
            found[name] = {**found.get(name, {}), **own}
    return found


def flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of :func:`nested`."""
    found = {name: value for name, value in values.items() if name not in ("method_settings", "experts")}
    experts = values.get("experts", {})
    own = {name: experts[its] for name, its in OF_EXPERTS.items() if its in experts}
    return {**found, **values.get("method_settings", {}), **own}


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


__all__ = ["OF_EXPERTS", "OF_METHODS", "Settings", "flat", "nested", "with_amount"]
