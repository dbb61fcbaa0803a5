"""Quality against bytes and against speed, for every method and every sample: docs/frontier.md and its picture.

    python benchmarks/frontier.py [--only PART ...] [--limit 12] [--budget 0.75 0.65 ...] [--method thresholds pop ...]

Parts, each kept in ``out/frontier`` so that an interrupted run goes on:

- ``text``, ``moe``: KL to the dense model, same top token and perplexity on the passages that ship, for ``smollm2-135m`` and its
  mixture of experts ``smollm2-mixtral``; ``--limit`` texts;
- ``vision``: exact match of ``tiny-vlm`` on held-out questions, ``--questions`` in all;
- ``tasks``: accuracy of ``smollm2-135m`` on the tasks that ship (``pop_mm/data/tasks``), ``--limit-documents`` of each;
- ``speed``: decode steps of ``smollm2-135m`` through ``generate``, the median step of each round; needs a quiet machine.

The page is written from all parts that are there, ``--only`` without a part writes it alone. In full, about two hours on 2 cores.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
from frontier_page import write
from rich.console import Console
from rich.progress import Progress
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging

import pop_mm
from measure import available_cores, load_json, machine_facts, print_machine, quartiles, save_json, wide_console
from pop_mm.evaluation import METHODS, calibrate, config_for, texts
from pop_mm.evaluation.run import Run, Setup, grid
from pop_mm.samples import load, load_passages, resolve

ROOT = Path(__file__).parents[1]
BUDGETS = (0.85, 0.75, 0.65, 0.55, 0.45)
NAMES = ("thresholds", "pop", "static", "griffin", "wanda_sp", "magnitude", "random")
SPEED_METHODS = ("thresholds", "pop", "static")  # every fixed mask decodes as static does
TASKS = ("pop_copy", "pop_recall", "pop_arithmetic", "pop_reading")
WARM = 6  # steps of an answer that are not timed
SAMPLES = {"text": "smollm2-135m", "moe": "smollm2-mixtral"}


class Parts:
    """The parts of the page, as JSON in one folder."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.folder: Path = args.output

    def save(self, part: str, result: Any) -> None:
        """Keep a part."""
        save_json(self.folder / f"{part}.json", result)

    def known(self, part: str) -> Any:
        """What an earlier run has kept, or None."""
        return load_json(self.folder / f"{part}.json")


def quality(part: str, parts: Parts, progress: Progress) -> None:
    """Every method at every budget, by teacher forcing."""
    args = parts.args
    model, tokenizer = load(SAMPLES[part], dtype=torch.float32)
    sizes = {"prompt": args.prompt, "continuation": args.continuation, "generate": 0, "batch_size": args.batch}
    setup = Setup(SAMPLES[part], scope=args.scope, **sizes)
    passages = load_passages()
    windows = [w for w in texts.windows(passages, tokenizer, setup.tokens) if "#" not in w.name][: args.limit]
    rest = [w for w in texts.pieces(passages, tokenizer, setup.tokens) if len(w.ids) < setup.tokens or "#" in w.name]
    points = grid(args.method, [], [0.1], ["dense"], args.budget)
    run = Run(model, setup, windows, rest[:12], parts.folder / f"{part}-{len(windows)}-{args.scope}")
    task = progress.add_task(part, total=run.total(points))
    run.work(points, lambda: progress.advance(task))
    parts.save(part, run.results(points))


def vision(parts: Parts, progress: Progress) -> None:
    """Exact match of tiny-vlm, greedily, every sequence with a choice of its own."""
    sys.path.insert(0, str(ROOT / "demos" / "tiny_vlm"))
    import evaluate
    from questions import TYPES
    from vlm_accuracy import CALIBRATION, _calibration

    args = parts.args
    model, tokenizer, images = evaluate.load(resolve("tiny-vlm"))
    each = -(-args.questions // len(TYPES))
    items = evaluate.evaluation_set(each)
    names = [name for name in args.method if name != "dense"]
    known = None
    if "wanda_sp" in names:
        known = calibrate(model, _calibration(tokenizer, images, CALIBRATION if args.questions >= 60 else 6))
    points: list[tuple[str, float | None]] = [("dense", None), *((n, b) for b in args.budget for n in names)]
    key = {"questions": len(items), "types": list(TYPES)}
    found = parts.known("vision") or {**key, "rows": []}
    if {name: found[name] for name in key} != key:
        found = {**key, "rows": []}
    done = {(row["method"], row["budget"]) for row in found["rows"]}
    task = progress.add_task("vision", total=len(points))
    for name, budget in points:
        if (name, budget) not in done:
            config = None if name == "dense" else config_for(name, budget=budget, calibration=known)
            with nullcontext() if config is None else pop_mm.prune(model, config):
                answers = evaluate.answer(items, model, tokenizer, images, batch=args.batch_questions)
            right = [evaluate.same(a, item.question.answer) for a, item in zip(answers, items, strict=True)]
            found["rows"].append({"method": name, "budget": budget, "right": right})
            parts.save("vision", found)
        progress.advance(task)


def tasks(parts: Parts, progress: Progress) -> None:
    """The tasks that ship, by lm-evaluation-harness; each of its runs has the dense model's figures too."""
    import lm_eval

    from pop_mm.evaluation.lm_harness import PopLM, tasks_folder

    args = parts.args
    manager = lm_eval.tasks.TaskManager(include_path=str(tasks_folder()), include_defaults=False)
    model, tokenizer = load(SAMPLES["text"], dtype=torch.float32)
    found = parts.known("tasks") or {"documents": args.limit_documents, "rows": []}
    done = {(row["method"], row["budget"]) for row in found["rows"]}
    names = [name for name in args.method if name in ("thresholds", "pop", "static")]
    task = progress.add_task("tasks", total=len(names) * len(args.budget))
    for budget in args.budget:
        for name in names:
            if (name, budget) not in done:
                lm = PopLM(model, tokenizer=tokenizer, budget=budget, method=name, batch_size=4)
                results = lm_eval.simple_evaluate(
                    lm, tasks=list(TASKS), task_manager=manager, limit=args.limit_documents, bootstrap_iters=0
                )["results"]
                found["rows"].append({"method": name, "budget": budget, "tasks": results})
                parts.save("tasks", found)
            progress.advance(task)


class Clock(BaseStreamer):
    """When each token was there."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, _: torch.Tensor) -> None:
        """Called with the prompt, then with each token."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is left to do."""

    @property
    def step(self) -> float:
        """Seconds between two tokens, median, without the steps in which weights are moved."""
        times = self.times[WARM:]
        return median(b - a for a, b in pairwise(times))


def speed(parts: Parts, progress: Progress) -> None:
    """Seconds of a decode step through ``generate``: all variants once in each round, in random order."""
    args = parts.args
    model, tokenizer = load(SAMPLES["text"], dtype=torch.float32)
    ids = tokenizer(" ".join(load_passages().values()), return_tensors="pt").input_ids[:, : args.speed_prompt]
    names = [name for name in args.method if name in SPEED_METHODS]
    settings: dict[tuple[str, float | None], dict[str, Any] | None] = {("dense", None): None}
    settings["dense, our kernels", None] = {"ratio": 0.0, "kernels": "compiled"}
    settings |= {(name, budget): {"budget": budget, "method": name} for budget in args.budget for name in names}
    found: dict[tuple[str, float | None], list[float]] = {key: [] for key in settings}
    task = progress.add_task("speed", total=args.rounds * len(settings))
    machine, order = machine_facts(), list(settings)
    for number in range(args.rounds):
        random.Random(number).shuffle(order)
        for key in order:
            own, clock = settings[key], Clock()
            with nullcontext() if own is None else pop_mm.prune(model, **own):
                model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    do_sample=False,
                    min_new_tokens=args.decoded + WARM,
                    max_new_tokens=args.decoded + WARM,
                    streamer=clock,
                )
            found[key].append(clock.step)
            progress.advance(task)
        rows = [
            {"method": name, "budget": budget, "step_s": steps, "speedup": speedup(found["dense", None], steps)}
            for (name, budget), steps in found.items()
        ]
        how = f"{args.speed_prompt} tokens of prompt, median of {args.decoded} decode steps in each of {number + 1} rounds"
        parts.save("speed", {"machine": machine, "how": how, "rows": rows})


def speedup(dense: Sequence[float], steps: Sequence[float]) -> list[float]:
    """Quartiles of how much faster the steps are, over the rounds."""
    ratios = [d / s for d, s in zip(dense, steps, strict=True)]
    low, high = quartiles(ratios)
    return [low, median(ratios), high]


PARTS: dict[str, Callable[[Parts, Progress], None]] = {
    "text": lambda parts, progress: quality("text", parts, progress),
    "moe": lambda parts, progress: quality("moe", parts, progress),
    "vision": vision,
    "tasks": tasks,
    "speed": speed,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run what was asked for and write the page; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=list(PARTS), nargs="*", metavar="PART", default=list(PARTS))
    parser.add_argument("--method", choices=[m for m in METHODS if m != "dense"], nargs="+", default=list(NAMES))
    parser.add_argument("--budget", type=float, nargs="+", default=list(BUDGETS))
    parser.add_argument("--scope", choices=["overall", "ffn"], default="overall", help="of the budgets of text and moe")
    parser.add_argument("--limit", type=int, default=12, help="texts")
    parser.add_argument("--prompt", type=int, default=256, help="prompt tokens of a text")
    parser.add_argument("--continuation", type=int, default=128, help="decode steps scored of a text")
    parser.add_argument("--batch", type=int, default=2, help="texts at once")
    parser.add_argument("--questions", type=int, default=400, help="of tiny-vlm, over all types")
    parser.add_argument("--batch-questions", type=int, default=50, help="questions at once")
    parser.add_argument("--limit-documents", type=int, default=60, help="of each task")
    parser.add_argument("--rounds", type=int, default=9, help="of speed")
    parser.add_argument("--speed-prompt", type=int, default=128, help="prompt tokens where speed is measured")
    parser.add_argument("--decoded", type=int, default=32, help="decode steps that are timed in a round")
    parser.add_argument("--threads", type=int, default=available_cores())
    parser.add_argument("--output", type=Path, default=ROOT / "out" / "frontier", help="where parts are kept")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "frontier.md")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    logging.set_verbosity_error()
    console = wide_console()
    print_machine(console, machine_facts())
    parts = Parts(args)
    with Progress(console=Console(file=sys.stderr), transient=True, refresh_per_second=1) as progress:
        for name in args.only:
            PARTS[name](parts, progress)
    write(parts.folder, args.page)
    console.print(f"Written: {args.page}", highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
