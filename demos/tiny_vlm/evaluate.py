"""Exact match of a tiny VLM's answers, by type of question, on scenes whose configurations were never trained on.

    python demos/tiny_vlm/evaluate.py [--model pop_mm/data/tiny_vlm] [--per-type 400] [--batch 50] [--json FILE]

From Python, ``answer`` takes any model that generates, so a pruned one is measured with
``with pop_mm.prune(model, ratio=0.2): ...`` around the same call.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from inputs import encode, user
from questions import TYPES, Question, ask
from rich.console import Console
from rich.progress import track
from rich.table import Table
from scenes import Scene, render, sample_scene
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer
from transformers.utils import logging

SHIPPED = Path(__file__).parents[2] / "pop_mm" / "data" / "tiny_vlm"
Generate = Callable[..., torch.Tensor]


@dataclass(frozen=True)
class Item:
    """One question about one scene."""

    scene: Scene
    question: Question


@dataclass(frozen=True)
class Score:
    """Right answers out of ``n``, and the 95 % interval of their share (Wilson)."""

    right: int
    n: int

    @property
    def share(self) -> float:
        """Share of right answers."""
        return self.right / self.n

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval."""
        z = 1.959964
        middle = (self.share + z * z / (2 * self.n)) / (1 + z * z / self.n)
        half = z * math.sqrt(self.share * (1 - self.share) / self.n + z * z / (4 * self.n**2)) / (1 + z * z / self.n)
        return max(0.0, middle - half), min(1.0, middle + half)


def evaluation_set(per_type: int = 400, seed: int = 0, kinds: Sequence[str] = TYPES) -> list[Item]:
    """Draw ``per_type`` questions of every type, each about a scene of its own from the evaluation split."""
    items = []
    for kind in kinds:
        rng = np.random.default_rng((seed, TYPES.index(kind), 20_262_026))  # training draws from (seed, step)
        found = 0
        while found < per_type:
            scene = sample_scene(rng, "eval")
            if (question := ask(scene, kind, rng)) is not None:
                items.append(Item(scene, question))
                found += 1
    return items


def load(folder: str | Path, dtype: torch.dtype = torch.float32) -> tuple[Any, Any, Any]:
    """Load model (in evaluation mode), tokenizer and image processor from a folder."""
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype).eval()
    return model, AutoTokenizer.from_pretrained(folder), AutoImageProcessor.from_pretrained(folder)


def answer(
    items: Sequence[Item],
    model: Any,
    tokenizer: Any,
    image_processor: Any,
    batch: int = 50,
    generate: Generate | None = None,
    progress: bool = False,
) -> list[str]:
    """Answer every question greedily, in the order of ``items``.

    Parameters
    ----------
    items : sequence of Item
    model, tokenizer, image_processor
        As from ``load``. A pruned model is passed in the same way.
    batch : int
        Questions in one left-padded batch; 1 for none.
    generate : callable, optional
        Called in place of ``model.generate`` with its keywords; returns prompt and answer ids ``[N, S]``.
    progress : bool
        Draw a bar.
    """
    generate = generate or model.generate

    def parts() -> Iterator[Sequence[Item]]:
        yield from (items[at : at + batch] for at in range(0, len(items), batch))

    texts: list[str] = []
    total = -(-len(items) // batch)
    for part in track(parts(), "Answering", total=total, transient=True, disable=not progress):
        chats = [[user(item.question.text, render(item.scene))] for item in part]
        inputs = encode(chats, tokenizer, image_processor)
        output = generate(**inputs, do_sample=False, max_new_tokens=64)
        texts += tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return texts


def same(given: str, expected: str) -> bool:
    """Exact match, but for capitals, spaces at the ends and the final full stop."""
    one, other = (text.strip().lower().rstrip(".").rstrip() for text in (given, expected))
    return one == other


def score(items: Sequence[Item], texts: Sequence[str]) -> dict[str, Score]:
    """Score answers by type, in the order of ``TYPES``; types that were not asked are left out.

    Raises
    ------
    ValueError
        Another number of answers than of questions.
    """
    if len(items) != len(texts):
        raise ValueError(f"There are {len(items)} questions but {len(texts)} answers.")
    right = [same(text, item.question.answer) for item, text in zip(items, texts, strict=True)]
    scores = {}
    for kind in TYPES:
        if own := [good for item, good in zip(items, right, strict=True) if item.question.kind == kind]:
            scores[kind] = Score(sum(own), len(own))
    return scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(SHIPPED), help="a folder")
    parser.add_argument("--per-type", type=int, default=400, help="questions of every type")
    parser.add_argument("--batch", type=int, default=50, help="questions in one left-padded batch")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write scores, questions and answers here")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    console = Console(highlight=False)
    items = evaluation_set(arguments.per_type, arguments.seed)
    texts = answer(items, *load(arguments.model), batch=arguments.batch, progress=True)
    table = Table("type", "exact match", "95 % interval", "n")
    scores = score(items, texts)
    for kind, own in scores.items():
        low, high = own.interval
        table.add_row(kind, f"{own.share:.1%}", f"{low:.1%} to {high:.1%}", str(own.n))
    console.print(table)
    if arguments.json:
        report = {
            "scores": {
                kind: asdict(own) | {"share": own.share, "interval": own.interval} for kind, own in scores.items()
            },
            "answers": [asdict(item.question) | {"given": text} for item, text in zip(items, texts, strict=True)],
        }
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
