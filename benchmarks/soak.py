"""Thousands of prompts through one session: it must not leak or slow down, and must give the weights back.

Prompts of 4 to 400 tokens, drawn with a fixed seed: alone and in batches with padding on the left, greedy and sampled, on
dynamic and static caches, second turns on a cache just filled and on one kept for a while. Every 50th is abandoned half-way
by an exception. Twenty times in a run everything that this script holds is let go, a fixed prompt is timed, in turn with a
dense copy of the model (so that other processes slow both), and what is left is counted: resident memory, objects, tensors,
states of prompts, caches that the session knows.

Run: ``python benchmarks/soak.py [--prompts N] [--moe | --model NAME] [--dense] [--quick] [--json FILE]``; exit code 1 if
something grows or slows down. ``--dense`` sends the same prompts without a session: what transformers does by itself.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import hashlib
import json
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from soak_traffic import KINDS, Traffic, generate
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM
from transformers import logging as transformers_logging

import pop_mm
from measure import Verdict, available_cores, machine_facts, print_machine, print_verdicts, wide_console
from pop_mm.decoding.state import PromptState
from pop_mm.ops.turn import hand_back
from pop_mm.samples import load

ABANDONED_EVERY = 50
READINGS = 20
PROBE_PROMPT, PROBE_TOKENS, PROBE_RUNS = 64, 24, 7
MEMORY, SPEED = 1.02, 0.95  # of the last tenth, relative to the first
OBJECTS = 0.2  # more for each prompt; a reading is one itself
COUNTED = {"tensors": "live tensors", "states": "states of prompts", "caches": "caches known"}
JUDGED_FROM = 200  # prompts; with fewer, memory and speed have not settled


@dataclass(frozen=True)
class Reading:
    """What is left after so many prompts, and how fast the fixed prompt was.

    Attributes
    ----------
    rss_mib : float or None
        Resident memory that is in use; None where the system does not say.
    objects, tensors, states : int
        Live ones of the whole process, as Python's garbage collector knows them.
    caches : int
        Entries of the session's table of caches.
    tokens_per_s, dense_tokens_per_s : tuple of float
        Of each run of the fixed prompt, and of the dense copy's run beside it.
    """

    prompts: int
    rss_mib: float | None
    objects: int
    tensors: int
    states: int
    caches: int
    tokens_per_s: tuple[float, ...]
    dense_tokens_per_s: tuple[float, ...]


def take_reading(prompts: int, model: Any, dense: Any, session: pop_mm.Session | None) -> Reading:
    """Time the fixed prompt, then count what is left."""
    speeds: list[float] = []
    dense_speeds: list[float] = []
    for number in range(PROBE_RUNS):
        runs = [(model, speeds), (dense, dense_speeds)]
        for which, found in runs if number % 2 else reversed(runs):
            found.append(probe(which))
    caches = 0
    if session is not None:
        str(session.report)
        caches = session.live_prompts
    gc.collect()
    kinds = [type(thing) for thing in gc.get_objects()]
    tensors, states = (sum(issubclass(kind, wanted) for kind in kinds) for wanted in (Tensor, PromptState))
    counted = len(kinds), tensors, states, caches
    return Reading(prompts, resident_mib(), *counted, tuple(speeds), tuple(dense_speeds))


def probe(model: Any) -> float:
    """Tokens/s of the fixed prompt, prefill included."""
    ids = torch.arange(PROBE_PROMPT).unsqueeze(0) % 61 + 3
    started = time.perf_counter()
    generate(model, ids, torch.ones_like(ids), PROBE_TOKENS)
    return PROBE_TOKENS / (time.perf_counter() - started)


def resident_mib() -> float | None:
    """Resident memory of this process now, without what glibc holds but nobody uses: that comes and goes by percents."""
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    hand_back()
    return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmRSS:")) / 1024


def soak(
    model: Any, dense: Any, session: pop_mm.Session | None, prompts: int, tick: Callable[[int], None]
) -> tuple[list[Reading], Counter[str]]:
    """All prompts; the readings, and how many prompts of each kind there were."""
    traffic = Traffic(model)
    for kind in KINDS:  # whatever is made on first use, and the most memory that one prompt can take
        traffic.send(kind, longest=True)
    traffic.sent.clear()
    readings, every = [], max(prompts // READINGS, min(prompts, 3))
    for number in range(1, prompts + 1):
        traffic.send_any(abandoned=number % ABANDONED_EVERY == 0)
        if number % every == 0:
            traffic.kept.clear()
            readings.append(take_reading(number, model, dense, session))
            tick(number)
    return readings, traffic.sent


def speedup(readings: Sequence[Reading]) -> float:
    """Median of the fixed prompt's speed relative to the dense copy's run beside it."""
    pairs = [pair for r in readings for pair in zip(r.tokens_per_s, r.dense_tokens_per_s, strict=True)]
    return statistics.median(own / dense for own, dense in pairs)


def soak_verdicts(readings: Sequence[Reading], restored: bool, judged: bool) -> list[Verdict]:
    """Memory, objects and speed are judged in a long run only, the rest always."""
    tenth = max(len(readings) // 10, 1)
    first, last = readings[:tenth], readings[-tenth:]
    found = []
    before, after = first[-1].rss_mib, last[-1].rss_mib
    if before is not None and after is not None:
        words = f"resident memory at the end: {after:.0f} MiB, {after / before:.3f} of that after the first tenth"
        found.append(Verdict(f"{words} (target {MEMORY:.2f})", after <= MEMORY * before if judged else None))
    for name, words in COUNTED.items():
        most, now = (max(getattr(r, name) for r in part) for part in (first, last))
        found.append(Verdict(f"{words} do not grow: {most} in the first tenth, {now} in the last", now <= most))
    more = (last[-1].objects - first[-1].objects) / max(last[-1].prompts - first[-1].prompts, 1)
    words = f"live objects grow by {more:.2f} for each prompt (target {OBJECTS:g})"
    found.append(Verdict(words, more <= OBJECTS if judged else None))
    fast, now = speedup(first), speedup(last)
    words = f"the fixed prompt runs at {fast:.3f} times the dense speed in the first tenth, at {now:.3f} in the last"
    found.append(Verdict(f"{words}: {now / fast:.3f} (target {SPEED:.2f})", now >= SPEED * fast if judged else None))
    return [*found, Verdict("leaving the session restores the weights bit for bit", restored)]


def soak_table(readings: Sequence[Reading], name: str, sent: Counter[str]) -> Table:
    """One row a reading."""
    kinds = ", ".join(f"{count} {kind}" for kind, count in sent.items() if count)
    table = Table(title=f"{name}, one session", caption=kinds)
    for column in ("prompts", "RSS MiB", "objects", "tensors", "states", "caches", "tokens/s", "dense tokens/s"):
        table.add_column(column, justify="right")
    for r in readings:
        memory = "-" if r.rss_mib is None else f"{r.rss_mib:.1f}"
        speeds = (f"{statistics.median(speed):.1f}" for speed in (r.tokens_per_s, r.dense_tokens_per_s))
        table.add_row(str(r.prompts), memory, *map(str, (r.objects, r.tensors, r.states, r.caches)), *speeds)
    return table


def tiny_model(moe: bool) -> Any:
    """A random model of a few MB."""
    size: dict[str, Any] = dict(
        vocab_size=512, hidden_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    special: dict[str, Any] = dict(max_position_embeddings=2048, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    torch.manual_seed(0)
    if moe:
        config = MixtralConfig(**size, **special, intermediate_size=192, num_local_experts=4, num_experts_per_tok=2)
        return MixtralForCausalLM(config).eval()
    return LlamaForCausalLM(LlamaConfig(**size, **special, intermediate_size=512)).eval()


def digests(model: Any) -> dict[str, str]:
    """Of every parameter and buffer."""
    return {
        name: hashlib.sha256(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy()).hexdigest()
        for name, tensor in (*model.named_parameters(), *model.named_buffers())
    }


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--model", help="sample name, folder or hub id (a random Llama of a few MB)")
    which.add_argument("--moe", action="store_true", help="a random Mixtral of a few MB")
    parser.add_argument("--prompts", type=int, help="2000")
    parser.add_argument("--ratio", type=float, default=0.4)
    parser.add_argument("--batch", choices=("shared", "per_sequence"), default="shared")
    parser.add_argument("--dense", action="store_true", help="without a session")
    parser.add_argument("--threads", type=int, default=available_cores())
    parser.add_argument("--quick", action="store_true", help="12 prompts: does it run?")
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the soak; the exit code."""
    args = parse(argv)
    torch.set_num_threads(args.threads)
    transformers_logging.set_verbosity_error()
    console, machine = wide_console(), machine_facts()
    print_machine(console, machine)
    prompts = args.prompts or (12 if args.quick else 2000)
    model = load(args.model)[0] if args.model else tiny_model(args.moe)
    name = args.model or ("tiny Mixtral" if args.moe else "tiny Llama")
    before, dense = digests(model), copy.deepcopy(model)
    session = None if args.dense else pop_mm.prune(model, ratio=args.ratio, batch=args.batch)
    with Progress(console=Console(file=sys.stderr), transient=True, refresh_per_second=1) as progress:
        task = progress.add_task(name, total=prompts)
        with session or contextlib.nullcontext():
            readings, sent = soak(model, dense, session, prompts, lambda done: progress.update(task, completed=done))
    console.print(soak_table(readings, name, sent))
    verdicts = soak_verdicts(readings, digests(model) == before, prompts >= JUDGED_FROM)
    settings = {"model": name, "prompts": prompts, "ratio": args.ratio, "batch": args.batch, "dense": args.dense}
    result = {
        "machine": machine,
        "settings": settings,
        "sent": sent,
        "readings": [asdict(reading) for reading in readings],
        "verdicts": [verdict.to_dict() for verdict in verdicts],
    }
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    return print_verdicts(console, verdicts)


if __name__ == "__main__":
    sys.exit(main())
