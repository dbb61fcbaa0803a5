"""The picture of an answer about images: what was asked, both answers, and which tokens chose which channels."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from .plotting import COLOURS, check_drawable, check_path, draw_legend, draw_map, kinds_by_default, lines_of, save
from .report import FFNReport, Report

if TYPE_CHECKING:
    from PIL import Image

# Of Okabe and Ito's colours, told apart with every colour vision.
_CHOSEN_BY = {"text or image": "#009E73", "image": "#D55E00", "text": "#0072B2", "neither": "#CC79A7"}
_PALER = 0.55  # how far a candidate's colour goes towards white


def plot_answer(
    report: Report,
    pictures: Sequence[Image.Image],
    question: str,
    answers: Mapping[str, Mapping[str, Any]],
    path: str | Path,
) -> Path:
    """Draw and save it.

    Each line of the map is a layer. A channel that is retained or a candidate has the colour of what alone would have
    chosen it too: the tokens of the images (and videos), those of the text, both or neither; candidates are paler.

    Parameters
    ----------
    report : Report
        Of the pruned answer.
    pictures : sequence of PIL.Image.Image
        May be empty.
    question : str
    answers : mapping of str to mapping
        Title to ``{"text": str, "decode_tokens_per_s": float or None}``.
    path : str or Path
        Ends in .png, .svg or .pdf.

    Raises
    ------
    PlotError
        The path does not fit or cannot be written, or no prompt has been processed yet.
    """
    target = check_path(path)
    check_drawable(report)
    rows = lines_of(report.ffns)
    height = min(max(0.22 * len(rows) + 1.6, 3.0), 12)
    figure = Figure(figsize=(11, height + 3), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    top, bottom = figure.subfigures(2, 1, squeeze=False, height_ratios=(3, height))[:, 0]
    shown = list(pictures[:4])
    axes = top.subplots(1, len(shown) + 1, squeeze=False, width_ratios=[*[1] * len(shown), 2.6])[0]
    for axis, picture in zip(axes, shown, strict=False):
        axis.imshow(np.asarray(picture), interpolation="nearest" if max(picture.size) < 200 else "antialiased")
    for axis in axes:
        axis.set_axis_off()
    axes[-1].text(0, 1, _words(question, answers, len(pictures) - len(shown)), va="top", fontsize=10, linespacing=1.4)
    counts = ", ".join(f"{count} {name}" for name, count in report.modality_tokens.items())
    axis = bottom.subplots()
    if any(ffn.alone for ffn in report.ffns):
        tones = {**_CHOSEN_BY, **{f"{name}, candidate": _paler(colour) for name, colour in _CHOSEN_BY.items()}}
        shares = draw_map(axis, rows, {**tones, "pruned": COLOURS["pruned"]}, _chosen_by)
        together = {name: share + shares[f"{name}, candidate"] for name, share in shares.items() if name in _CHOSEN_BY}
        draw_legend(axis, _CHOSEN_BY, together, "kept, and would be kept by ... alone (candidates are paler)")
    else:
        draw_legend(axis, COLOURS, draw_map(axis, rows))
    axis.set_title(f"channels for this prompt ({counts} tokens)", loc="right", fontsize=10)
    return save(figure, target)


def _words(question: str, answers: Mapping[str, Mapping[str, Any]], more: int) -> str:
    def cut(text: str, lines: int) -> str:
        text = "".join(letter if letter.isprintable() else " " for letter in text)
        # matplotlib takes a dollar for the start of a formula
        return "\n".join(textwrap.wrap(text, 78, max_lines=lines, placeholder=" ...")).replace("$", r"\$")

    parts = [cut(f"Question: {question}", 3) + (f"\n(and {more} more images)" if more > 0 else "")]
    for title, answer in answers.items():
        speed = answer["decode_tokens_per_s"]
        figure = f"{speed:.0f} tokens/s" if speed else "too short to time"
        parts.append(cut(f"{title} ({figure}): {answer['text'].strip()}", 5))
    return "\n\n".join(parts)


def _paler(colour: str) -> str:
    parts = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return "#" + "".join(f"{round(part + (255 - part) * _PALER):02x}" for part in parts)


def _chosen_by(ffn: FFNReport) -> NDArray[np.int64]:
    """``[rows, D]``: 0-3 retained (either, image, text, neither would keep it alone), 4-7 candidates likewise, 8 pruned."""
    kinds = kinds_by_default(ffn)
    if ffn.partition is None:
        return kinds
    candidates, pruned = kinds == 1, kinds == 2
    nobody = np.zeros_like(pruned)

    def alone(*names: str) -> NDArray[np.bool_]:
        parts = []
        for name in names:
            if name in ffn.alone:
                chosen = ffn.alone[name].allowed()
                chosen = chosen & ffn.reached[name].unsqueeze(-1) if name in ffn.reached else chosen
                parts.append(chosen.cpu().numpy().reshape(pruned.shape))
        return np.logical_or.reduce(parts) if parts else nobody

    image, text = alone("image", "video"), alone("text")
    return np.where(pruned, 8, np.select([image & text, image, text], [0, 1, 2], 3) + 4 * candidates)
