"""Peak resident size of a variant that generates once, each time in a fresh process.

Two peaks are taken. ``whole`` is ``ru_maxrss`` of the whole process. Loading a model can need more than running it,
which would hide what a session adds; so ``after_load`` is the peak from the end of loading on (Linux can reset its
counter), prefill, session, moves and restoring included. What loading has freed and glibc keeps is handed back before: with
converted weights it is nothing or hundreds of megabytes, by chance.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ..ops.turn import hand_back
from .errors import BenchError
from .source import Source
from .variants import Cell, Setup, Variant

Job = tuple[Cell, Variant]


def measure_memory(
    source: Source, setup: Setup, jobs: Sequence[Job], repeats: int = 3, tick: Callable[[], object] = lambda: None
) -> dict[Job, dict[str, float | None]]:
    """Peaks of every job on the CPU, in bytes: ``whole`` and ``after_load`` (None where it is not known).

    Medians of ``repeats`` processes; ``tick`` is called after each.

    Raises
    ------
    BenchError
        A process failed.
    """
    runs: dict[Job, list[dict[str, int | None]]] = {job: [] for job in jobs}
    for _ in range(repeats):
        for job in jobs:
            cell, variant = job
            task = {"source": asdict(source), "setup": asdict(setup), "cell": cell, "variant": variant}
            text = json.dumps({**task, "threads": torch.get_num_threads()})
            command = [sys.executable, "-W", "ignore", "-m", __name__, text]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                last = (done.stderr.strip() or "no message").splitlines()[-1]
                raise BenchError(f"The process that measures the memory of {variant} failed: {last}")
            runs[job].append(json.loads(done.stdout.splitlines()[-1]))
            tick()
    return {job: {peak: _median([run[peak] for run in found]) for peak in found[0]} for job, found in runs.items()}


def _median(values: Sequence[int | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if len(known) == len(values) else None


def _child(task: dict[str, Any]) -> dict[str, int | None]:
    """Load, generate, and say how much memory that took at most; bytes."""
    from .prompts import Prompts
    from .timing import decode_options, generate
    from .variants import running

    torch.set_num_threads(task["threads"])
    setup, cell, variant = Setup(**task["setup"]), Cell(*task["cell"]), Variant(*task["variant"])
    model, tokenizer = Source(**task["source"]).load(torch.device("cpu"), setup.seed)
    ids = Prompts(model, tokenizer, setup.seed).ids(0, cell.batch, cell.prompt)
    hand_back()
    can_reset = _reset_peak()
    with running(model, setup, variant):
        generate(model, ids, setup.new_tokens, **decode_options(cell.cache, setup.compile))
    unit = 1 if sys.platform == "darwin" else 1024
    whole = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return {"whole": whole, "after_load": _peak() if can_reset else None}


def _reset_peak() -> bool:
    """Set the process's peak resident size to its present size, where the system can."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _peak() -> int:
    """Peak resident size since the last reset, bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


if __name__ == "__main__":
    print(json.dumps(_child(json.loads(sys.argv[1]))))

__all__ = ["Job", "measure_memory"]
