"""Memory: peak resident size of dense generation and of the in-place session doing the same, each in a fresh process.

Two peaks are taken. ``whole`` is ``ru_maxrss`` of the whole process. Loading a model can need more than running it,
which would hide what the session adds; so ``after_load`` is the peak from the end of loading on (Linux can reset its
counter), prefill, session, moves and restoring included.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.table import Table

from measure import Verdict

RATIO = 0.4
TARGET = 1.03
MODES = ("dense", "inplace")


def child(mode: str, model_name: str, prompt: int, new_tokens: int, threads: int) -> dict[str, int | None]:
    """Load, generate, and say how much memory that took at most; bytes."""
    import torch

    import pop_mm
    from pop_mm.passages import load_passages
    from pop_mm.samples import load

    torch.set_num_threads(threads)
    model, tokenizer = load(model_name)
    ids = tokenizer(next(iter(load_passages().values())), return_tensors="pt").input_ids[:, :prompt]
    can_reset = _reset_peak()
    session = (
        pop_mm.prune(model, ratio=RATIO, backend="inplace", kernels="stock")
        if mode == "inplace"
        else contextlib.nullcontext()
    )
    with session:
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            min_new_tokens=new_tokens,
            max_new_tokens=new_tokens,
        )
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


def measure_memory(
    model: str, prompt: int, new_tokens: int, repeats: int, threads: int, tick: Callable[[], None]
) -> dict[str, Any]:
    """Medians of ``repeats`` processes for each mode, in turn, and the ratios in-place : dense."""
    runs: dict[str, list[dict[str, int | None]]] = {mode: [] for mode in MODES}
    for _ in range(repeats):
        for mode in MODES:
            numbers = map(str, (prompt, new_tokens, threads))
            command = [sys.executable, "-W", "ignore", __file__, mode, model, *numbers]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(f"The {mode} process failed:\n{done.stderr}")
            runs[mode].append(json.loads(done.stdout.splitlines()[-1]))
            tick()
    result: dict[str, Any] = {"repeats": repeats}
    for peak in ("whole", "after_load"):
        if any(run[peak] is None for found in runs.values() for run in found):
            continue
        dense, inplace = (statistics.median(run[peak] for run in runs[mode]) for mode in MODES)
        result[peak] = {"dense_bytes": dense, "inplace_bytes": inplace, "ratio": inplace / dense}
    return result


def memory_steps(repeats: int) -> int:
    """How often :func:`measure_memory` calls ``tick``."""
    return repeats * len(MODES)


def memory_table(result: dict[str, Any], name: str) -> Table:
    """One row for each peak."""
    table = Table(title=f"{name}, peak resident size, {RATIO:.0%} overall, median of {result['repeats']} processes")
    for column in ("peak", "dense MiB", "in-place MiB", "ratio"):
        table.add_column(column, justify="right")
    for peak, words in (("whole", "whole process"), ("after_load", "after loading")):
        if peak in result:
            row = result[peak]
            sizes = (f"{row[key] / 2**20:.0f}" for key in ("dense_bytes", "inplace_bytes"))
            table.add_row(words, *sizes, f"{row['ratio']:.3f}")
    return table


def memory_verdicts(result: dict[str, Any], judged: bool) -> list[Verdict]:
    """Both peaks."""
    return [
        Verdict(
            f"peak resident size, {words}: in-place {result[peak]['ratio']:.3f} of dense (target {TARGET:.2f})",
            result[peak]["ratio"] <= TARGET if judged else None,
        )
        for peak, words in (("whole", "whole process"), ("after_load", "after loading"))
        if peak in result
    ]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="One process of the memory benchmark; decode_speed.py starts it.")
    parser.add_argument("mode", choices=MODES)
    parser.add_argument("model")
    for number in ("prompt", "new_tokens", "threads"):
        parser.add_argument(number, type=int)
    arguments = parser.parse_args()
    print(json.dumps(child(arguments.mode, arguments.model, arguments.prompt, arguments.new_tokens, arguments.threads)))
