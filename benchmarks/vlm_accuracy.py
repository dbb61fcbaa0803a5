"""Questions about pictures, answered by a pruned model: exact match by method and overall ratio (as the paper's table 4).

The tiny VLM answers held-out scenes (``demos/tiny_vlm``), greedily:

- dense: the model as it is;
- random, magnitude, Wanda-sp: one mask for all prompts, in prefill and decode; Wanda-sp's from the scores of calibration
  scenes of the training split;
- static and GRIFFIN: the prompt's best channels at every step; full: the best of all channels at every step;
- POP, with a dense prefill and with the paper's (R and C only);
- POP whose partition comes from the image's tokens alone, and from the text's alone (``modality_weights``);
- POP whose partition comes from the same question asked without the image: what the image's prefill is worth.

Batches are pruned per sequence, which answers as one prompt at a time does.

Run: ``python benchmarks/vlm_accuracy.py [--per-type 400] [--quick] [--json FILE]``; exit code 1 if a target fails.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

import pop_mm
from measure import Verdict, available_cores, machine_facts, print_machine, print_verdicts, wide_console
from pop_mm.adapters import adapter_for
from pop_mm.evaluation import calibrate, config_for
from pop_mm.samples import resolve

sys.path.insert(0, str(Path(__file__).parents[1] / "demos" / "tiny_vlm"))
import evaluate
from inputs import encode, user
from questions import TYPES, ask
from scenes import render, sample_scene

RATIOS = (0.2, 0.4)
CALIBRATION = 128  # scenes that Wanda-sp sees
MAX_NEW_TOKENS = 64


@dataclass(frozen=True)
class Row:
    """Answers of one method at one ratio: right or not, for every question, by type.

    Attributes
    ----------
    right : dict of str to list of bool
    """

    method: str
    ratio: float
    right: dict[str, list[bool]]

    @property
    def mean(self) -> float:
        """Mean over types of the share of right answers."""
        return float(np.mean([np.mean(right) for right in self.right.values()]))

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        scores = {kind: evaluate.Score(sum(right), len(right)) for kind, right in self.right.items()}
        found = {k: {"exact_match": s.share, "interval": s.interval, "n": s.n} for k, s in scores.items()}
        return {"method": self.method, "ratio": self.ratio, "mean": self.mean, "types": found}


def text_partition(model: Any, session: Any, end: set[int]) -> Callable[..., Tensor]:
    """``generate`` for one prompt, pruned by the partition of the same prompt without its image."""

    @torch.inference_mode()
    def generate(input_ids: Tensor, attention_mask: Tensor, **inputs: Any) -> Tensor:
        inputs.pop("do_sample"), inputs.pop("max_new_tokens")
        image = adapter_for(model).modality_token_ids(model)["image"]
        markers = {image, *_around(input_ids[0], image)}
        words = input_ids[:, [token not in markers for token in input_ids[0].tolist()]]
        alone = model(input_ids=words, use_cache=True).past_key_values
        out = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=True, **inputs)
        cache = out.past_key_values
        session.adopt(cache, alone)
        while True:
            token = out.logits[:, -1:].argmax(-1)
            input_ids = torch.cat([input_ids, token], 1)
            if int(token) in end or input_ids.shape[1] - attention_mask.shape[1] >= MAX_NEW_TOKENS:
                return input_ids
            out = model(input_ids=token, past_key_values=cache, use_cache=True)

    return generate


def _around(ids: Tensor, image: int) -> set[int]:
    """The tokens that begin and end an image."""
    places = (ids == image).nonzero().flatten()
    return {int(ids[places[0] - 1]), int(ids[places[-1] + 1])} if len(places) else set()


def run(folder: str, per_type: int, batch: int, calibration: int, progress: Progress) -> list[Row]:
    """All methods at all ratios, on the same questions."""
    model, tokenizer, images = evaluate.load(folder)
    items = evaluate.evaluation_set(per_type)
    few = [item for kind in TYPES for item in [i for i in items if i.question.kind == kind][: max(per_type // 4, 1)]]
    ends = model.generation_config.eos_token_id
    end = set(ends if isinstance(ends, list) else [ends])
    known = calibrate(model, _calibration(tokenizer, images, calibration))
    methods: dict[str, dict[str, Any]] = {
        "random": {"method": "random", "prefill": "partition"},
        "magnitude": {"method": "magnitude", "prefill": "partition"},
        "Wanda-sp": {"method": "wanda_sp", "prefill": "partition", "calibration": known},
        "GRIFFIN": {"method": "griffin"},
        "static": {"method": "static"},
        "POP, gamma 0.05": {"method": "pop", "gamma": 0.05},
        "POP": {"method": "pop"},
        "POP, gamma 0.2": {"method": "pop", "gamma": 0.2},
        "full": {"method": "full"},
        "POP, partition prefill": {"method": "pop", "prefill": "partition"},
        "POP by the image's tokens": {"method": "pop", "modality_weights": {"text": 0}},
        "POP by the text's tokens": {"method": "pop", "modality_weights": {"image": 0}},
    }
    task = progress.add_task("answering", total=1 + len(RATIOS) * (len(methods) + 2))

    def scored(method: str, ratio: float, questions: Sequence[Any], **how: Any) -> Row:
        texts = evaluate.answer(questions, model, tokenizer, images, **{"batch": batch, **how})
        right: dict[str, list[bool]] = {}
        for item, text in zip(questions, texts, strict=True):
            right.setdefault(item.question.kind, []).append(evaluate.same(text, item.question.answer))
        progress.advance(task)
        return Row(method, ratio, right)

    rows = [scored("dense", 0.0, items)]
    for ratio in RATIOS:
        for method, settings in methods.items():
            with pop_mm.prune(model, config_for(ratio=ratio, **settings)):
                rows.append(scored(method, ratio, items))
        with pop_mm.prune(model, config_for("pop", ratio, batch="shared", backend="auto")):
            rows.append(scored("POP, one at a time", ratio, few, batch=1))
        with pop_mm.prune(model, config_for("pop", ratio, batch="shared")) as session:
            generate = text_partition(model, session, end)
            rows.append(scored("POP by a prompt without the image", ratio, few, batch=1, generate=generate))
    return rows


def _calibration(tokenizer: Any, images: Any, count: int) -> list[dict[str, Tensor]]:
    """Questions about scenes of the training split, every type in turn."""
    rng = np.random.default_rng(7)
    chats: list[Any] = []
    while len(chats) < count:
        scene = sample_scene(rng, "train")
        if (question := ask(scene, TYPES[len(chats) % len(TYPES)], rng)) is not None:
            chats.append([user(question.text, render(scene))])
    return [encode(chats[at : at + 32], tokenizer, images) for at in range(0, count, 32)]


def difference(one: Row, other: Row, draws: int = 4000) -> tuple[float, float, float]:
    """Mean difference of the two methods' means over types, with the 95 % interval of a paired bootstrap over questions."""
    generator = np.random.default_rng(0)
    samples = np.zeros(draws)
    for kind in one.right:
        delta = np.array(one.right[kind], float) - np.array(other.right[kind], float)
        samples += delta[generator.integers(len(delta), size=(draws, len(delta)))].mean(1)
    low, high = np.quantile(samples / len(one.right), [0.025, 0.975])
    return one.mean - other.mean, float(low), float(high)


def show(console: Console, rows: Sequence[Row]) -> None:
    """One row a method and ratio."""
    table = Table(
        title="Held-out scenes, exact match in percent, with 95 % intervals (Wilson)",
        caption="The last two rows of a ratio: one prompt at a time, on a quarter of the questions.",
    )
    for name in ("overall", "method", *TYPES, "mean"):
        table.add_column(name, justify="right" if name != "method" else "left", no_wrap=name == "method")
    for row in rows:
        cells = []
        for right in row.right.values():
            low, high = evaluate.Score(sum(right), len(right)).interval
            cells.append(f"{100 * np.mean(right):.1f}\n\\[{100 * low:.0f}, {100 * high:.0f}]")
        table.add_row(f"{row.ratio:.0%}" if row.ratio else "-", row.method, *cells, f"{100 * row.mean:.1f}")
    console.print(table)


def verdicts(rows: Sequence[Row], judged: bool) -> list[Verdict]:
    """Dense answers well, POP is at least as good as static, and the image's prefill matters."""
    found = {(row.method, row.ratio): row for row in rows}
    dense = found["dense", 0.0]
    worst, share = min(((k, float(np.mean(r))) for k, r in dense.right.items()), key=lambda item: item[1])
    result = [Verdict(f"dense answers every type at 90 %: {worst} {share:.1%}", share >= 0.9 if judged else None)]
    for ratio in RATIOS:
        mean, low, high = difference(found["POP", ratio], found["static", ratio])
        text = f"{ratio:.0%}: POP is at least as good as static: {100 * mean:+.1f} points [{100 * low:+.1f}, {100 * high:+.1f}]"
        result.append(Verdict(text, mean >= 0 if judged else None))
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny-vlm", help="tiny-vlm, or a folder that was trained in the same way")
    parser.add_argument("--per-type", type=int, default=400, help="questions of every type")
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--threads", type=int, default=available_cores())
    parser.add_argument("--quick", action="store_true", help="one question of every type: does it run?")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    console, machine = wide_console(), machine_facts()
    print_machine(console, machine)
    with Progress(console=Console(file=sys.stderr), transient=True, refresh_per_second=1) as progress:
        questions, calibration = (1, 6) if args.quick else (args.per_type, CALIBRATION)
        rows = run(resolve(args.model), questions, args.batch, calibration, progress)
    show(console, rows)
    found = verdicts(rows, not args.quick)
    for ratio in RATIOS:
        by = {row.method: row for row in rows if row.ratio == ratio}
        without = difference(by["POP, one at a time"], by["POP by a prompt without the image"])
        console.print(
            f"{ratio:.0%}: partition from image and text, instead of from the text without the image: "
            f"{100 * without[0]:+.1f} points [{100 * without[1]:+.1f}, {100 * without[2]:+.1f}]",
            highlight=False,
            markup=False,
        )
    if args.json:
        result = {"machine": machine, "rows": [r.to_dict() for r in rows], "verdicts": [v.to_dict() for v in found]}
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    return print_verdicts(console, found)


if __name__ == "__main__":
    sys.exit(main())
