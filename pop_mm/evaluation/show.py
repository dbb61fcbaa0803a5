"""The results of an evaluation as a table for the terminal, as Markdown, and as a picture."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table

from ..report import tables
from ..report.paragraphs import number_of

HEADS = ("method", "prefill", "ratio", "gamma", "KL to dense", "minus static", "same top token", "perplexity")
NOTE = "KL in nats a token; in brackets 95 %, paired bootstrap over texts."


def cells(row: Mapping[str, Any], generated: int, intervals: bool = True) -> list[str]:
    """One row of the table: :data:`HEADS`, the greedy outputs if there are any, and the cost."""

    def span(value: float, interval: Sequence[float] | None, form: str) -> str:
        known = intervals and interval is not None and interval[0] is not None
        return f"{value:{form}}" + (f" [{interval[0]:{form}}, {interval[1]:{form}}]" if known and interval else "")

    def digits(value: float, sign: str = "") -> str:
        return f"{sign}.{3 if abs(value) >= 0.05 else 4}f" if value == 0 or abs(value) >= 5e-4 else f"{sign}.1e"

    gamma, candidates = row["gamma"], row.get("candidates")
    found = [
        row["method"],
        "-" if row["method"] == "dense" else row["prefill"],
        _amount(row),
        "-" if gamma is None else f"{gamma:g}",
    ]
    if gamma is not None and candidates is not None and candidates < gamma - 0.01:
        found[-1] += f" ({candidates:.2g})"  # what fits the ratio
    plain_dense = row["method"] == "dense" and row.get("weight_format", "auto") == "auto"
    if plain_dense:
        found += ["-", "-", "-"]
    else:
        found.append(span(row["kl"], row["kl_interval"], digits(row["kl"])))
        minus = row.get("kl_minus_static")
        found.append("-" if minus is None else span(minus[0], minus[1:], digits(minus[0], "+")))
        found.append(span(row["agreement"], row["agreement_interval"], ".1%"))
    found.append(span(row["perplexity"], row["perplexity_interval"], ".2f" if row["perplexity"] < 1000 else ".2g"))
    if generated:
        found.append("-" if plain_dense else f"{row['same_tokens']:.1f} of {generated}")
    cost = row["cost"]
    return [*found, f"{cost['multiply_adds_share']:.1%}", f"{cost['bytes_share']:.1%}"]


def heads(generated: int) -> list[str]:
    """Titles of the columns."""
    return [*HEADS, *(["same greedy tokens"] if generated else []), "multiply-adds", "bytes read"]


def table(results: Mapping[str, Any], intervals: bool = True) -> Table:
    """For the terminal."""
    setup = results["setup"]
    caption = "\n".join([NOTE] * intervals + [COST])
    found = _empty(setup, caption)
    for name in heads(setup["generate"]):
        found.add_column(name, justify="left" if name in ("method", "prefill") else "right", overflow="fold")
    for row in results["rows"]:
        found.add_row(*(escape(cell) for cell in cells(row, setup["generate"], intervals)))
    return found


def short_table(results: Mapping[str, Any]) -> Table:
    """For a narrow terminal: what was asked for, the bytes that it reads, and two figures of quality."""
    setup = results["setup"]
    found = _empty(setup, SHORT_NOTE)
    for name in ("setting", "bytes read", "KL to dense", "same top token"):
        found.add_column(name, justify="left" if name == "setting" else "right")
    known = heads(setup["generate"])
    for row in results["rows"]:
        cell = dict(zip(known, cells(row, setup["generate"], intervals=False), strict=True))
        parts = [cell["method"], cell["ratio"], "" if row["gamma"] is None else f"gamma {cell['gamma']}"]
        parts.append("partition prefill" if cell["prefill"] == "partition" else "")
        setting = ", ".join(part for part in parts if part not in ("", "-"))
        found.add_row(escape(setting), cell["bytes read"], cell["KL to dense"], cell["same top token"])
    return found


def _empty(setup: Mapping[str, Any], caption: str) -> Table:
    """A table without columns yet, its title above and its notes below at the left."""
    left: dict[str, Any] = {"title_justify": "left", "caption_justify": "left"}
    return Table(title=escape(title(setup)), caption=escape(caption), box=box.SIMPLE_HEAD, **left)


def print_table(console: Console, results: Mapping[str, Any], wide: bool = True) -> None:
    """Print it: in four columns, or (``wide``) all, without intervals where that is too wide for the terminal.

    Where there is no terminal, a wide one is as wide as it is.
    """
    if not wide:
        console.print(short_table(results))
        return
    whole = table(results)
    width = Measurement.get(console, console.options.update(max_width=1000), whole).maximum
    if not console.is_terminal:
        console.width = max(console.width, width)
    console.print(whole if width <= console.width else table(results, intervals=False))


SHORT_NOTE = (
    "KL in nats a token; 0 is equal. Bytes: of all weights that dense reads for a token, output layer included. "
    "--wide has perplexity, intervals and multiply-adds."
)
COST = "Multiply-adds and bytes: weights for a decoded token at batch 1, of what the dense model needs."


def title(setup: Mapping[str, Any]) -> str:
    """What was evaluated, in a line."""
    shared = f", {setup['batch_size']} texts share a partition" if setup["batch"] == "shared" else ""
    form = setup.get("weight_format", "auto")
    stored = "" if form == "auto" else f", {form} weights, compared with the dense model that is not quantised"
    return (
        f"{setup['model']} ({setup['dtype']}{stored}): {number_of(len(setup['texts']), 'piece')} of text, {setup['prompt']} "
        f"prompt tokens, {setup['continuation']} decode steps scored; shares are of {tables.SCOPES[setup['scope']]}{shared}"
    )


def markdown_table(results: Mapping[str, Any]) -> str:
    """The table alone."""
    generated = results["setup"]["generate"]
    return tables.markdown_table(heads(generated), [cells(row, generated) for row in results["rows"]])


def markdown(results: Mapping[str, Any], command: str) -> str:
    """A page: the table, what the columns are, and everything that is needed to repeat it."""
    setup = results["setup"]
    texts = ", ".join(f"{name} `{short}`" for name, short in setup["texts"].items())
    calibration = ", ".join(f"{name} `{short}`" for name, short in setup["calibration"].items()) or "none"
    facts = {
        "command": f"`{command}`",
        "model": f"{setup['model']} ({setup['model_class']}, {setup['parameters']:,} parameters, {setup['dtype']}, "
        f"weights `{setup['weights']}`)",
        "device": setup["device"],
        "texts (hash of the tokens)": texts,
        "calibration of wanda_sp": f"{calibration} ({setup['calibration_tokens']} tokens)",
        "prompt / scored / generated tokens": f"{setup['prompt']} / {setup['continuation']} / {setup['generate']}",
        "ratio is a share of": {"overall": "attention and FFN weights", "ffn": "each FFN"}[setup["scope"]],
        "batch": f"{setup['batch']}, {setup['batch_size']} texts at once",
        "seed": str(setup["seed"]),
        "other settings": ", ".join(f"{k}={v!r}" for k, v in setup["settings"].items()) or "none",
        "versions": ", ".join(f"{name} {version}" for name, version in setup["versions"].items()),
    }
    repeat = "\n".join(map(tables.markdown_row, facts.items()))
    return (
        f"# {title(setup)}\n\n{markdown_table(results)}\n\n{NOTE} {COST} *Minus static*: KL minus that of the prompt's fixed "
        "best channels, text by text. *Same greedy tokens*: before the greedy outputs first differ.\n\n"
        f"To repeat it:\n\n| | |\n|-|-|\n{repeat}\n"
    )


def plot(results: Mapping[str, Any], path: str | Path) -> Path:
    """Quality against cost: KL to dense over the bytes that a decoded token reads, a line for each method.

    Raises
    ------
    PlotError
        As :func:`pop_mm.report.plotting.check_path` and :func:`pop_mm.report.plotting.save`.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    from ..report.plotting import check_path, save

    target = check_path(path)
    prefills = list(dict.fromkeys(row["prefill"] for row in results["rows"] if row["method"] not in ("dense", "full")))
    prefills = prefills or ["dense"]
    figure = Figure(figsize=(5.5 * len(prefills) + 1.5, 4.6), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    # Okabe and Ito's colours, told apart with every colour vision
    colours = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#999999", "#7F5F00")
    handles: dict[str, Any] = {}
    names = list(dict.fromkeys(_label(row) for row in results["rows"] if row["method"] != "dense"))
    for axis, prefill in zip(figure.subplots(1, len(prefills), sharey=True, squeeze=False)[0], prefills, strict=True):
        for number, name in enumerate(names):
            rows = [r for r in results["rows"] if _label(r) == name and (r["prefill"] == prefill or name == "full")]
            rows.sort(key=lambda r: r["cost"]["bytes_share"])
            rows = [r for r in rows if r["kl"] > 0]  # the axis is logarithmic
            if rows:
                shares, values = [r["cost"]["bytes_share"] for r in rows], [r["kl"] for r in rows]
                spans = [r["kl_interval"] or [r["kl"], r["kl"]] for r in rows]
                low = [max(v - s[0], 0) for v, s in zip(values, spans, strict=True)]
                high = [max(s[1] - v, 0) for v, s in zip(values, spans, strict=True)]
                style = {"color": colours[number % len(colours)], "marker": "osD^v<>pX*"[number % 10]}
                handles[name] = axis.errorbar(
                    shares, values, [low, high], label=name, capsize=2, linewidth=1.2, markersize=5, **style
                )
        axis.set_yscale("log")
        axis.xaxis.set_major_formatter(PercentFormatter(1))
        axis.set_xlabel("weights read for a decoded token, of dense")
        axis.set_title(f"{prefill} prefill", loc="left", fontsize=10)
        axis.grid(color="#E4E4E4", linewidth=0.8)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("KL to dense, nats a token (log)")
    ordered = [name for name in names if name in handles]
    figure.axes[-1].legend(
        [handles[name] for name in ordered],
        ordered,
        loc="center left",
        bbox_to_anchor=(1, 0.5),
        frameon=False,
        fontsize=9,
    )
    figure.suptitle(textwrap.fill(title(results["setup"]), 110), x=0.01, ha="left", fontsize=10)
    return save(figure, target)


def _amount(row: Mapping[str, Any]) -> str:
    """What was asked for: the ratio that is left out, or the budget that is read."""
    if row["ratio"] is not None:
        return f"{100 * row['ratio']:.4g}%"
    return "-" if row.get("budget") is None else f"reads {100 * row['budget']:.4g}%"


def _label(row: Mapping[str, Any]) -> str:
    return f"{row['method']}, gamma {row['gamma']:g}" if row["gamma"] is not None else str(row["method"])


__all__ = ["markdown", "markdown_table", "plot", "print_table", "table"]
