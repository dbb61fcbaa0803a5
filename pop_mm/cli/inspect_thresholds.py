"""``pop-mm inspect`` for thresholds: what would be thresholded, and the bytes that a decoded token would read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from ..adapters import Adapter
from ..decoding.timings import Timings
from ..report.footprint import WeightBytes, footprint
from ..report.tables import SCOPES, footprint_table
from ..report.threshold_report import ThresholdReport
from ..session.threshold_session import ThresholdPlan, plan_thresholds
from ..settings.config import PopConfig

_NOT_PROBED: dict[str, Any] = {"contract": None, "finding": None}  # attention has no channels


def inspect_thresholds(
    model: Any,
    config: PopConfig,
    adapter: Adapter,
    packed: str | None,
    weights: WeightBytes,
    as_json: bool,
    contracts: Mapping[str, Any],
    weight_format: str = "auto",
) -> None:
    """Print it; JSON has one row for each FFN, layer of experts and group of attention modules.

    ``packed`` says how the checkpoint is quantised; None if it is not.
    ``contracts`` has more for the rows, by name.
    """
    plans = plan_thresholds(model, config, adapter)
    if packed is not None:  # the model here has no weights yet
        reason = f"the checkpoint is quantised ({packed}), and packed weights are not read by rows"
        plans = [replace(plan, backend="masked", reason=reason) if plan.backend == "rows" else plan for plan in plans]
    if as_json:
        rows = [
            {
                **_row(plan, weights.of_record(plan.record)),
                "weight_format": weight_format,
                **contracts.get(plan.record.name, _NOT_PROBED if contracts else {}),
            }
            for plan in plans
        ]
        print(json.dumps(rows, indent=2))
        return
    report = ThresholdReport.of(model, adapter, config, plans, None, Timings())
    table = Table(box=box.SIMPLE_HEAD)
    for name in ("matrix", "inputs", "kept"):
        table.add_column(name, justify="left" if name == "matrix" else "right")
    for matrix, (share, _) in report.kept_share.items():
        table.add_row(matrix, str(sum(found.matrix == matrix for found in report.inputs)), f"{share:.1%}")
    console = Console()
    console.print(table)
    meant = [plan.share_intended for plan in plans]
    console.print(footprint_table(footprint(model, adapter, plans, meant, weights)))
    console.print(
        f"{type(model).__name__}: {len(plans)} inputs of FFNs and attention, found by {type(adapter).__name__}.\n"
        f"Budget {config.budget:g} of {SCOPES[config.scope]}. Pruned: what a token is meant to read.",
        highlight=False,
    )
    for reason in dict.fromkeys(plan.reason for plan in plans if plan.backend == "masked"):
        console.print(f"Masked, without speed-up: {reason}.", style="yellow", highlight=False, markup=False)


def _row(plan: ThresholdPlan, dense: float) -> dict[str, Any]:
    return {
        **plan.to_dict(),
        "bytes_per_token_dense": round(dense),
        "bytes_per_token_pruned": round(dense * plan.share_read()),  # what is masked is read all the same
        "bytes_per_token_intended": round(dense * plan.share_intended),
    }


__all__ = ["inspect_thresholds"]
