"""Questions about pictures, answered by a vision-language model as it is and pruned, side by side.

    python demos/image_question.py [--model tiny-vlm] [--image FILE ...] [--question TEXT ...] [--ratio 0.4]

``--model`` takes a sample's name (``tiny-vlm``, ``tiny-vlm-moe``), a folder, or a hub id such as
``Qwen/Qwen3-VL-4B-Instruct``. Without ``--image`` it draws two scenes of coloured shapes, of a kind that the samples know
but in configurations that they were not trained on. A picture of the last answer about each image is saved in ``out/``.
Do not look for speed in the samples: their FFNs are so small that the work around them takes longer.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path
from statistics import median
from typing import Any

logging.disable(logging.WARNING)  # of other packages, which say a lot while they are imported

import numpy as np
from PIL import Image
from rich.console import Console
from tiny_vlm.scenes import Scene, render, sample_scene
from transformers.utils.logging import disable_progress_bar

import pop_mm
from pop_mm.cli.generate import Clock
from pop_mm.report.plotting_answer import plot_answer
from pop_mm.report.tables import answers_table, report_summary
from pop_mm.samples import load_vision
from pop_mm.vision import decode, load_image, prepare


def draw_scenes(count: int, seed: int = 4) -> list[Scene]:
    """Draw scenes of two or three shapes that ``tiny-vlm`` has not been trained on."""
    rng = np.random.default_rng(seed)
    return [sample_scene(rng, "eval", most=3, least=2) for _ in range(count)]


def describe(scene: Scene) -> str:
    return ", ".join(f"{shape.colour} {shape.kind} at the {shape.position}" for shape in scene.shapes)


def questions_about(scene: Scene) -> list[str]:
    """Ask for a shape, a colour, a number and everything."""
    first, last = scene.shapes[0], scene.shapes[-1]
    return [
        f"What shape is at the {first.position}?",
        f"What colour is the shape at the {last.position}?",
        f"How many {last.colour} shapes are there?",
        "What is in the picture?",
    ]


def ask(model: Any, processor: Any, picture: Image.Image, question: str, max_new_tokens: int = 64) -> dict[str, Any]:
    """Ask the model, whether it is being pruned at the moment or not; time from the first to the last token."""
    inputs = prepare(processor, picture, question, model=model)
    clock = Clock()
    output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, streamer=clock)
    return {"text": decode(processor, output, inputs)[0], "decode_tokens_per_s": clock.decode_tokens_per_s}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny-vlm", help="a sample's name, a folder, or a hub id")
    parser.add_argument("--image", nargs="+", metavar="FILE", help="default: two drawn scenes")
    parser.add_argument("--question", nargs="+", metavar="TEXT", help="asked about each image")
    parser.add_argument("--ratio", type=float, default=0.4, help="overall ratio")
    arguments = parser.parse_args()
    if arguments.image:
        own = arguments.question or ["What is in the picture?"]
        tasks = [(name, load_image(name), own) for name in arguments.image]
    else:
        scenes = draw_scenes(2)
        tasks = [(f"drawn: {describe(s)}", render(s), arguments.question or questions_about(s)) for s in scenes]
    disable_progress_bar()
    console = Console(highlight=False)
    with console.status(f"Loading {arguments.model}"):
        model, processor = load_vision(arguments.model)

    def pruning() -> pop_mm.Session:
        return pop_mm.prune(model, ratio=arguments.ratio)

    folder, pruned = Path("out"), f"pruned {arguments.ratio:.0%}"
    folder.mkdir(exist_ok=True)
    ask(model, processor, *tasks[0][1:2], "Hi", 4)  # a first call is slower
    with pruning():
        ask(model, processor, *tasks[0][1:2], "Hi", 4)
    speeds: list[tuple[float, float]] = []  # of each question: dense, pruned
    for number, (title, picture, questions) in enumerate(tasks, 1):
        console.print(f"\n{title}", style="bold", markup=False)
        for question in questions:
            answers = {"dense": ask(model, processor, picture, question)}
            with pruning() as session:
                answers[pruned] = ask(model, processor, picture, question)
                report = session.report
            console.print(f"\n{question}", markup=False)
            console.print(answers_table(answers))
            dense, fast = (answer["decode_tokens_per_s"] for answer in answers.values())
            if dense and fast:  # else one is too short to time
                speeds.append((dense, fast))
        saved = plot_answer(report, [picture], question, answers, folder / f"image_question_{number}.png")
        console.print(f"Picture: {saved}", markup=False, soft_wrap=True)

    if speeds:
        factor = median(fast / dense for dense, fast in speeds)
        console.print(
            f"\nDecode speed of {pruned}: {factor:.2f}x, median of {len(speeds)} answers (rough: they are short)"
        )
    console.print("\nThe last session", style="bold")
    console.print(report_summary(report))


if __name__ == "__main__":
    try:
        main()
    except pop_mm.PopError as error:
        sys.exit(f"Error: {error}")
