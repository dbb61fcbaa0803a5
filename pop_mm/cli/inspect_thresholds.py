"""``pop-mm inspect`` for thresholds: what would be thresholded, and the bytes that a decoded token would read."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from ..adapters import Adapter
from ..config import PopConfig
from ..groups import InputGroup
from ..session import PART_NAMES, weights_per_token
from ..tables import footprint_table
from ..threshold_report import ThresholdReport
from ..threshold_session import ThresholdPlan, plan_thresholds


def inspect_thresholds(model: Any, config: PopConfig, adapter: Adapter, packed: str | None, as_json: bool) -> None:
    """Print it; JSON has one row for each FFN, layer of experts and group of attention modules.

    ``packed`` says how the checkpoint is quantised; None if it is not.
    """
    from ..report import Timings

    plans = plan_thresholds(model, config, adapter)
    if packed is not None:  # the model here has no weights yet
        reason = f"the checkpoint is quantised ({packed}), and packed weights are not read by rows"
        plans = [replace(plan, backend="masked", reason=reason) if plan.backend == "rows" else plan for plan in plans]
    size = model.dtype.itemsize
    if as_json:
        print(json.dumps([_row(plan, size) for plan in plans], indent=2))
        return
    report = ThresholdReport.of(model, adapter, config, plans, None, Timings())
    table = Table(box=box.SIMPLE_HEAD)
    for name in ("matrix", "inputs", "kept"):
        table.add_column(name, justify="left" if name == "matrix" else "right")
    for matrix, (share, _) in report.kept_share.items():
        table.add_row(matrix, str(sum(found.matrix == matrix for found in report.inputs)), f"{share:.1%}")
    dense = weights_per_token(model, adapter, [plan for plan in plans if not isinstance(plan.record, InputGroup)])  # type: ignore[misc]
    parts = {name: (size * count, size * count) for name, count in dense.items()}
    for plan in plans:
        name = PART_NAMES.get(plan.record.role, plan.record.role)
        left = sum(plan.matrices.values()) - plan.read
        parts[name] = parts[name][0], parts[name][1] - round(size * left)
    console = Console()
    console.print(table)
    console.print(footprint_table(parts))
    console.print(
        f"{type(model).__name__}: {len(plans)} inputs of FFNs and attention, found by {type(adapter).__name__}.\n"
        f"{config.label.capitalize()} ({config.scope}). What a token reads is meant for entries that pick rows.",
        highlight=False,
    )
    for reason in dict.fromkeys(plan.reason for plan in plans if plan.backend == "masked"):
        console.print(f"Masked, without speed-up: {reason}.", style="yellow", highlight=False, markup=False)


def _row(plan: ThresholdPlan, size: int) -> dict[str, Any]:
    whole = size * sum(plan.matrices.values())  # what is masked is read all the same
    meant = round(size * plan.read)
    read = meant if plan.backend == "rows" else whole
    return {
        **plan.to_dict(),
        "bytes_per_token_dense": whole,
        "bytes_per_token_pruned": read,
        "bytes_per_token_intended": meant,
    }


__all__ = ["inspect_thresholds"]
