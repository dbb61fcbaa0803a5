"""docs/frontier.md and its picture, from the parts that ``frontier.py`` has kept."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from pop_mm.evaluation.intervals import bootstrap
from pop_mm.report.tables import markdown_table

# Okabe and Ito's colours, told apart with every colour vision
STYLES = {
    "thresholds": ("#0072B2", "o"),
    "pop": ("#D55E00", "s"),
    "static": ("#009E73", "D"),
    "griffin": ("#CC79A7", "^"),
    "wanda_sp": ("#E69F00", "v"),
    "magnitude": ("#999999", "<"),
    "random": ("#56B4E9", ">"),
}
SHOWN = 3.0  # the largest KL in the picture, nats
TICKS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0)

HEAD = """# Quality against bytes and against speed

<!-- not run: takes two hours -->
```bash
python benchmarks/frontier.py
```

Written by that script from what it has measured; each part says its settings. *Layers' bytes*: weights of attention and FFNs
that a decoded token reads, of what the dense model reads (the output layer comes on top); what the steps really read, so it may
be a little off the budget. *KL to dense* in nats a token; 0 is the dense model. In brackets 95 %. Other settings and older
methods: [results.md](results.md).

![KL to the dense model against bytes read and against decode speed](frontier.png)
"""


def write(folder: Path, page: Path) -> None:
    """Write the page, and ``frontier.png`` beside it."""
    files = {name: folder / f"{name}.json" for name in ("text", "moe", "vision", "tasks", "speed")}
    parts = {name: json.loads(file.read_text()) for name, file in files.items() if file.exists()}
    if not parts:
        return
    draw(parts, page.with_name("frontier.png"))
    blocks = [HEAD]
    for name, section in (("text", _text), ("moe", _text), ("vision", _vision), ("tasks", _tasks), ("speed", _speed)):
        if name in parts:
            blocks.append(section(parts[name], parts))
    page.write_text("\n".join(blocks))


def layers_share(row: Mapping[str, Any], dense: Mapping[str, Any]) -> float:
    """Bytes of the layers' weights that a token reads, of the dense model's."""
    used, base = (sum(n for part, n in r["cost"]["bytes"].items() if part != "lm_head") for r in (row, dense))
    return used / base


def _text(found: Mapping[str, Any], parts: Mapping[str, Any]) -> str:
    setup, (dense, *rows) = found["setup"], found["rows"]
    speeds = _speedups(parts) if found is parts.get("text") else {}
    heads = ["asked for", "method", "layers' bytes", "KL to dense", "of pop's", "same top token", "perplexity"]
    pops = {row["budget"]: row["kl"] for row in rows if row["method"] == "pop" and row["budget"] is not None}
    table = [["1", "dense", "100 %", "0", "-", "100 %", _span(dense, "perplexity", ".1f")]]
    for row in sorted(rows, key=lambda row: -layers_share(row, dense)):
        over = f"{row['kl'] / pops[row['budget']]:.3f}" if row["budget"] in pops and row["method"] != "pop" else "-"
        table.append(
            [
                _amount(row),
                row["method"],
                f"{layers_share(row, dense):.1%}",
                _span(row, "kl", ".3f" if row["kl"] >= 0.02 else ".4f"),
                over,
                "-" if row["agreement"] is None else f"{row['agreement']:.1%}",
                _span(row, "perplexity", ".1f" if (row["perplexity"] or 0) < 1e4 else ".1e"),
            ]
        )
    if speeds:
        heads.append("decode speed")
        table = [[*line, _speed_cell(speeds, line[1], line[0])] for line in table]
    return (
        f"## {setup['model']}: text\n\n{found.get('note', '')}"
        f"{len(setup['texts'])} of the passages that ship, {setup['prompt']} tokens of prompt and "
        f"{setup['continuation']} scored by teacher forcing; {setup['dtype']}, dense prefill. Budgets are shares of "
        f"{'the FFNs alone' if setup['scope'] == 'ffn' else 'attention and FFNs'}.\n\n{markdown_table(heads, table)}\n"
    )


def _amount(row: Mapping[str, Any]) -> str:
    """What was asked for: the budget, or the ratio that is left out."""
    return f"{row['budget']:g}" if row["budget"] is not None else f"ratio {row['ratio']:g}"


def _vision(found: Mapping[str, Any], _: Mapping[str, Any]) -> str:
    dense, *rows = found["rows"]
    table = [["1", "dense", _accuracy(dense["right"]), "-"]]
    for row in sorted(rows, key=lambda row: -row["budget"]):
        apart = [100.0 * (a - b) for a, b in zip(row["right"], dense["right"], strict=True)]
        gap = bootstrap(apart)
        cells = [f"{row['budget']:g}", row["method"], _accuracy(row["right"])]
        table.append([*cells, f"{gap.value:+.2f} [{gap.low:+.2f}, {gap.high:+.2f}]"])
    return (
        f"## tiny-vlm: questions about held-out pictures\n\n{found['questions']} questions, {len(found['types'])} types, "
        "answered greedily; exact match, a bootstrap over questions (paired, for the difference).\n\n"
        + markdown_table(["budget", "method", "right", "points over dense"], table)
        + "\n"
    )


def _accuracy(right: Sequence[bool]) -> str:
    share = bootstrap([100.0 * r for r in right])
    return f"{share.value:.1f} % [{share.low:.1f}, {share.high:.1f}]"


def _tasks(found: Mapping[str, Any], _: Mapping[str, Any]) -> str:
    names = list(found["rows"][0]["tasks"])

    def cell(results: Mapping[str, Any], end: str) -> str:
        values = [v for k, v in results.items() if k.split(",")[0] in (f"acc{end}", f"exact_match{end}")]
        return f"{100 * values[0]:.0f} %" if values else "-"

    table = [["1", "dense", *(cell(found["rows"][0]["tasks"][name], " (dense)") for name in names)]]
    for row in sorted(found["rows"], key=lambda row: -row["budget"]):
        table.append([f"{row['budget']:g}", row["method"], *(cell(row["tasks"][name], "") for name in names)])
    return (
        f"## smollm2-135m: the tasks that ship\n\nAt most {found['documents']} documents of each ([harness.md](harness.md)); "
        f"accuracy, exact match of `pop_copy`.\n\n{markdown_table(['budget', 'method', *names], table)}\n"
    )


def _speed(found: Mapping[str, Any], _: Mapping[str, Any]) -> str:
    facts = found["machine"]
    table = [
        [
            "-" if row["budget"] is None and row.get("ratio") is None else _amount(row),
            row["method"],
            f"{1 / median(row['step_s']):.1f}",
            _quartiles(row["speedup"]),
        ]
        for row in found["rows"]
    ]
    return (
        f"## smollm2-135m: decode speed\n\nThrough `generate`, float32, {found['how']}; over the dense model on torch's kernels "
        f"in the same round, median and quartiles. {facts.get('cpu', '')}, {facts.get('threads', '')} threads, torch "
        f"{facts.get('torch', '')}. `static` stands for every method with a fixed mask.\n\n"
        f"{markdown_table(['budget', 'method', 'tokens/s', 'speed-up'], table)}\n"
    )


def _quartiles(speedup: Sequence[float]) -> str:
    low, middle, high = speedup
    return f"{middle:.2f}x [{low:.2f}, {high:.2f}]"


def _speedups(parts: Mapping[str, Any]) -> dict[tuple[str, str], Sequence[float]]:
    """Method and budget (or ratio) -> quartiles of the speed-up; fixed masks all decode as ``static`` does."""
    rows = parts.get("speed", {"rows": []})["rows"]
    known = {(r["method"], _amount(r)): r["speedup"] for r in rows if r["budget"] or r.get("ratio")}
    fixed = [name for name in STYLES if name not in ("thresholds", "pop", "static")]
    return known | {(name, budget): v for (m, budget), v in known.items() if m == "static" for name in fixed}


def _speed_cell(speeds: Mapping[tuple[str, str], Sequence[float]], method: str, amount: str) -> str:
    if method == "dense":
        return "1.00x"
    found = speeds.get((method, amount))
    return "-" if found is None else f"{found[1]:.2f}x"


def _span(row: Mapping[str, Any], name: str, form: str) -> str:
    interval = row[f"{name}_interval"]
    if row[name] is None:  # it was not noted
        return "-"
    return f"{row[name]:{form}}" + (f" [{interval[0]:{form}}, {interval[1]:{form}}]" if interval else "")


def draw(parts: Mapping[str, Any], path: Path) -> None:
    """The picture: one panel for each part that is there, at most four."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    speeds = _speedups(parts)
    panels: list[tuple[str, str]] = [("text", "bytes")] if "text" in parts else []
    rows = parts["text"]["rows"][1:] if "text" in parts else []  # the first is the dense model's
    timed = [row for row in rows if (row["method"], _amount(row)) in speeds]
    panels += [("text", "speed")] if len(timed) > 2 else []  # fewer make no curve
    panels += [(name, "bytes") for name in ("moe", "vision") if name in parts]
    if not panels:
        return
    columns = {1: 1, 3: 3}.get(len(panels), 2)
    lines = -(-len(panels) // columns)
    figure = Figure(
        figsize=((4.0 if columns == 3 else 5.0) * columns, 3.5 * lines + 0.4), layout="constrained", facecolor="white"
    )
    FigureCanvasAgg(figure)
    axes = figure.subplots(lines, columns, squeeze=False).flat
    handles: dict[str, Any] = {}
    for axis, (part, against) in zip(axes, panels, strict=False):
        _panel(axis, part, against, parts[part], speeds, handles)
    for axis in list(axes)[len(panels) :]:
        axis.set_visible(False)
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=7, frameon=False, fontsize=9)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def _panel(axis: Any, part: str, against: str, found: Mapping[str, Any], speeds: Any, handles: dict[str, Any]) -> None:
    from matplotlib.ticker import FixedLocator, MultipleLocator, NullLocator

    dense = found["rows"][0]
    for name, (colour, marker) in STYLES.items():
        points = []  # x, y, and how far x is known to either side
        for row in (row for row in found["rows"] if row["method"] == name):
            if part == "vision":
                points.append((row["budget"], 100 * sum(row["right"]) / len(row["right"]), 0.0, 0.0))
            elif against == "bytes" and row["kl"] <= SHOWN:
                points.append((layers_share(row, dense), row["kl"], 0.0, 0.0))
            elif row["kl"] <= SHOWN and (name, _amount(row)) in speeds:
                low, middle, high = speeds[name, _amount(row)]
                points.append((middle, row["kl"], middle - low, high - middle))
        if points:
            x, y, left, right = zip(*sorted(points, key=lambda point: point[1]), strict=True)
            style = {
                "color": colour,
                "marker": marker,
                "markersize": 5,
                "linewidth": 1.6 if name == "thresholds" else 1.1,
            }
            spans = {"xerr": [left, right], "elinewidth": 0.6} if against == "speed" else {}
            handles[name] = axis.errorbar(x, y, **spans, **style)
    axis.grid(color="#E4E4E4", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    if part == "vision":
        axis.axhline(100 * sum(dense["right"]) / len(dense["right"]), color="#555555", linewidth=1, linestyle="--")
        axis.set_title(f"tiny-vlm: right answers of {found['questions']} (dashed: dense)", loc="left", fontsize=10)
        axis.set_ylabel("exact match, %")
    else:
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(FixedLocator(TICKS))
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.yaxis.set_minor_locator(NullLocator())
        axis.set_title(f"{found['setup']['model']}, {len(found['setup']['texts'])} texts", loc="left", fontsize=10)
        axis.set_ylabel("KL to dense, nats a token")
    if against == "speed":
        axis.set_xlabel("decode speed, of the dense model's on torch's kernels")
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    else:
        axis.set_xlabel("bytes of the layers' weights that a token reads")
        axis.xaxis.set_major_locator(MultipleLocator(0.05))
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        axis.invert_xaxis()
