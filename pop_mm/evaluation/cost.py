"""What a decoded token costs at batch 1: multiply-adds and bytes of weights, by part, for what really happened."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from ..adapters import adapter_for
from ..config import PopConfig
from ..experts import Experts
from ..report import FFNReport, Report
from ..session import PART_NAMES, plan_ffns, weights_per_token
from ..threshold_report import ThresholdReport

_SCORE_BYTES = 4  # a candidate's weight in the score is float32


@dataclass(frozen=True)
class Cost:
    """Of one decoded token at batch 1, by part of the model. Biases, norms, routers and the KV cache are not counted.

    Attributes
    ----------
    multiply_adds, bytes : dict of str to int
        "attention", "lm_head", and as the model has them "FFN", "routed experts", "shared experts"; "scoring" is what
        choosing among the candidates adds.
    """

    multiply_adds: dict[str, int]
    bytes: dict[str, int]

    def to_dict(self, dense: Cost) -> dict[str, Any]:
        """Plain values, with the shares of what the dense model costs."""
        return {
            "multiply_adds": self.multiply_adds,
            "bytes": self.bytes,
            "multiply_adds_share": sum(self.multiply_adds.values()) / sum(dense.multiply_adds.values()),
            "bytes_share": sum(self.bytes.values()) / sum(dense.bytes.values()),
        }


def dense_cost(model: Any) -> Cost:
    """Of the model as it is."""
    return cost_of(model, PopConfig(0.0), None)


def cost_of(model: Any, config: PopConfig, report: Report | ThresholdReport | None) -> Cost:
    """Of the steps that a session reports, decoded in place.

    Gate, up and down are read on the channels R and C (in place they are a narrow view), and whole where the weights
    cannot be moved; a routed expert is whole as long as it has no partition. Evaluation itself masks, which reads all.

    Parameters
    ----------
    config : PopConfig
        The session's.
    report : Report or None
        None for a dense model.
    """
    if isinstance(report, ThresholdReport):
        return _of_thresholds(model, report)
    adapter = adapter_for(model)
    plans = plan_ffns(model, replace(config, batch="shared", backend="auto"), adapter)
    parts = weights_per_token(model, adapter, plans)
    scored = 0
    if report is not None:
        for role, name in PART_NAMES.items():
            if name in parts:
                pairs = zip(plans, report.ffns, strict=True)
                mine = [(plan, known) for plan, known in pairs if plan.ffn.role == role]
                parts[name] = round(
                    sum(p.ffn.weight_count * (_read(known) if p.backend == "inplace" else 1) for p, known in mine)
                )
        for plan in plans:
            choices = plan.ffn.top_k if isinstance(plan.ffn, Experts) else 1
            scored += choices * plan.sizes.candidates if plan.backend != "dense" else 0
    return Cost(
        {**parts, **({"scoring": scored} if scored else {})},
        {
            **{name: count * model.dtype.itemsize for name, count in parts.items()},
            **({"scoring": scored * _SCORE_BYTES} if scored else {}),
        },
    )


def _of_thresholds(model: Any, report: ThresholdReport) -> Cost:
    """Of the rows that a step's entries pick, one for each that passes."""
    parts = {name: float(count) for name, count in report.weights_per_token.items()}
    for found in report.inputs:
        kept = found.share if found.kept is None else found.kept
        parts[PART_NAMES.get(found.plan.record.role, found.plan.record.role)] -= found.weights * (1 - kept)
    counts = {name: round(count) for name, count in parts.items()}
    return Cost(counts, {name: count * model.dtype.itemsize for name, count in counts.items()})


def _read(known: FFNReport) -> float:
    """Share of an FFN's channels that a step computes; for experts, the mean over the tokens that they got."""
    width = known.plan.sizes.width / known.plan.sizes.channels
    if known.experts is None or not sum(known.experts.decode_tokens):
        return width
    dense = sum(known.experts.dense_tokens) / sum(known.experts.decode_tokens)
    return dense + (1 - dense) * width


__all__ = ["Cost", "cost_of", "dense_cost"]
