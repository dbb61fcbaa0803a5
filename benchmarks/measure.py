"""What the benchmarks share: facts of the machine, alternating timings, verdicts."""

from __future__ import annotations

import json
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from pop_mm.bench.machine import available_cores as available_cores
from pop_mm.bench.machine import last_level_cache as last_level_cache
from pop_mm.bench.machine import machine_facts as machine_facts
from pop_mm.bench.machine import machine_line
from pop_mm.bench.timing import quartiles as quartiles

QUIET_READ = 0.8  # a round counts only if plain reads ran at this share of the median read of all rounds


@dataclass(frozen=True)
class Verdict:
    """One target.

    Attributes
    ----------
    target : str
        What must hold, with the figure that was found.
    passed : bool or None
        None where the settings are not those that the target is about.
    """

    target: str
    passed: bool | None

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def wide_console() -> Console:
    """A console on stdout; wide enough for the tables where it is no terminal."""
    console = Console()
    return console if console.is_terminal else Console(width=170)


def save_json(file: Path | None, result: Any) -> None:
    """Write results as JSON, from which an interrupted run goes on; nothing without a file."""
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(result, indent=2) + "\n")


def load_json(file: Path | None) -> Any:
    """What :func:`save_json` has written, or None."""
    return json.loads(file.read_text()) if file is not None and file.exists() else None


def print_verdicts(console: Console, verdicts: Sequence[Verdict]) -> int:
    """Print one line a target; the exit code, 1 if one failed."""
    words = {True: "[green]PASS[/]", False: "[red]FAIL[/]", None: "[yellow]not judged[/]"}
    for verdict in verdicts:
        console.print(f"{words[verdict.passed]}  {verdict.target}", highlight=False, soft_wrap=True)
    return int(any(verdict.passed is False for verdict in verdicts))


def print_machine(console: Console, facts: Mapping[str, Any]) -> None:
    """One line about the machine, and a warning if something else runs on it."""
    console.print(machine_line(facts), highlight=False, soft_wrap=True)
    if facts["load_average"] is not None and facts["load_average"] > 0.5:
        console.print("[yellow]Other processes are running: timings below are noisy.[/]")


class Evictor:
    """Reads an unrelated buffer: drives what was used before out of the caches, and shows how quiet the machine is.

    Parameters
    ----------
    size : int
        Bytes.
    """

    def __init__(self, size: int) -> None:
        self._buffer = torch.ones(max(size // 4, 1))

    def __call__(self) -> float:
        """Read the buffer once; GB/s."""
        started = time.perf_counter()
        self._buffer.sum()
        return self._buffer.numel() * 4 / (time.perf_counter() - started) / 1e9


@dataclass(frozen=True)
class Rounds:
    """Seconds of every variant, round by round.

    Attributes
    ----------
    seconds : dict of str to list of float
        Of the rounds that count.
    discarded : int
        Rounds left out because plain reads were slow in them, whatever the variants' times were.
    read_gb_s : float
        Median speed of a plain read.
    """

    seconds: dict[str, list[float]]
    discarded: int
    read_gb_s: float

    def median(self, variant: str) -> float:
        """Median seconds."""
        return statistics.median(self.seconds[variant])

    def speedup(self, variant: str, over: str) -> float:
        """Median of in-round ratios: how much faster ``variant`` is than ``over``."""
        return statistics.median(self.ratios(variant, over))

    def ratios(self, variant: str, over: str) -> list[float]:
        """In-round ratios."""
        return [o / v for o, v in zip(self.seconds[over], self.seconds[variant], strict=True)]


def alternate(
    variants: Mapping[str, Callable[[], float]],
    rounds: int,
    evict: Evictor,
    seed: int = 0,
    before_round: Callable[[], None] = lambda: None,
) -> Rounds:
    """Run all variants in every round, in random order, each after an eviction; one round to warm up comes first.

    Parameters
    ----------
    variants : mapping of str to callable
        Each runs once and returns its seconds.
    before_round : callable
        Called before each round, for inputs that change.
    """
    order = random.Random(seed)
    seconds: list[dict[str, float]] = []
    reads: list[list[float]] = []
    for number in range(rounds + 1):
        before_round()
        found, read = {}, []
        for name in order.sample(list(variants), len(variants)):
            read.append(evict())
            found[name] = variants[name]()
        if number:
            seconds.append(found)
            reads.append(read)
    typical = statistics.median(speed for read in reads for speed in read)
    quiet = [found for found, read in zip(seconds, reads, strict=True) if min(read) >= QUIET_READ * typical]
    if len(quiet) < max(3, rounds // 3):
        quiet = seconds  # no quiet phase: the caller sees it in the spread
    return Rounds({name: [s[name] for s in quiet] for name in variants}, rounds - len(quiet), typical)
