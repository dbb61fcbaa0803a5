"""``pop-mm tune``: the budget for a quality or a speed, and the settings file for it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ..evaluation import texts
from ..samples.quantise import check_weights, quantised_copy
from ..tuning import TuneResult, tune
from ..tuning.run import check_target
from .generate import check_context, find_device, load_model
from .terminal import check_writable, quiet, write_json

_SHORT_NOTE = "Bytes: of the layers' weights, for a token. --wide has intervals, the same top token and the speed-up."


def run(
    name: str,
    max_kl: float | None,
    min_speedup: float | None,
    files: Sequence[str],
    prompt: int,
    continuation: int,
    limit: int,
    new_tokens: int,
    rounds: int,
    save: str | None,
    dtype: str,
    device: str,
    json_file: str | None,
    weights: str = "auto",
    wide: bool = False,
) -> bool:
    """The command; false, and nothing but the curve is written, if the target cannot be met. All is checked before the work."""
    check_target(max_kl, min_speedup, new_tokens, rounds)
    for path in (save, json_file):
        if path not in (None, "-"):
            check_writable(path)
    check_weights(weights)
    where, named = find_device(device), texts.read_files(files)
    console = Console(stderr=json_file == "-")
    with quiet():
        model, tokenizer = load_model(name, dtype, where)
        reference = None if weights == "auto" else model
        model = quantised_copy(model, weights)
        tokens = max(prompt + continuation, prompt + new_tokens)
        check_context(
            model, tokens, f"--prompt and --continuation or --new-tokens ask for {tokens} tokens", "for fewer"
        )
        columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
        bars = Console(file=sys.stderr)
        with Progress(
            TextColumn("tuning"), *columns, console=bars, transient=True, disable=not bars.is_terminal
        ) as progress:
            task = progress.add_task("tuning", total=None)
            found = tune(
                model,
                tokenizer,
                max_kl=max_kl,
                min_speedup=min_speedup,
                text=named or None,
                prompt=prompt,
                continuation=continuation,
                limit=limit,
                new_tokens=new_tokens,
                rounds=rounds,
                reference=reference,
                progress=lambda done, total: progress.update(task, completed=done, total=total),
            )
    written = None if save is None or not found.met else found.save(save)
    if json_file is not None:
        write_json({**found.to_dict(), "weight_format": weights}, json_file)
    _show(console, found, written, wide)
    return found.met


def _show(console: Console, found: TuneResult, written: Path | None, wide: bool) -> None:
    table = found.table if wide else found.short_table
    if wide and not console.is_terminal:
        console.width = max(console.width, 120)
    console.print(table)
    for note in (*(() if wide else (_SHORT_NOTE,)), *found.notes):
        console.print(note, style="dim", highlight=False, markup=False, soft_wrap=wide)
    if found.chosen is None or found.config is None:
        Console(stderr=True).print(f"Error: {found.unmet}", highlight=False, markup=False, soft_wrap=True)
        return
    point = found.chosen
    options = f"--budget {point.budget:g}" + ("" if point.scope == "overall" else f" --scope {point.scope}")
    speed = (
        ""
        if point.tokens_per_s is None
        else (f"; {point.tokens_per_s:.1f} tokens/s, dense {point.dense_tokens_per_s:.1f}")
    )
    file = "" if written is None else f" Written to {written}: pop-mm generate --settings {written} ..."
    console.print(f"Chosen: {options}{speed}.{file}", highlight=False, markup=False, soft_wrap=True)


__all__ = ["run"]
