"""The picture of a session with thresholds: what each layer's decode steps kept of every input."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from .plotting import PlotError, check_path, save
from .tables import SCOPES

if TYPE_CHECKING:
    from .threshold_report import ThresholdReport

# Okabe and Ito's colours, told apart with every colour vision
_COLOURS = ("#0072B2", "#56B4E9", "#009E73", "#D55E00", "#E69F00", "#CC79A7", "#000000", "#999999")


def plot_thresholds(report: ThresholdReport, path: str | Path, dark: bool = False) -> Path:
    """Draw and save it: the kept share over the layers, a line for each kind of matrix, dashed where it was meant to be.

    Parameters
    ----------
    report : ThresholdReport
    path : str or Path
        Ends in .png, .svg or .pdf.
    dark : bool
        Light on dark.

    Raises
    ------
    PlotError
        The path does not fit or cannot be written, or no decode step has been made yet.
    """
    target = check_path(path)
    known = [found for found in report.inputs if found.kept is not None]
    if not known and any(found.plan.backend != "dense" for found in report.inputs):
        raise PlotError("There is nothing to draw yet: generate something in the session first.")
    figure = Figure(figsize=(9, 4.4), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    for number, matrix in enumerate(dict.fromkeys(found.matrix for found in known)):
        mine = [found for found in known if found.matrix == matrix]
        colour = _COLOURS[number % len(_COLOURS)]
        layers = [found.plan.record.layer for found in mine]
        axis.plot(
            layers, [found.kept or 0.0 for found in mine], "o-", color=colour, label=matrix, markersize=4, linewidth=1.2
        )
        axis.plot(layers, [found.share for found in mine], "--", color=colour, linewidth=0.8)
    axis.set_xlabel("layer")
    axis.set_ylabel("entries kept by decode steps (dashed: meant to be)")
    axis.set_ylim(0, 1)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.yaxis.set_major_formatter(PercentFormatter(1))
    axis.grid(color="#E4E4E4", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    if known:
        axis.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=9)
    figure.suptitle(
        f"Thresholds: {report.config.budget:.0%} of {SCOPES[report.config.scope]}; {report.prompt_tokens} prompt tokens, "
        f"{report.timings.decode_forwards} decode steps",
        fontsize=12,
        x=0.01,
        ha="left",
    )
    return save(figure, target, dark)
