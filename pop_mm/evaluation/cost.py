"""What a decoded token costs at batch 1: multiply-adds and bytes of weights, by part, for what really happened."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..adapters import adapter_for
from ..report.footprint import Plan, Uniform, footprint
from ..report.report import Report
from ..report.threshold_report import ThresholdReport
from ..session.session import plan_ffns
from ..settings.config import PopConfig

_SCORE_BYTES = 4  # a candidate's weight in the score is float32


@dataclass(frozen=True)
class Cost:
    """Of one decoded token at batch 1, by part of the model. Biases, norms, routers and the KV cache are not counted.

    Attributes
    ----------
    multiply_adds, bytes : dict of str to int
        "attention", "lm_head", and as the model has them "FFN", "routed experts", "shared experts"; "scoring" is what
        choosing among the candidates adds in multiply-adds. Bytes are those of :func:`pop_mm.footprint.footprint`.
    """

    multiply_adds: dict[str, int]
    bytes: dict[str, int]

    def to_dict(self, dense: Cost) -> dict[str, Any]:
        """Plain values, with the shares of what the dense model costs; the bytes of the scorer's weights count in no sum."""
        scored = self.multiply_adds.get("scoring")
        return {
            "multiply_adds": self.multiply_adds,
            "bytes": {**self.bytes, **({"scoring": scored * _SCORE_BYTES} if scored else {})},
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
    adapter = adapter_for(model)
    scored = 0
    if isinstance(report, ThresholdReport):
        plans: Sequence[Plan] = report.plans
        shares = report.shares_kept
    else:
        plans = ffns = plan_ffns(model, replace(config, batch="shared", backend="auto"), adapter)
        shares = [plan.share_read() for plan in ffns]
        if report is not None:
            for number, (plan, found) in enumerate(zip(ffns, report.ffns, strict=True)):
                if plan.backend == "inplace":
                    shares[number] = found.share_kept
                if plan.backend != "dense":
                    scored += plan.sizes.candidates * plan.ffn.used
    counts, sizes = (footprint(model, adapter, plans, shares, weights).read for weights in (Uniform(1), None))
    return Cost({**counts, **({"scoring": scored} if scored else {})}, dict(sizes))


__all__ = ["Cost", "cost_of", "dense_cost"]
