"""The picture of a session: which channels each layer kept, and how much the choice changes from step to step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import NDArray

from ..errors import PopError
from .report import FFNReport, Report
from .tables import SCOPES

_SUFFIXES = (".png", ".svg", ".pdf")
_MOST_BINS = 96  # bins of channels in a layer's line, each a small stack of its three shares
_MOST_ROWS = 160  # lines; more FFNs than that (experts) are averaged over a layer
_HEIGHT = 24  # pixels of a stack in the map, and below it as a gap:
_GAP = 3
# Okabe and Ito's blue and orange, and a light grey: told apart with every colour vision and in print.
COLOURS = {"retained": "#0072B2", "candidate": "#E69F00", "pruned": "#E4E4E4"}


class PlotError(PopError):
    """A picture cannot be drawn or saved."""


def check_path(path: str | Path) -> Path:
    """The path with ``~`` expanded, if a picture can be saved there by its suffix and folder.

    Raises
    ------
    PlotError
        Another suffix than .png, .svg or .pdf, or no such folder.
    """
    target = Path(path).expanduser()
    if target.suffix.lower() not in _SUFFIXES:
        raise PlotError(
            f"The picture {target} needs one of the suffixes {', '.join(_SUFFIXES)}, which choose its format."
        )
    if not target.parent.is_dir():
        raise PlotError(f"The picture {target} cannot be saved: there is no folder {target.parent}.")
    return target


def check_drawable(report: Report) -> None:
    """Raise :class:`PlotError` if no prompt has been processed yet. A report of dense FFNs alone can always be drawn."""
    pruned = [ffn for ffn in report.ffns if ffn.plan.backend != "dense"]
    if pruned and all(ffn.partition is None for ffn in pruned):
        raise PlotError("There is nothing to draw yet: run a prompt in the session first.")


def plot_report(report: Report, path: str | Path, dark: bool = False) -> Path:
    """Draw a report and save it; the user's backend, figures and settings of matplotlib stay as they are.

    Left, one line per layer: its channels in their original order, in bins; each bin is a stack of the shares that are
    retained, candidate and pruned for the latest prompt. Right: of the candidates that a step keeps, the share that the
    next step keeps too, and what it would be if the choice were made by chance. Below, for routed experts: how many of
    the prompt's tokens each one got, and which have no partition or got theirs while decoding.

    Parameters
    ----------
    report : Report
    path : str or Path
        Ends in .png, .svg or .pdf.
    dark : bool
        Light on dark.

    Returns
    -------
    Path
        Where the picture is.

    Raises
    ------
    PlotError
        The path does not fit (:func:`check_path`) or cannot be written, or no prompt has been processed yet.
    """
    target = check_path(path)
    check_drawable(report)
    rows = lines_of(report.ffns)
    routed = [ffn for ffn in report.ffns if ffn.experts is not None]
    heights = [
        min(max(0.16 * len(rows) + 2.1, 3.6), 12),
        *([min(max(0.16 * len(routed) + 1.2, 2), 8)] if routed else []),
    ]
    figure = Figure(figsize=(11, sum(heights)), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    mosaic = [["map", "stability"], *([["experts", "experts"]] if routed else [])]
    axes: dict[str, Axes] = figure.subplot_mosaic(mosaic, width_ratios=(3, 1), height_ratios=heights)
    axes["stability"].sharey(axes["map"])
    draw_legend(axes["map"], COLOURS, draw_map(axes["map"], rows))
    _draw_stability(axes["stability"], rows)
    if routed:
        _draw_experts(axes["experts"], routed)
    config = report.config
    asked = f"budget {config.budget:.0%}" if config.ratio is None else f"ratio {config.ratio:.0%}"
    figure.suptitle(
        f"POP: {asked} of {SCOPES[config.scope]}, gamma {config.channel_method.gamma:g}; {report.prompt_tokens} prompt "
        f"tokens, {report.timings.decode_forwards} decode steps",
        fontsize=12,
        x=0.01,
        ha="left",
    )
    return save(figure, target, dark)


def save(figure: Figure, target: Path, dark: bool = False) -> Path:
    """Write the picture, or raise :class:`PlotError`."""
    if dark:
        _darken(figure)
    try:
        figure.savefig(target, dpi=150)
    except OSError as error:
        raise PlotError(f"The picture {target} cannot be saved: {error.strerror or error}.") from error
    return target


def _darken(figure: Figure) -> None:
    """Greys change places, so that white is the darkest; colours stay."""

    def turned(colours: NDArray[np.floating]) -> NDArray[np.floating]:  # [..., 3 or 4]
        greys = np.ptp(colours[..., :3], axis=-1, keepdims=True) < 0.01
        return np.concatenate([np.where(greys, 0.93 - 0.83 * colours[..., :3], colours[..., :3]), colours[..., 3:]], -1)

    for artist in figure.findobj(lambda artist: isinstance(artist, Text | Line2D | Patch)):
        for of in ("color",) if isinstance(artist, Text | Line2D) else ("edgecolor", "facecolor"):
            getattr(artist, f"set_{of}")(tuple(turned(np.array(to_rgba(getattr(artist, f"get_{of}")())))))
    light, grid = ([float(value)] * 3 for value in turned(np.array([[0.0] * 3, [0.894] * 3]))[:, 0])
    for axes in figure.axes:
        axes.tick_params(which="both", colors=light, grid_color=grid)
        for image in axes.images:
            pixels = np.asarray(image.get_array())
            if pixels.ndim == 3:
                image.set_data(turned(pixels))


def lines_of(ffns: Sequence[FFNReport]) -> list[list[FFNReport]]:
    """What makes up one line of the picture: an FFN, or if there are very many, a layer's FFNs."""
    if len(ffns) <= _MOST_ROWS:
        return [[ffn] for ffn in ffns]
    return [list(group) for _, group in groupby(ffns, lambda ffn: ffn.plan.ffn.layer)]


def draw_map(
    axes: Axes,
    rows: list[list[FFNReport]],
    colours: Mapping[str, str] = COLOURS,
    kinds_of: Callable[[FFNReport], NDArray[np.int64]] | None = None,
) -> dict[str, float]:
    """One line per FFN (or layer): its channels in bins, each a stack of the shares of each kind.

    Parameters
    ----------
    rows : list of list of FFNReport
        What makes up each line.
    colours : mapping of str to str
        Name of each kind to its colour.
    kinds_of : callable, optional
        The kind of each channel, ``[..., D]``, indices into ``colours``; by default retained, candidate, pruned.

    Returns
    -------
    dict of str to float
        Share of all channels that is of each kind.
    """
    kinds_of = kinds_by_default if kinds_of is None else kinds_of
    sizes = {ffn.plan.sizes.channels for row in rows for ffn in row}
    bins, count = min(max(sizes), _MOST_BINS), len(colours)
    found = [[kinds_of(ffn) for ffn in row] for row in rows]
    shares = np.stack([np.mean([_binned(k, bins, count) for k in row], axis=0) for row in found])  # [rows, bins, kinds]
    palette = np.array([[int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)] for colour in colours.values()])
    # A stack as pixels, the first kind at its bottom: pixel y shows the first kind whose cumulated share lies above it.
    height = 1 - (np.arange(_HEIGHT) + 0.5) / _HEIGHT
    kinds = (height[None, :, None, None] > shares.cumsum(-1)[:, None]).sum(-1).clip(max=count - 1)
    image = np.concatenate([palette[kinds], np.ones((len(rows), _GAP, bins, 3))], 1)
    same = len(sizes) == 1
    axes.imshow(
        image.reshape(-1, bins, 3),
        aspect="auto",
        interpolation="nearest",
        extent=(0, max(sizes) if same else 100, len(rows) - 0.5, -0.5),
    )
    per_bin = f", {max(sizes) / bins:.3g} to a bin" if max(sizes) > bins else ""
    axes.set_xlabel(f"channel in the model's own order{per_bin}" if same else "channel (position in its FFN, %)")
    _label_layers(axes, rows)
    axes.spines[:].set_visible(False)
    totals = np.mean([_binned(k, 1, count)[0] for row in found for k in row], axis=0)
    return dict(zip(colours, totals.tolist(), strict=True))


def draw_legend(axes: Axes, colours: Mapping[str, str], shares: Mapping[str, float], title: str | None = None) -> None:
    """Above the map: what each colour stands for, and its share of all channels."""
    handles = [
        Patch(facecolor=colour, edgecolor="#808080", linewidth=0.5, label=f"{name} {shares[name]:.1%}")
        for name, colour in colours.items()
    ]
    axes.legend(
        handles=handles,
        title=title,
        alignment="left",
        loc="lower left",
        bbox_to_anchor=(0, 1),
        ncols=len(handles),
        frameon=False,
        borderaxespad=0.2,
    )


def _draw_stability(axes: Axes, rows: list[list[FFNReport]]) -> None:
    known = [
        (y, float(np.mean(values)))
        for y, row in enumerate(rows)
        if (values := [ffn.stability for ffn in row if ffn.stability is not None])
    ]
    axes.set_title("kept candidates that\nthe next step keeps too", fontsize=10, loc="left")
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.tick_params(axis="y", labelleft=False, length=0)
    axes.grid(axis="x", color="#E4E4E4", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if not known:
        routed = all(ffn.experts is not None for row in rows for ffn in row)
        text = "not counted for\nrouted experts" if routed else "no candidates, or\nfewer than two\ndecode steps"
        axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center")
        return
    lines, shares = zip(*known, strict=True)
    axes.hlines(lines, 0, shares, color=COLOURS["candidate"], linewidth=1.5)
    axes.plot(shares, lines, "o", color=COLOURS["candidate"], markersize=4)
    sizes = rows[lines[0]][0].plan.sizes
    chance = sizes.candidates_kept / sizes.candidates if sizes.candidates else 0.0
    axes.axvline(chance, color="#404040", linewidth=1, linestyle="--")
    axes.set_xlabel(f"mean {np.mean(shares):.0%}; by chance {chance:.0%} (dashed)")


def _draw_experts(axes: Axes, ffns: list[FFNReport]) -> None:
    """Layers by experts: the share of a layer's routed prompt tokens that each expert got."""
    found = [ffn.experts for ffn in ffns if ffn.experts is not None]
    shares = np.full((len(found), max(len(experts.prompt_tokens) for experts in found)), np.nan)
    for y, experts in enumerate(found):
        total = max(sum(experts.prompt_tokens), 1)
        shares[y, : len(experts.prompt_tokens)] = np.array(experts.prompt_tokens) / total
    image = axes.imshow(shares, aspect="auto", interpolation="nearest", cmap="Blues", vmin=0)
    for marker, label, lists in (
        ("x", "dense: too few tokens", [experts.dense for experts in found]),
        (".", "partitioned while decoding", [experts.late for experts in found]),
    ):
        points = [(x, y) for y, numbers in enumerate(lists) for x in numbers]
        if points:
            axes.plot(*zip(*points, strict=True), marker, color=COLOURS["candidate"], label=label, linestyle="none")
    axes.set_xlabel("expert")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _label_layers(axes, [[ffn] for ffn in ffns])
    axes.spines[:].set_visible(False)
    bar = axes.figure.colorbar(image, ax=axes, format=PercentFormatter(1, decimals=0), pad=0.01)
    bar.set_label("of the prompt's routed tokens")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False, borderaxespad=0.2)


def _label_layers(axes: Axes, rows: list[list[FFNReport]]) -> None:
    layers = [row[0].plan.ffn.layer for row in rows]
    first = [y for y, layer in enumerate(layers) if y == 0 or layers[y - 1] != layer]
    step = -(-len(first) // 32)
    axes.set_yticks(first[::step], [str(layers[y]) for y in first[::step]], fontsize=8)
    axes.set_ylabel("layer")


def kinds_by_default(ffn: FFNReport) -> NDArray[np.int64]:
    """``[rows, D]``: 0 retained, 1 candidate, 2 pruned. An FFN without a partition is dense: all of it is retained."""
    channels = ffn.plan.sizes.channels
    kinds = np.zeros((1, channels), dtype=np.int64)
    if ffn.partition is not None:
        kinds = np.zeros((*ffn.partition.pruned.shape[:-1], channels), dtype=np.int64)
        np.put_along_axis(kinds, ffn.partition.candidates.cpu().numpy(), 1, -1)
        np.put_along_axis(kinds, ffn.partition.pruned.cpu().numpy(), 2, -1)
        if ffn.experts is not None and len(kinds) == len(ffn.experts.prompt_tokens):
            kinds[ffn.experts.dense] = 0
    return kinds.reshape(-1, channels)


def _binned(kinds: NDArray[np.int64], bins: int, count: int) -> NDArray[np.float64]:
    """``[bins, count]``: the share of each bin's channels that is of each kind; means over rows."""
    channels = kinds.shape[-1]
    share = np.stack([(kinds == kind).mean(0) for kind in range(count)], -1)  # [D, count]
    edges = np.arange(bins) * channels // bins
    if channels <= bins:
        return share[edges]
    width = np.diff(np.append(edges, channels))
    return np.add.reduceat(share, edges, axis=0) / width[:, None]
