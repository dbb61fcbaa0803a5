"""What a prompt pays for being pruned: statistics, partition and reordering beside its dense prefill, and what a prefill on
R and C saves and costs.

Run: ``python benchmarks/prefill_cost.py [--prompt 512] [--ratio 0.4] [--quick] [--json FILE]``; exit code 1 if a target
fails. Timings need a quiet machine: see the README here.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

import pop_mm
from measure import Verdict, available_cores, machine_facts, print_machine, print_verdicts, wide_console
from pop_mm import kernels
from pop_mm.evaluation.fidelity import score_texts, step_logits
from pop_mm.samples import load, load_passages

STANDARD_MODEL, STANDARD_PROMPT, STANDARD_RATIO = "smollm2-135m", 512, 0.4
TARGETS = {"first": 0.08, "next": 0.04}  # of the dense prefill, with prefill="dense"
PREFILLS = {"dense": {}, "partition": {}, "probe 64": {"probe_tokens": 64}, "probe 128": {"probe_tokens": 128}}
PROBES = (32, 64, 128)  # of which the quality is measured
SCORED = 64
PARTS = ("statistics", "partition", "reordering")
TORCH = "torch"  # moves and sums by torch's kernels, as without a compiler


@dataclass(frozen=True)
class Cost:
    """Seconds that one prompt took: ``prefill`` is its forward, and what follows it before the first pruned step."""

    prefill: float
    statistics: float
    partition: float
    reordering: float
    moved: int


@dataclass(frozen=True)
class Row:
    """Medians over rounds. Shares are of the dense prefill of the same round."""

    kernels: str
    prefill: str
    prompt: str
    prefill_s: float
    speedup: float
    statistics: float
    partition: float
    reordering: float
    moved_share: float

    @property
    def overhead(self) -> float:
        """Statistics, partition and reordering together."""
        return self.statistics + self.partition + self.reordering


def method_of(prefill: str) -> pop_mm.Pop:
    """The method that a name in :data:`PREFILLS` stands for."""
    return pop_mm.Pop(prefill="dense" if prefill == "dense" else "partition", **PREFILLS[prefill])


@contextmanager
def without_library(without: bool) -> Iterator[None]:
    """Within, if so: as on a machine that has no compiler."""
    own = kernels.library
    kernels.library = (lambda: None) if without else own
    try:
        yield
    finally:
        kernels.library = own


class PartSeconds(dict[str, float]):
    """A listener that adds up seconds by part."""

    def __init__(self) -> None:
        super().__init__(statistics=0.0, partition=0.0)
        self._running: list[tuple[str, float]] = []

    def push(self, part: str) -> None:
        """A part begins."""
        self._running.append((part, self.now()))

    def pop(self) -> None:
        """The part that began last ends."""
        part, started = self._running.pop()
        self.took(part, self.now() - started)

    def now(self) -> float:
        """Seconds on a clock."""
        return time.perf_counter()

    def took(self, part: str, seconds: float) -> None:
        """A part took so long."""
        self[part] = self.get(part, 0.0) + seconds


@contextmanager
def clocked(session: pop_mm.Session) -> Iterator[PartSeconds]:
    """Within: seconds spent in the statistics and in making partitions, by part."""
    session.events.listener = seconds = PartSeconds()
    try:
        yield seconds
    finally:
        session.events.listener = None


def cost(model: Any, session: pop_mm.Session, ids: Tensor, token: Tensor) -> Cost:
    """Prefill one prompt, and let the first decode step place its channels."""
    timings = session.timings
    moving, moved = session.moving_seconds, session.moved_channels
    with clocked(session) as seconds:
        started = time.perf_counter()
        cache = model(ids, use_cache=True, logits_to_keep=1).past_key_values
        forward, within, ranking = time.perf_counter() - started, session.moving_seconds, timings.partitioning
        model(token, past_key_values=cache)
    reordering = session.moving_seconds - moving
    after = session.moving_seconds - within + timings.partitioning - ranking
    return Cost(
        forward + after, seconds["statistics"], seconds["partition"], reordering, session.moved_channels - moved
    )


@torch.inference_mode()
def measure(model: Any, texts: Sequence[Tensor], ratio: float, rounds: int) -> tuple[list[Row], float]:
    """All variants in random order in every round, one round to warm up; the rows, and the seconds of a dense prefill.

    Each round has two texts: the first prompt of a session, and its next one.
    """
    names = [*(["compiled"] if kernels.why_not() is None else []), TORCH]
    variants: list[tuple[str, str] | None] = [None, *product(names, PREFILLS)]
    token, order = texts[0][:, :1], random.Random(0)
    dense: list[float] = []
    found: list[dict[tuple[str, str], tuple[Cost, Cost]]] = []
    channels = 0
    for number in range(rounds + 1):
        first, second = (texts[(number + offset) % len(texts)] for offset in (0, 1))
        costs: dict[tuple[str, str], tuple[Cost, Cost]] = {}
        for variant in order.sample(variants, len(variants)):
            if variant is None:
                started = time.perf_counter()
                model(first, use_cache=True, logits_to_keep=1)
                seconds = time.perf_counter() - started
                continue
            config = pop_mm.PopConfig(ratio, method=method_of(variant[1]))
            with without_library(variant[0] == TORCH), pop_mm.prune(model, config) as session:
                costs[variant] = cost(model, session, first, token), cost(model, session, second, token)
            channels = sum(plan.sizes.channels for plan in session.plans)
        if number:
            dense.append(seconds)
            found.append(costs)
    rows = []
    for (kind, prefill), (which, prompt) in product(product(names, PREFILLS), enumerate(TARGETS)):
        mine = [costs[kind, prefill][which] for costs in found]

        def share(value: Callable[[Cost], float], mine: Sequence[Cost] = mine) -> float:
            return statistics.median(value(c) / d for c, d in zip(mine, dense, strict=True))

        rows.append(
            Row(
                kernels=kind,
                prefill=prefill,
                prompt=prompt,
                prefill_s=statistics.median(c.prefill for c in mine),
                speedup=1 / share(lambda c: c.prefill),
                statistics=share(lambda c: c.statistics),
                partition=share(lambda c: c.partition),
                reordering=share(lambda c: c.reordering),
                moved_share=statistics.median(c.moved for c in mine) / channels,
            )
        )
    return rows, statistics.median(dense)


def quality(model: Any, texts: Sequence[Tensor], ratio: float, scored: int) -> dict[str, dict[str, float]]:
    """KL to the dense model and share of equal top tokens over the steps after each text's prompt, by way to prefill."""
    ways = {"dense": pop_mm.Pop(), "partition": pop_mm.Pop(prefill="partition")}
    ways |= {f"probe {n}": pop_mm.Pop(prefill="partition", probe_tokens=n) for n in PROBES}
    scores: dict[str, list[Any]] = {name: [] for name in ways}
    for ids in texts:
        prompt = ids.shape[1] - 1 - scored
        dense = step_logits(model, ids, prompt)
        for name, method in ways.items():
            config = pop_mm.PopConfig(ratio, backend="masked", method=method)
            scores[name] += score_texts(model, ids, prompt, config, dense)
    return {
        name: {key: statistics.mean(getattr(score, key) for score in found) for key in ("kl", "agreement")}
        for name, found in scores.items()
    }


def cost_table(rows: Sequence[Row], dense: float, title: str) -> Table:
    """One row for each kind of kernels, way to prefill, and prompt of a session."""
    table = Table(
        title=f"{title}: dense prefill {1e3 * dense:.0f} ms",
        caption="prefill: with all that comes before the first pruned step; shares are of the dense prefill in the same round.",
    )
    heads = ("kernels", "prefill", "prompt", "prefill ms", "speed-up", *PARTS, "together", "channels moved")
    for head in heads:
        table.add_column(head, justify="left" if head in heads[:3] else "right", no_wrap=True)
    for r in rows:
        shares = (r.statistics, r.partition, r.reordering, r.overhead, r.moved_share)
        table.add_row(
            r.kernels,
            r.prefill,
            r.prompt,
            f"{1e3 * r.prefill_s:.0f}",
            f"{r.speedup:.2f}",
            *(f"{s:.1%}" for s in shares),
        )
    return table


def quality_table(found: Mapping[str, Mapping[str, float]], title: str) -> Table:
    """One row for each way to prefill."""
    table = Table(title=title)
    for head in ("prefill", "KL to dense, nats/token", "same top token"):
        table.add_column(head, justify="right")
    for name, scores in found.items():
        table.add_row(name, f"{scores['kl']:.3f}", f"{scores['agreement']:.1%}")
    return table


def verdicts_of(rows: Sequence[Row], judged: bool) -> list[Verdict]:
    """Two targets, with the whole FFN in the prefill, for the kernels that this machine uses; by torch's it is for comparison."""
    return [
        Verdict(
            f"{r.kernels} kernels, {r.prompt} prompt: statistics, partition and reordering are {r.overhead:.1%} of the dense "
            f"prefill (target: at most {TARGETS[r.prompt]:.0%})",
            r.overhead <= TARGETS[r.prompt] if judged and r.kernels == rows[0].kernels else None,
        )
        for r in rows
        if r.prefill == "dense"
    ]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=STANDARD_MODEL, help="sample name, folder or hub id")
    parser.add_argument("--prompt", type=int, help=f"tokens of a prompt ({STANDARD_PROMPT})")
    parser.add_argument("--ratio", type=float, default=STANDARD_RATIO, help="overall ratio")
    parser.add_argument("--rounds", type=int, help="rounds, after one to warm up (5)")
    parser.add_argument("--texts", type=int, help="texts of which the quality is measured (6)")
    parser.add_argument("--threads", type=int, default=available_cores())
    parser.add_argument("--quick", action="store_true", help="short prompts, 1 round: does it run?")
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; the exit code."""
    args = parse(argv)
    torch.set_num_threads(args.threads)
    console, machine = wide_console(), machine_facts()
    print_machine(console, machine)
    prompt = args.prompt or (24 if args.quick else STANDARD_PROMPT)
    rounds, count = args.rounds or (1 if args.quick else 5), args.texts or (2 if args.quick else 6)
    scored = 8 if args.quick else SCORED
    model, tokenizer = load(args.model)
    model.eval()
    passages = [tokenizer(text, return_tensors="pt").input_ids for text in load_passages().values()]
    texts = [ids[:, :prompt] for ids in passages if ids.shape[1] >= prompt]
    if not texts:
        raise SystemExit(
            f"No passage has {prompt} tokens; --prompt can be at most {max(i.shape[1] for i in passages)}."
        )
    rows, dense = measure(model, texts, args.ratio, rounds)
    standard = (args.model, prompt, args.ratio) == (STANDARD_MODEL, STANDARD_PROMPT, STANDARD_RATIO) and not args.quick
    name = f"{args.model}, {prompt} tokens, {args.ratio:.0%} overall"
    console.print(cost_table(rows, dense, name))
    found = quality(model, texts[:count], args.ratio, min(scored, prompt // 2))
    steps = min(scored, prompt // 2)
    console.print(
        quality_table(found, f"{name}: {len(texts[:count])} texts, their last {steps} tokens scored as pruned steps")
    )
    verdicts = verdicts_of(rows, standard)
    if args.json:
        result = {
            "machine": machine,
            "settings": {"model": args.model, "prompt": prompt, "ratio": args.ratio, "rounds": rounds, "texts": count},
            "dense_s": dense,
            "rows": [{**asdict(row), "overhead": row.overhead} for row in rows],
            "quality": found,
            "verdicts": [verdict.to_dict() for verdict in verdicts],
            "load_average_at_end": machine_facts()["load_average"],
        }
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    return print_verdicts(console, verdicts)


if __name__ == "__main__":
    sys.exit(main())
