"""``pop-mm inspect`` for thresholds: what would be thresholded, and the bytes that a decoded token would read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from ..adapters import Adapter
from ..config import PopConfig
from ..groups import InputGroup
from ..report import Timings
from ..session import PART_NAMES
from ..tables import footprint_table
from ..threshold_report import ThresholdReport
from ..threshold_session import ThresholdPlan, plan_thresholds
from .stored import StoredBytes

_NOT_PROBED: dict[str, Any] = {"contract": None, "finding": None}  # attention has no channels


def inspect_thresholds(
    model: Any,
    config: PopConfig,
    adapter: Adapter,
    packed: str | None,
    stored: StoredBytes | None,
    as_json: bool,
    contracts: Mapping[str, Any],
) -> None:
    """Print it; JSON has one row for each FFN, layer of experts and group of attention modules.

    ``packed`` says how the checkpoint is quantised, and ``stored`` what its files hold; None if it is not.
    ``contracts`` has more for the rows, by name.
    """
    plans = plan_thresholds(model, config, adapter)
    if packed is not None:  # the model here has no weights yet
        reason = f"the checkpoint is quantised ({packed}), and packed weights are not read by rows"
        plans = [replace(plan, backend="masked", reason=reason) if plan.backend == "rows" else plan for plan in plans]
    size = model.dtype.itemsize
    whole = [_bytes(plan, size, stored) for plan in plans]
    if as_json:
        rows = [
            {**_row(plan, dense), **contracts.get(plan.record.name, _NOT_PROBED if contracts else {})}
            for plan, dense in zip(plans, whole, strict=True)
        ]
        print(json.dumps(rows, indent=2))
        return
    report = ThresholdReport.of(model, adapter, config, plans, None, Timings())
    table = Table(box=box.SIMPLE_HEAD)
    for name in ("matrix", "inputs", "kept"):
        table.add_column(name, justify="left" if name == "matrix" else "right")
    for matrix, (share, _) in report.kept_share.items():
        table.add_row(matrix, str(sum(found.matrix == matrix for found in report.inputs)), f"{share:.1%}")
    parts = _dense_bytes(model, adapter, plans, report.weights_per_token, stored)
    read = dict(parts)
    for plan, dense in zip(plans, whole, strict=True):
        read[PART_NAMES.get(plan.record.role, plan.record.role)] -= dense * (1 - _share(plan))
    console = Console()
    console.print(table)
    console.print(footprint_table({name: (round(dense), round(read[name])) for name, dense in parts.items()}))
    console.print(
        f"{type(model).__name__}: {len(plans)} inputs of FFNs and attention, found by {type(adapter).__name__}.\n"
        f"{config.label.capitalize()} ({config.scope}). What a token reads is meant for entries that pick rows.",
        highlight=False,
    )
    for reason in dict.fromkeys(plan.reason for plan in plans if plan.backend == "masked"):
        console.print(f"Masked, without speed-up: {reason}.", style="yellow", highlight=False, markup=False)


def _dense_bytes(
    model: Any, adapter: Adapter, plans: Sequence[ThresholdPlan], counts: Mapping[str, int], stored: StoredBytes | None
) -> dict[str, float]:
    """Part -> bytes of its weight matrices that a decoded token reads from the dense model."""
    size = model.dtype.itemsize
    parts: dict[str, float] = {name: size * count for name, count in counts.items()}
    if stored is not None:
        for role, name in PART_NAMES.items():
            if name in parts:
                parts[name] = sum(_bytes(plan, size, stored) for plan in plans if plan.record.role == role)
        head = model.get_output_embeddings()
        parts["attention"] = stored.of_attention(model, adapter, counts["attention"])
        parts["lm_head"] = 0 if head is None else stored.of_head(head, counts["lm_head"], size)
    return parts


def _bytes(plan: ThresholdPlan, size: int, stored: StoredBytes | None) -> float:
    if stored is None:
        return size * sum(plan.matrices.values())
    return stored.of_group(plan.record) if isinstance(plan.record, InputGroup) else stored.of_ffn(plan.record)


def _share(plan: ThresholdPlan) -> float:
    return plan.read / sum(plan.matrices.values())


def _row(plan: ThresholdPlan, dense: float) -> dict[str, Any]:
    meant = round(dense * _share(plan))
    return {
        **plan.to_dict(),
        "bytes_per_token_dense": round(dense),
        "bytes_per_token_pruned": meant
        if plan.backend == "rows"
        else round(dense),  # what is masked is read all the same
        "bytes_per_token_intended": meant,
    }


__all__ = ["inspect_thresholds"]
