"""Targets of the whole model's speed and memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from measure import Verdict
from pop_mm.bench.memory import measure_memory
from pop_mm.bench.source import Source
from pop_mm.bench.variants import STOCK_DENSE, Cell, Setup, Variant

OF_LIMIT = 0.95  # of Amdahl's limit, with the row's kernels
SELECTION = 0.015  # scoring and selection, of a decode step
PROMPT_OVERHEAD = {"first": 0.08, "next": 0.04}  # statistics, partition, reordering, of a 512-token prefill
SPEEDUP_AT = 0.4
SPEEDUP = {"smollm2-135m": 1.5, "llama3.2-1b": 1.8}  # over stock dense, with the compiled kernel
MEMORY = 1.02  # of dense
MEMORY_RATIO = 0.4
PEAKS = {"whole": "whole process", "after_load": "after loading"}


def speed_verdicts(results: Mapping[str, Any], name: str, judged: bool) -> list[Verdict]:
    """Of the cell with 128 tokens in and out."""
    verdicts = []
    for row in results["rows"]:
        if row["method"] == "dense":
            continue
        what = f"whole model, {row['ratio']:.0%} overall, {row['kernels']} kernels"
        verdicts.append(
            Verdict(
                f"{what}: decode {row['speedup_same_kernels']:.2f} times as fast as dense on these kernels, "
                f"{row['fraction_of_limit']:.2f} of Amdahl's limit of {row['amdahl_limit']:.2f} (target {OF_LIMIT:.2f}; byte "
                f"limit {row['byte_limit']:.2f})",
                row["fraction_of_limit"] >= OF_LIMIT if judged else None,
            )
        )
        verdicts.append(
            Verdict(
                f"{what}: scoring and selection {row['selection_share']:.2%} of a step (target {SELECTION:.1%})",
                row["selection_share"] <= SELECTION if judged else None,
            )
        )
        if row["kernels"] == "compiled" and row["ratio"] == SPEEDUP_AT:
            target = SPEEDUP.get(name)
            known = "none for this model" if target is None else f"{target:.1f}"
            verdicts.append(
                Verdict(
                    f"{what}: decode {row['speedup']:.2f} times as fast as stock dense (target {known})",
                    row["speedup"] >= target if judged and target is not None else None,
                )
            )
    return verdicts


def prefill_verdicts(results: Mapping[str, Any], judged: bool) -> list[Verdict]:
    """Of the cell with the longer prompt."""
    return [
        Verdict(
            f"{row['prompt']}-token prefill, {row['ratio']:.0%} overall: statistics, partition and reordering of the {which} "
            f"prompt {row['prompt_overhead'][which]:.1%} (target {target:.0%})",
            row["prompt_overhead"][which] <= target if judged else None,
        )
        for row in results["rows"]
        if row["method"] != "dense"
        for which, target in PROMPT_OVERHEAD.items()
    ]


def memory_jobs(setup: Setup) -> tuple[tuple[Cell, Variant], tuple[Cell, Variant]]:
    """Dense and pruned, with stock kernels."""
    (cell,) = setup.cells()
    return (cell, STOCK_DENSE), (cell, Variant("pop", MEMORY_RATIO, "stock"))


def measure_peaks(source: Source, setup: Setup, repeats: int, tick: Any) -> dict[str, Any]:
    """Peak resident size dense and in place, and the ratio of the two."""
    dense, inplace = memory_jobs(setup)
    found = measure_memory(source, setup, (dense, inplace), repeats, tick)
    result: dict[str, Any] = {"repeats": repeats}
    for peak in PEAKS:
        before, after = found[dense][peak], found[inplace][peak]
        if before is not None and after is not None:
            result[peak] = {"dense_bytes": before, "inplace_bytes": after, "ratio": after / before}
    return result


def memory_table(result: Mapping[str, Any], name: str) -> Table:
    """One row for each peak."""
    table = Table(
        title=f"{name}, peak resident size, {MEMORY_RATIO:.0%} overall, median of {result['repeats']} processes"
    )
    for column in ("peak", "dense MiB", "in-place MiB", "ratio"):
        table.add_column(column, justify="right")
    for peak, words in PEAKS.items():
        if peak in result:
            row = result[peak]
            sizes = (f"{row[key] / 2**20:.0f}" for key in ("dense_bytes", "inplace_bytes"))
            table.add_row(words, *sizes, f"{row['ratio']:.3f}")
    return table


def memory_verdicts(result: Mapping[str, Any], judged: bool) -> list[Verdict]:
    """Both peaks."""
    return [
        Verdict(
            f"peak resident size, {words}: in-place {result[peak]['ratio']:.3f} of dense (target {MEMORY:.2f})",
            result[peak]["ratio"] <= MEMORY if judged else None,
        )
        for peak, words in PEAKS.items()
        if peak in result
    ]
