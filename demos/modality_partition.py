"""What the image alone would choose, what the text alone would, and how much the choice changes with the question.

    python demos/modality_partition.py [--model tiny-vlm] [--image FILE] [--question TEXT TEXT ...] [--ratio 0.4]

For one image and several questions, layer by layer: how many of the channels in R and C would be there too if the image's
tokens, or the text's, had chosen alone; how much these two choices share; and how much the choices for two questions about
the same image share. All are shares of R and C (of routed experts, the mean of those that a prompt reached), next to what
they would be for random channels. A picture is saved in ``out/``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from image_question import describe, draw_scenes, questions_about
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from rich.console import Console
from rich.table import Table
from tiny_vlm.scenes import render
from torch import Tensor
from transformers.utils.logging import disable_progress_bar

import pop_mm
from pop_mm.report.report import FFNReport, Report
from pop_mm.samples import load_vision
from pop_mm.vision import load_image, prepare

# Title -> the two choices that are compared, and one of Okabe and Ito's colours.
ONE_PROMPT = {
    "image & chosen": ("image", "chosen", "#D55E00"),
    "text & chosen": ("text", "chosen", "#0072B2"),
    "image & text": ("image", "text", "#009E73"),
}
TWO_QUESTIONS = {
    "chosen twice": ("chosen", "chosen", "#000000"),
    "text twice": ("text", "text", "#0072B2"),
    "image twice": ("image", "image", "#D55E00"),
}
CHANCE = "by chance"
Shares = dict[str, list[float]]  # title -> one value for each FFN


def overlap(one: FFNReport, other: FFNReport, who: str, whose: str) -> float:
    """Share of R and C in one choice that is in R or C of the other choice too."""
    first, second = ({"chosen": ffn.partition, **ffn.alone}[name] for ffn, name in ((one, who), (other, whose)))
    assert first is not None and second is not None
    shared = (first.allowed() & second.allowed()).sum(-1).float() / first.sizes.width
    if one.experts is not None and other.experts is not None:
        shared = shared[reached(one, who) & reached(other, whose)]
    return float(shared.mean())


def reached(ffn: FFNReport, who: str) -> Tensor:
    """``[E]``: the experts that got tokens of the one who chooses."""
    assert ffn.experts is not None
    return ffn.reached[who] if who in ffn.reached else torch.tensor(ffn.experts.prompt_tokens) > 0


def measure(reports: Sequence[Report]) -> tuple[list[str], Shares]:
    """Name the FFNs that are pruned, and compare their choices: means over the prompts, or over all pairs of them."""
    pruned = [ffns for ffns in zip(*(report.ffns for report in reports), strict=True) if ffns[0].partition is not None]
    plans = [ffns[0].plan for ffns in pruned]
    names = [f"{plan.ffn.layer} {'' if plan.ffn.role == 'dense' else plan.ffn.role}".strip() for plan in plans]
    found = {CHANCE: [plan.sizes.width / plan.sizes.channels for plan in plans]}
    for title, (who, whose, _) in ONE_PROMPT.items():
        found[title] = [fmean(overlap(ffn, ffn, who, whose) for ffn in ffns) for ffns in pruned]
    for title, (who, whose, _) in TWO_QUESTIONS.items():
        if len(reports) > 1:
            found[title] = [fmean(overlap(*pair, who, whose) for pair in combinations(ffns, 2)) for ffns in pruned]
    return names, found


def table_of(names: Sequence[str], shares: Shares) -> Table:
    table = Table(title="Shared part of R and C; twice: for two questions about the same image")
    table.add_column("layer", no_wrap=True)
    for title in shares:
        table.add_column(title, justify="right", max_width=9)
    for number, name in enumerate(names):
        values = (f"{column[number]:.1%}" for column in shares.values())
        table.add_row(name, *values, end_section=number == len(names) - 1)
    table.add_row("mean", *(f"{fmean(column):.1%}" for column in shares.values()))
    return table


def plot(shares: Shares, title: str, path: Path) -> Path:
    figure = Figure(figsize=(11, 4.2), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    halves = {"one prompt": ONE_PROMPT, "two questions about the same image": TWO_QUESTIONS}
    for axis, (name, columns) in zip(figure.subplots(1, 2, sharey=True), halves.items(), strict=True):
        for label, (_, _, colour) in columns.items():
            if label in shares:
                axis.plot(shares[label], "o-", color=colour, label=label)
        axis.plot(shares[CHANCE], "--", color="#808080", label=CHANCE)
        axis.set_title(name, loc="left", fontsize=10)
        axis.set_xlabel("FFN, in the order of the layers")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.yaxis.set_major_formatter(PercentFormatter(1))
        axis.set_ylim(0, 1.03)
        axis.grid(color="#E4E4E4")
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(fontsize=8, loc="lower left")
    figure.supylabel("shared part of R and C", fontsize=10)
    figure.suptitle(title, x=0.01, ha="left", fontsize=10)
    figure.savefig(path, dpi=150)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny-vlm", help="a sample's name, a folder, or a hub id")
    parser.add_argument("--image", metavar="FILE", help="default: a drawn scene")
    parser.add_argument("--question", nargs="+", metavar="TEXT", help="default: four about the drawn scene")
    parser.add_argument("--ratio", type=float, default=0.4, help="overall ratio")
    arguments = parser.parse_args()
    (scene,) = draw_scenes(1)
    picture = load_image(arguments.image) if arguments.image else render(scene)
    asked: list[str] = arguments.question or questions_about(scene)
    disable_progress_bar()
    console = Console(highlight=False)
    with console.status(f"Loading {arguments.model}"):
        model, processor = load_vision(arguments.model)

    reports: list[Report] = []
    with pop_mm.prune(model, ratio=arguments.ratio) as session:
        for question in asked:
            inputs: Any = prepare(processor, picture, question, model=model)
            model.generate(**inputs, max_new_tokens=1, do_sample=False)  # the prompt alone
            reports.append(session.report)
            tokens = ", ".join(f"{count} {kind}" for kind, count in reports[-1].modality_tokens.items())
            console.print(f"{question}  ({tokens} tokens)", markup=False)
    if not all("image" in ffn.alone for report in reports for ffn in report.ffns if ffn.partition is not None):
        raise pop_mm.PopError("The image is not among this model's prompt tokens, or cannot be told from text there.")
    names, shares = measure(reports)
    console.print(table_of(names, shares))
    (folder := Path("out")).mkdir(exist_ok=True)
    title = (
        f"{arguments.model}, ratio {arguments.ratio:.0%}; {arguments.image or describe(scene)}; {len(asked)} questions"
    )
    console.print(f"Picture: {plot(shares, title, folder / 'modality_partition.png')}", markup=False, soft_wrap=True)


if __name__ == "__main__":
    try:
        main()
    except pop_mm.PopError as error:
        sys.exit(f"Error: {error}")
