"""The results of a benchmark as tables for the terminal, and as a picture."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table

from ..report.tables import byte_size
from .parts import STEP_PARTS

NOTES = (
    "Medians over rounds; in brackets quartiles. Speed-ups: decode (first to last new token, with the prompt's ranking and "
    "reordering) over dense with stock kernels in the same round; same kernels: over dense with the row's, or beside rows with "
    "the fastest there are. Limits: what the bytes of a step allow, and Amdahl's, which scales the dense time of what is pruned "
    "by its bytes; of limit: same kernels / Amdahl.",
    "Parts: milliseconds of the median decode step, in runs of their own. Statistics, partition and reordering: once a prompt, "
    "and of the prefill's forward without them, for a session's first prompt and for its next one.",
)
Row = Mapping[str, Any]


SHORT_NOTE = (
    "Medians over rounds. Tokens/s: of decode, all rows together. Speed-up: over dense with stock kernels. Same kernels: over "
    "dense with the row's. --wide has the rest: times, limits, memory, and where the time goes."
)


def print_tables(console: Console, results: Mapping[str, Any], wide: bool = True) -> None:
    """Both tables of every cell, and how to read them; as wide as they are where there is no terminal.

    Not ``wide``: one table of four columns.
    """
    for (batch, prompt, cache), found in groupby(results["rows"], lambda r: (r["batch"], r["prompt"], r["cache"])):
        rows = list(found)
        title = (
            f"{results['model']} ({results['setup']['dtype']}, {results['setup']['device']}): batch {batch}, {prompt} tokens in, "
            f"{rows[0]['new_tokens']} out, {cache} cache{', compiled' if rows[0]['compile'] else ''}"
        )
        if not wide:
            console.print(short_table(rows, title))
            continue
        for table in (speed_table(rows, title), parts_table(rows)):
            width = Measurement.get(console, console.options.update(max_width=1000), table).maximum
            if not console.is_terminal:
                console.width = max(console.width, width)
            console.print(table)
    for note in (*(NOTES if wide else (SHORT_NOTE,)), *results["notes"]):
        console.print(note, style="dim", highlight=False, markup=False, soft_wrap=wide)


def short_table(rows: Sequence[Row], title: str) -> Table:
    """One row for each variant: tokens a second, and how much faster that is."""
    table = Table(title=escape(title), box=box.SIMPLE_HEAD, title_justify="left")
    for name in ("setting", "tokens/s", "speed-up", "same kernels"):
        table.add_column(name, justify="left" if name == "setting" else "right")
    for row in rows:
        pruned = row["method"] != "dense"
        speedup = f"{row['speedup']:.2f}x" if pruned or row["kernels"] != "stock" else "-"
        same = f"{row['speedup_same_kernels']:.2f}x" if pruned else "-"
        table.add_row(", ".join(_names(row)), f"{row['decode_tokens_per_s']:.1f}", speedup, same)
    return table


def speed_table(rows: Sequence[Row], title: str) -> Table:
    """One row for each variant of a cell."""
    heads = ["prefill s", "first token s", "decode tokens/s", "step ms", "speed-up", "same kernels"]
    table = _table(title, [*heads, "byte limit", "Amdahl", "of limit", "end to end s", "peak memory"])
    for row in rows:
        speedup = f"{row['speedup']:.2f} {_span(row['speedup_quartiles'])}"
        same = f"{row['speedup_same_kernels']:.2f} {_span(row['speedup_same_kernels_quartiles'])}"
        pruned = row["method"] != "dense"
        table.add_row(
            *_names(row),
            f"{row['prefill_s']:.3f}",
            f"{row['ttft_s']:.3f}",
            f"{row['decode_tokens_per_s']:.1f}",
            f"{1e3 * row['step_s']:.2f}",
            speedup if pruned or row["kernels"] != "stock" else "-",
            same if pruned else "-",
            f"{row['byte_limit']:.2f}" if pruned else "-",
            f"{row['amdahl_limit']:.2f}" if pruned else "-",
            f"{row['fraction_of_limit']:.2f}" if pruned else "-",
            f"{row['end_to_end_s']:.2f} ({row['end_to_end_speedup']:.2f}x)",
            "-" if row["peak_memory_bytes"] is None else byte_size(row["peak_memory_bytes"]),
        )
    return table


def parts_table(rows: Sequence[Row]) -> Table:
    """Where the time of a decode step goes, and what a prompt pays."""
    table = _table("", ["FFN", "attention", "lm_head", "scoring, selection", "framework"])
    for name in ("statistics", "partition", "reordering"):
        table.add_column(f"{name} ms\nfirst / next", justify="right", no_wrap=True)
    table.add_column("of prefill\nfirst / next", justify="right", no_wrap=True)
    for row in rows:
        step, prompt = row["step_parts_s"], row["prompt_parts_s"]
        cells = {name: f"{1e3 * step[name]:.2f}" for name in (*STEP_PARTS, "framework")}
        once = ["-"] * 4
        if row["method"] == "dense":
            cells["selection"] = "-"
        else:
            cells["selection"] += f" ({row['selection_share']:.1%})"
            pair = (prompt["first"], prompt["next"])
            names = ("statistics", "partition", "reordering")
            once = [" / ".join(f"{1e3 * parts[name]:.1f}" for parts in pair) for name in names]
            once.append(" / ".join(f"{row['prompt_overhead'][key]:.1%}" for key in ("first", "next")))
        table.add_row(*_names(row), *cells.values(), *once)
    return table


def _table(title: str, heads: Sequence[str]) -> Table:
    table = Table(title=escape(title), box=box.SIMPLE_HEAD, title_justify="left")
    for name in ("method", "kernels"):
        table.add_column(name, no_wrap=True)
    for name in heads:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _names(row: Row) -> list[str]:
    masked = " (masked)" if "masked" in row["backends"] else ""
    ratio = "" if row["ratio"] is None else f" {100 * row['ratio']:.4g}%"
    budget = "" if row["budget"] is None else f" budget {row['budget']:.4g}"
    return [row["method"] + ratio + budget + masked, row["kernels"]]


def _span(quartiles: Sequence[float]) -> str:
    return f"[{quartiles[0]:.2f}, {quartiles[1]:.2f}]"


def plot(results: Mapping[str, Any], path: str | Path) -> Path:
    """Decode speed-up of every row, cell by cell, with its quartiles and both limits.

    Raises
    ------
    PlotError
        As :func:`pop_mm.report.plotting.check_path` and :func:`pop_mm.report.plotting.save`.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from ..report.plotting import check_path, save

    target = check_path(path)
    cells = [list(found) for _, found in groupby(results["rows"], lambda r: (r["batch"], r["prompt"], r["cache"]))]
    columns = min(len(cells), 3)
    lines = -(-len(cells) // columns)
    longest = max(map(len, cells))
    size = (1.5 + columns * (1 + 0.55 * longest), 0.8 + 3.4 * lines)
    figure = Figure(figsize=size, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    colours = {"stock": "#0072B2", "compiled": "#D55E00", "triton": "#009E73", "rows": "#CC79A7"}
    axes = figure.subplots(lines, columns, sharey=True, squeeze=False).flatten()
    for axis, rows in zip(axes, cells, strict=False):
        for place, row in enumerate(rows):
            low, high = row["speedup_quartiles"]
            error = [[max(row["speedup"] - low, 0)], [max(high - row["speedup"], 0)]]
            axis.bar(place, row["speedup"], color=colours[row["kernels"]], width=0.7, yerr=error, capsize=2)
            if row["method"] != "dense":
                base = row["speedup"] / row["speedup_same_kernels"]  # dense on the row's kernels
                for limit, mark in (("byte_limit", "_"), ("amdahl_limit", "D")):
                    axis.plot(place, base * row[limit], mark, color="black", markersize=14 if mark == "_" else 5)
        axis.set_xticks(range(len(rows)), [" ".join(_names(row)) for row in rows], rotation=45, ha="right", fontsize=8)
        axis.set_title(f"batch {rows[0]['batch']}, {rows[0]['prompt']} in, {rows[0]['cache']} cache", fontsize=10)
        axis.axhline(1, color="#999999", linewidth=0.8)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[len(cells) :]:
        axis.set_visible(False)
    axes[0].set_ylabel("decode speed-up over stock dense")
    marks = "Line: byte limit; diamond: Amdahl limit, both over dense on the same kernels"
    title = f"{results['model']}, {results['setup']['dtype']}. {marks}"
    figure.suptitle(textwrap.fill(title, max(40, int(12 * size[0]))), x=0.01, ha="left", fontsize=9)
    return save(figure, target)


__all__ = ["plot", "print_tables"]
