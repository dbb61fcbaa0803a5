"""Decode speed of thresholds and POP against the dense model on torch's kernels, all in turn in one run.

    python benchmarks/threshold_speed.py [--rounds 3]                                              # SmolLM2-135M, float32
    python benchmarks/threshold_speed.py --config llama3.2-1b --random-weights --prompt 128 --rounds 2    # bfloat16, 3 GB

Each variant is attached, generates twice and is left. A step is the median time between two tokens of the second answer, whose
prompt finds the weights turned; *prefill* is that prompt's forward with what the session adds to it. *Limit* is Amdahl's:
T / (T - F + F b) with T a dense step on our kernels, F the time of its modules that are read by rows, and b the share of their
bytes that was read. *Turn* is the time it took to turn the weights, once a session, and *leave* to turn them back. With
``--weights int8`` a copy of the model, quantised by torchao, takes turns too: dense by torchao, dense on our kernels, and with
thresholds. Needs a quiet machine.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

import pop_mm
from measure import Verdict, available_cores, machine_facts, print_machine, print_verdicts, wide_console
from pop_mm.adapters import adapter_for
from pop_mm.bench.prompts import Prompts
from pop_mm.bench.source import Source
from pop_mm.bench.timing import generate_timed
from pop_mm.patching import Patches
from pop_mm.samples.quantise import WEIGHTS, quantised_copy

DENSE, OURS, JUDGED = "dense", "dense, our kernels", "thresholds 0.65"
SETTINGS: dict[str, dict[str, Any] | None] = {
    DENSE: None,
    OURS: {"ratio": 0.0, "kernels": "compiled"},
    "thresholds 0.75": {"budget": 0.75},
    JUDGED: {"budget": 0.65},
    "POP 20 %": {"ratio": 0.2},
    "POP 40 %": {"ratio": 0.4},
}
INT8_DENSE, INT8_OURS, INT8 = "int8, torchao", "int8, our kernels", "int8, thresholds 0.65"
OF_INT8 = {INT8_DENSE: None, INT8_OURS: SETTINGS[OURS], INT8: {"budget": 0.65}}
TARGETS = {"smollm2-135m": 2.1, "llama3.2-1b": 1.9}  # of 0.65 over dense, 128 tokens in and out
INT8_TARGETS = {"llama3.2-1b": 2.5}  # the same of int8
PREFILL, OF_LIMIT, SECONDS = 1.05, 0.95, 2.0


@dataclass
class Found:
    """Of one variant, round by round, in seconds; ``share`` is what thresholds read of the weights that they are for."""

    step: list[float] = field(default_factory=list)
    prefill: list[float] = field(default_factory=list)
    turn: list[float] = field(default_factory=list)
    leave: list[float] = field(default_factory=list)
    share: float = 1.0


def run(model: Any, settings: dict[str, Any] | None, prompts: Sequence[Tensor], new_tokens: int, found: Found) -> None:
    """One round of a variant."""
    with nullcontext() if settings is None else pop_mm.prune(model, **settings) as session:
        generate_timed(model, prompts[0], 4)  # turns the weights
        timed = generate_timed(model, prompts[1], new_tokens)
        found.step.append(timed.step)
        found.prefill.append(timed.prefill)
        if session is not None:
            found.turn.append(session.moving_seconds)
            if settings is not None and "budget" in settings:
                found.share = session.report.scope_share[1]
        started = time.perf_counter()
    found.leave.append(time.perf_counter() - started)


@contextmanager
def clocked(model: Any) -> Iterator[list[float]]:
    """Within: seconds of the modules that thresholds read by rows, added up; one number, of all calls."""
    adapter, total = adapter_for(model), [0.0]
    ffns = [ffn.holder or ffn.module for ffn in adapter.projections(model)]  # type: ignore[union-attr]
    groups = [module for group in adapter.input_groups(model) for module in group.modules]

    def timed(own: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(own)  # so a session knows its own forward in it
        def call(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            out = own(*args, **kwargs)
            total[0] += time.perf_counter() - started
            return out

        return call

    with Patches() as patches:
        for module in (*ffns, *groups):
            patches.forward(module, timed(module.forward))
        yield total


def rows_share(model: Any, ids: Tensor, new_tokens: int = 32) -> float:
    """F / T: of a dense decode step on our kernels, the time of what thresholds read by rows."""
    with pop_mm.prune(model, **SETTINGS[OURS] or {}), clocked(model) as total:
        ends: list[tuple[float, float]] = []
        after = model.register_forward_hook(lambda *_: ends.append((time.perf_counter(), total[0])))
        generate_timed(model, ids, new_tokens)
        after.remove()
    steps = [(b[0] - a[0], b[1] - a[1]) for a, b in pairwise(ends[1:])]
    return statistics.median(rows / whole for whole, rows in steps)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure all variants; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="a sample's name, a folder or a hub id")
    parser.add_argument("--config", metavar="NAME", help="published dimensions instead, with --random-weights")
    parser.add_argument("--random-weights", action="store_true")
    parser.add_argument("--layers", type=int, help="of the config, fewer than published")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--weights", choices=WEIGHTS, default="auto", help="a quantised copy takes turns too")
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--only", nargs="+", choices=list(SETTINGS), default=list(SETTINGS), metavar="VARIANT")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=available_cores())
    args = parser.parse_args(argv)
    if bool(args.config) != args.random_weights:
        parser.error("--config NAME and --random-weights go together")
    torch.set_num_threads(args.threads)
    console = wide_console()
    print_machine(console, machine_facts())
    source = Source(args.config or args.model, bool(args.config), args.layers, args.dtype)
    model, tokenizer = source.load(torch.device("cpu"))
    chosen = [name for name in SETTINGS if name in args.only or name in (DENSE, OURS)]
    variants = {name: (model, SETTINGS[name]) for name in chosen}
    if args.weights != "auto":
        small = quantised_copy(model, args.weights)
        variants |= {name: (small, settings) for name, settings in OF_INT8.items()}
    found = {name: Found() for name in variants}
    limit_of: list[float] = []
    for number in range(args.rounds):
        prompts = [Prompts(model, tokenizer, seed).ids(number, 1, args.prompt) for seed in (0, 1)]
        limit_of.append(rows_share(model, prompts[1]))
        for name, (of, settings) in variants.items():
            run(of, settings, prompts, args.new_tokens, found[name])
    title = f"{source.label}, {model.dtype}, {args.prompt} tokens in, {args.new_tokens} out, {args.rounds} rounds"
    table = Table(title=title.replace("torch.", ""))
    for name in ("variant", "tokens/s", "step ms", "over dense", "over ours", "limit", "of limit", "prefill ms"):
        table.add_column(name, justify="left" if name == "variant" else "right", no_wrap=True)
    for name in ("of dense", "turn s", "leave s"):
        table.add_column(name, justify="right", no_wrap=True)
    share = statistics.median(limit_of)
    verdicts: list[Verdict] = []
    for name, mine in found.items():
        over, ours, prefill = (
            ratios(found[DENSE].step, mine.step),
            ratios(found[OURS].step, mine.step),
            ratios(mine.prefill, found[DENSE].prefill),
        )
        limit = 1 / (1 - share + share * mine.share) if mine.share < 1 and name not in OF_INT8 else None
        step, gain = statistics.median(mine.step), statistics.median(ours)
        table.add_row(
            name,
            f"{1 / step:.1f}",
            f"{1e3 * step:.1f}",
            spread(over),
            spread(ours),
            f"{limit:.2f}" if limit else "-",
            f"{gain / limit:.2f}" if limit else "-",
            f"{1e3 * statistics.median(mine.prefill):.0f}",
            spread(prefill),
            f"{statistics.median(mine.turn):.2f}" if mine.turn else "-",
            f"{statistics.median(mine.leave):.2f}",
        )
        if name == INT8 and (args.prompt, args.new_tokens) == (128, 128):
            speed, target = statistics.median(over), INT8_TARGETS.get(source.name)
            said = f"int8: {speed:.2f} over dense {model.dtype}, at least {target}".replace("torch.", "")
            verdicts.append(Verdict(said, None if target is None else speed >= target))
        if name == JUDGED and limit is not None:
            target = TARGETS.get(source.name) if (args.prompt, args.new_tokens) == (128, 128) else None
            speed = statistics.median(over)
            verdicts += [
                Verdict(f"{speed:.2f} over dense, at least {target}", None if target is None else speed >= target),
                Verdict(f"{gain / limit:.2f} of the limit, at least {OF_LIMIT}", gain / limit >= OF_LIMIT),
                Verdict(
                    f"prefill {statistics.median(prefill):.2f} of dense, at most {PREFILL}",
                    statistics.median(prefill) <= PREFILL,
                ),
                Verdict(
                    f"turn {max(mine.turn):.2f} s, leave {max(mine.leave):.2f} s, at most {SECONDS} each",
                    max(*mine.turn, *mine.leave) <= SECONDS,
                ),
            ]
    console.print(table)
    console.print(f"What thresholds read by rows takes {share:.2f} of a dense step on our kernels.", highlight=False)
    return print_verdicts(console, verdicts)


def ratios(above: Sequence[float], below: Sequence[float]) -> list[float]:
    """In-round ratios."""
    return [a / b for a, b in zip(above, below, strict=True)]


def spread(values: Sequence[float]) -> str:
    """Median and range."""
    return f"{statistics.median(values):.2f} [{min(values):.2f}, {max(values):.2f}]"


if __name__ == "__main__":
    sys.exit(main())
