"""The picture of a session: which channels each layer kept, and how much the choice changes from step to step."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import NDArray

from .errors import PopError
from .report import FFNReport, Report

_SUFFIXES = (".png", ".svg", ".pdf")
_MOST_BINS = 512  # columns of the map; more channels than that are shown as shares of a bin
_MOST_ROWS = 160  # rows of the map; more FFNs than that (experts) are averaged over a layer
# Okabe and Ito's blue and orange, and a light grey: told apart with every colour vision and in print.
_COLOURS = {"retained": "#0072B2", "candidate": "#E69F00", "pruned": "#E4E4E4"}


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
        raise PlotError(f"The picture {target} needs one of the suffixes {', '.join(_SUFFIXES)}, which choose its format.")
    if not target.parent.is_dir():
        raise PlotError(f"The picture {target} cannot be saved: there is no folder {target.parent}.")
    return target


def plot_report(report: Report, path: str | Path) -> Path:
    """Draw a report and save it; the user's backend, figures and settings of matplotlib stay as they are.

    Left, one line per layer: its channels in their original order, retained, candidate or pruned for the latest
    prompt (if several channels share a column, the shares are mixed). Right: of the candidates that a step keeps, the
    share that the next step keeps too.

    Parameters
    ----------
    report : Report
    path : str or Path
        Ends in .png, .svg or .pdf.

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
    pruned = [ffn for ffn in report.ffns if ffn.plan.backend != "dense"]
    if pruned and all(ffn.partition is None for ffn in pruned):
        raise PlotError("There is nothing to draw yet: run a prompt in the session first.")
    rows = _rows(report.ffns)
    figure = Figure(figsize=(11, min(max(0.16 * len(rows) + 2.1, 3.6), 12)), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(3, 1), sharey=True)
    _draw_map(left, rows)
    _draw_stability(right, rows)
    config = report.config
    figure.suptitle(
        f"POP, ratio {config.ratio:.0%} ({config.scope}), gamma {config.gamma:g}, "
        f"{report.timings.decode_forwards} decode steps",
        fontsize=12,
        x=0.01,
        ha="left",
    )
    try:
        figure.savefig(target, dpi=150)
    except OSError as error:
        raise PlotError(f"The picture {target} cannot be saved: {error.strerror or error}.") from error
    return target


def _rows(ffns: Sequence[FFNReport]) -> list[list[FFNReport]]:
    """What makes up one line of the picture: an FFN, or if there are very many, a layer's FFNs."""
    if len(ffns) <= _MOST_ROWS:
        return [[ffn] for ffn in ffns]
    return [list(group) for _, group in groupby(ffns, lambda ffn: ffn.plan.ffn.layer)]
