"""What the terminal shows: the report of a session, the plan of a model, and the support table."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from ..session.planning import FFNPlan
from ..weights.experts import Experts
from .paragraphs import Paragraphs, number_of
from .report import Report

if TYPE_CHECKING:
    from ..samples import Sample
    from .footprint import Footprint

SCOPES = {"overall": "attention and FFNs", "ffn": "FFNs"}  # what a ratio or budget is a share of
FFN_COLUMNS = ("layer", "channels", "active per step", "backend")  # of a narrow terminal
_MOST_ROWS = 96  # a table with more rows than this is summed up over layers


def report_table(report: Report, width: int | None = None) -> list[RenderableType]:
    """The summary of a session and one row per FFN; equal or very many rows are summed up.

    Parameters
    ----------
    width : int, optional
        Of the terminal: where the table does not fit, it has four columns alone.

    Returns
    -------
    list of RenderableType
        To be printed one after the other.
    """
    table = _ffn_table("active per step", "kept candidates that the next step keeps too")
    runs = _runs(report.ffns, lambda ffn: ffn.plan, lambda ffn: (ffn.active_per_step, ffn.stability))
    for run in runs:
        active = _span([ffn.active_per_step for ffn in run], _number)
        stay = _span([ffn.stability for ffn in run], lambda share: f"{share:.0%}")
        table.add_row(*_plan_cells([ffn.plan for ffn in run]), active, stay, run[0].plan.backend)
    return [report_summary(report), *narrowed(table, FFN_COLUMNS, width), *_routing_table(report)]


def narrowed(table: Table, columns: Sequence[str], width: int | None) -> list[RenderableType]:
    """The table, with some of its columns alone where it does not fit the width without breaking words."""
    if width is None or least_width(table) <= width:
        return [table]
    return [only(table, columns)]


def only(table: Table, columns: Sequence[str]) -> Table:
    """A table with some of the columns."""
    kept = [column for column in table.columns if column.header in columns]
    found = Table(box=table.box)
    for column in kept:
        found.add_column(column.header, justify=column.justify, no_wrap=column.no_wrap)
    for cells in zip(*(column.cells for column in kept), strict=True):
        found.add_row(*cells)
    return found


def least_width(table: Table) -> int:
    """Characters that a table needs where cells may wrap between words."""
    cells = ([column.header, *column.cells] for column in table.columns)
    wraps = [not column.no_wrap for column in table.columns]
    longest = (
        max(
            (len(part) for cell in column for part in (str(cell).split() if wrap else str(cell).splitlines())),
            default=0,
        )
        for column, wrap in zip(cells, wraps, strict=True)
    )
    return sum(longest) + 3 * len(table.columns) + 1


def _routing_table(report: Report) -> list[RenderableType]:
    """One row per layer with experts: where the router sent the tokens, and what became of the experts."""
    layers = [(ffn.plan.ffn.layer, ffn.experts) for ffn in report.ffns if ffn.experts is not None]
    if not layers:
        return []
    table = Table(box=box.SIMPLE_HEAD, title="Routed experts", title_justify="left")
    for name in ("layer", "prompt tokens\nof an expert", "decode tokens\nof an expert"):
        table.add_column(name, justify="right")
    for name in ("partitioned", "late", "dense", "overlap\n(by chance)"):
        table.add_column(name, justify="right")
    for layer, found in layers:
        overlap = "-" if found.overlap is None else f"{found.overlap:.0%} ({found.overlap_by_chance:.0%})"
        counts = (len(found.partitioned), len(found.late), len(found.dense))
        spans = (_span(found.prompt_tokens, _number), _span(found.decode_tokens, _number))
        table.add_row(str(layer), *spans, *map(str, counts), overlap)
    return [table]


def report_summary(report: Report) -> Paragraphs:
    """A few lines: settings, backends, tokens, times and everything that needs saying."""
    config, times = report.config, report.timings
    lines = [_settings(report)]
    if len(report.modality_tokens) > 1:
        counts = ", ".join(f"{count} {name}" for name, count in report.modality_tokens.items())
        overlaps = [ffn.modality_overlap for ffn in report.ffns]
        shares = {name: [found[name] for found in overlaps if name in found] for name in report.modality_tokens}
        alone = ", ".join(f"{name} {sum(found) / len(found):.0%}" for name, found in shares.items() if found)
        kept = "Of the channels kept for the answer, each kind of token alone would have kept"
        lines.append(f"Prompt tokens: {counts}. {kept}: {alone}.")
    if not times.prefill_forwards:
        lines.append("No prompt has been processed yet.")
    else:
        steps = f"{number_of(times.decode_forwards, 'decode step')}"
        lines.append(
            f"{number_of(report.prompt_tokens, 'prompt token')} in the latest prompt; prefill "
            f"{_seconds(times.prefill)}, {steps} {_seconds(times.decode)}; choosing channels "
            f"{_seconds(times.partitioning)} and moving {report.moved_channels} of them {_seconds(times.moving)}."
        )
    if report.left_out_share is not None:
        lines.append(
            f"Of all weights that a token reads from the dense model, a decode step left out {report.left_out_share:.1%}."
        )
    if config.chosen_method != "pop":
        lines.append(f"Method {config.chosen_method!r}, for comparison: not POP itself.")
    return Paragraphs.summary(lines, report.notes)


def _settings(report: Report) -> str:
    config, method = report.config, report.config.channel_method
    ratios = sorted({ffn.plan.ratio for ffn in report.ffns})
    own = " to ".join(f"{r:.1%}" for r in dict.fromkeys((ratios[0], ratios[-1]))) if ratios else "nothing"
    of = SCOPES[config.scope]
    asked = f"all but a budget of {config.budget:.0%}" if config.ratio is None else f"{config.ratio:.0%}"
    kernel = {"compiled": " (compiled kernel)", "triton": " (Triton kernels)"}.get(report.kernels, "")
    backends = ", ".join(
        f"{count} {name}{kernel if name in ('inplace', 'gathered') else ''}" for name, count in report.backends.items()
    )
    return (
        f"POP: {asked} of {of} left out ({own} of an FFN), gamma {method.gamma:g}, {method.prefill} prefill, {config.batch} "
        f"batch. FFNs: {backends}."
    )


def answers_table(answers: Mapping[str, Mapping[str, Any]]) -> RenderableType:
    """Answers side by side, each with its decode speed, and as a factor of the first one's.

    Parameters
    ----------
    answers : mapping of str to mapping
        Title to ``{"text": str, "decode_tokens_per_s": float or None}``.
    """
    first = next(iter(answers.values()))["decode_tokens_per_s"]
    grid = Table.grid(expand=True, padding=(0, 1))
    panels: list[RenderableType] = []
    for title, answer in answers.items():
        grid.add_column(ratio=1)
        speed = answer["decode_tokens_per_s"]
        factor = f" ({speed / first:.2f}x)" if speed and first and panels else ""
        figure = f"{speed:.1f} tokens/s{factor}" if speed else "too short to time"
        text = answer["text"].strip()
        body = Text(text, overflow="fold") if text else Text("(the model ended its answer at once)", style="dim")
        panels.append(Panel(body, title=Text(title), subtitle=Text(figure)))
    grid.add_row(*panels)
    return grid


def footprint_table(found: Footprint) -> Table:
    """Bytes that a decoded token reads, dense and pruned, with their quotient: the most that pruning can gain."""
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("read per decoded token")
    for name in ("dense", "pruned", "byte limit"):
        table.add_column(name, justify="right")
    rows = [(name, size, found.read[name]) for name, size in found.dense.items()]
    for name, dense, pruned in (*rows, ("total", found.dense_total, found.total)):
        limit = f"{dense / pruned:.2f}x" if pruned and dense else "-"
        style = "bold" if name == "total" else ""
        table.add_row(name, byte_size(dense), byte_size(pruned), limit, style=style)
    return table


def samples_table(samples: Iterable[Sample]) -> Table:
    """The sample models."""
    table = Table(box=box.SIMPLE_HEAD)
    for name in ("name", "what it is", "licence"):
        table.add_column(name)
    for sample in samples:
        table.add_row(*map(Text, (sample.name, sample.description, sample.licence)))
    return table


def plan_table(plans: Sequence[FFNPlan], wide: bool = True) -> Table:
    """One row per FFN of what a session would do; equal rows are summed up. Four columns if not ``wide``."""
    table = _ffn_table("active per step")
    for run in _runs(plans, lambda plan: plan, lambda plan: plan.reason):
        table.add_row(*_plan_cells(run), str(run[0].sizes.kept), run[0].backend)
    return table if wide else only(table, FFN_COLUMNS)


def adapter_rows(support: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, str, str]]:
    """The support table with one row per adapter: its model types, kind, layout and name."""
    groups: dict[tuple[str, str, str], list[str]] = {}
    for row in support:
        groups.setdefault((row["kind"], row["layout"], row["adapter"]), []).append(row["model_type"])
    order = {"dense": 0, "moe": 1, "vlm": 2}
    rows = [(", ".join(sorted(types)), *key) for key, types in groups.items()]
    return sorted(rows, key=lambda row: (order.get(row[1], 3), "refused" in row[2], -len(row[0]), row[0]))


def adapters_table(support: Sequence[Mapping[str, Any]]) -> Table:
    """The support table for the terminal."""
    rows = adapter_rows(support)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))  # fits 80 columns
    for name, cells in zip(("model types", "kind", "projections", "adapter"), zip(*rows, strict=True), strict=True):
        table.add_column(name, min_width=max(len(word) for cell in cells for word in cell.split()))
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def adapters_markdown(support: Sequence[Mapping[str, Any]]) -> str:
    """The support table for docs/support.md, without a newline at its end."""
    rows = [
        [", ".join(f"`{name}`" for name in types.split(", ")), kind, layout, f"`{adapter}`"]
        for types, kind, layout, adapter in adapter_rows(support)
    ]
    return markdown_table(["model types", "kind", "projections of one FFN", "adapter"], rows)


def markdown_table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of Markdown, without a newline at its end."""
    return "\n".join([markdown_row(heads), "|-" * len(heads) + "|", *map(markdown_row, rows)])


def markdown_row(cells: Sequence[str]) -> str:
    """One line of it."""
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def byte_size(count: float) -> str:
    """Bytes for people: ``"538.1 MB"`` (powers of 1000)."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


# rows ---------------------------------------------------------------------------------------------------------------


def _ffn_table(*more: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("layer", no_wrap=True)
    for name in ("channels", "retained", "candidates", "pruned"):
        table.add_column(name, justify="right", no_wrap=True)
    for name in more:
        table.add_column(name, justify="right", max_width=20)
    table.add_column("backend", no_wrap=True)
    return table


def _plan_cells(plans: Sequence[FFNPlan]) -> list[str]:
    sizes = plans[0].sizes
    layers = [plan.ffn.layer for plan in plans]
    where = f"{layers[0]}" if layers[0] == layers[-1] else f"{layers[0]}-{layers[-1]}"
    experts = plans[0].ffn
    if isinstance(experts, Experts):
        where += f" ({experts.count} experts, top {experts.top_k})"
    elif plans[0].ffn.role == "shared_expert":
        where += " (shared)"
    return [where, *map(str, (sizes.channels, sizes.retained, sizes.candidates, sizes.pruned))]


def _runs(items: Sequence[Any], plan_of: Callable[[Any], FFNPlan], rest: Callable[[Any], object]) -> list[list[Any]]:
    """Neighbours that share a table row: all that look the same; if these are too many, all of one kind."""

    def kind(item: Any) -> tuple[object, ...]:
        plan = plan_of(item)
        return plan.sizes, plan.backend, plan.ffn.role

    keys: list[Callable[[Any], object]] = [
        lambda item: (kind(item), rest(item)),
        kind,
    ]
    runs: list[list[Any]] = []
    for key in keys:
        runs = [list(group) for _, group in groupby(items, key)]
        if len(runs) <= _MOST_ROWS:
            break
    return runs


def _span(values: Sequence[float | None], show: Callable[[float], str]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    low, high = show(min(known)), show(max(known))
    return low if low == high else f"{low} to {high}"


def _number(value: float) -> str:
    return f"{value:.0f}" if abs(value - round(value)) < 0.05 else f"{value:.1f}"


def _seconds(value: float) -> str:
    if value < 0.1:
        return f"{1000 * value:.1f} ms"
    return f"{value:.2f} s"


__all__ = [
    "SCOPES",
    "adapter_rows",
    "adapters_markdown",
    "adapters_table",
    "answers_table",
    "byte_size",
    "footprint_table",
    "least_width",
    "markdown_row",
    "markdown_table",
    "narrowed",
    "only",
    "plan_table",
    "report_summary",
    "report_table",
    "samples_table",
]
