"""``pop-mm bench``: decode speed and memory, dense and pruned in turn, beside what the model allows."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..bench import Setup, Source, check, measure, show, steps
from ..bench.configs import CONFIGS, config_of
from ..bench.machine import machine_facts, machine_line
from ..bench.memory import Job, measure_memory
from ..bench.variants import kernels_for
from ..samples.quantise import check_weights
from . import loudness
from .generate import check_outputs, find_device, torch_dtype
from .inspect import skeleton
from .settings import Grid
from .terminal import CommandError, quiet, save_then, spinner, write_json

_REPEATS = 3  # processes for each peak


def run(
    source: Source,
    setup: Setup,
    kernels: list[str],
    memory: bool,
    device: str,
    json_file: str | None,
    plot: str | None,
    wide: bool = True,
) -> None:
    """The command; all of it is checked before the model is loaded or built."""
    check_outputs(json_file, plot)
    where = find_device(device)
    torch_dtype(source.dtype)
    if memory and where.type != "cpu":
        raise CommandError(
            "--memory starts processes on the CPU; on a GPU peak memory is measured anyway. Leave it out."
        )
    console = Console(stderr=json_file == "-")
    with quiet():
        model = source.skeleton() if source.config else skeleton(source.name, source.dtype)[0]
        setup = replace(setup, kernels=kernels_for(where, model.dtype, kernels))
        check(model, setup)
        del model
        peaks: dict[Job, float | None] | None = None
        if memory:  # first, while this process is small
            with _bar("memory", _REPEATS * len(setup.jobs())) as tick:
                found = measure_memory(source, setup, setup.jobs(), _REPEATS, tick)
            peaks = {job: peak["after_load"] or peak["whole"] for job, peak in found.items()}
        with spinner(f"Building {source.label}" if source.config else f"Loading {source.name}"):
            model, tokenizer = source.load(where, setup.seed)
        with _bar("rounds", steps(setup)) as tick:
            results = measure(model, tokenizer, setup, tick, peaks)
    results = {"model": source.label, "weight_format": source.weights, "layers": source.layers, **results}
    results["notes"] = [*source.notes, *results["notes"]]
    saves: list[Callable[[], object]] = []
    if json_file is not None:
        saves.append(lambda: write_json(results, json_file))
    if plot is not None:
        saves.append(lambda: show.plot(results, plot))

    def print_all() -> None:
        console.print(machine_line(machine_facts()), highlight=False, markup=False, soft_wrap=wide, style="dim")
        show.print_tables(console, results, wide)

    save_then(saves, print_all)
    if plot is not None:
        console.print(f"Picture: {Path(plot).expanduser()}", highlight=False, markup=False, soft_wrap=True)


def source_of(
    model: str | None, config: str | None, random_weights: bool, layers: int | None, dtype: str, weights: str = "auto"
) -> Source:
    """What the options name.

    Raises
    ------
    CommandError
        They do not name exactly one model.
    BenchError
        Unknown config, or too many layers.
    """
    check_weights(weights)
    if (model is None) == (config is None):
        raise CommandError(f"Give --model, or --config with one of {', '.join(CONFIGS)}; not both, not neither.")
    if config is None:
        if random_weights or layers is not None:
            raise CommandError("--random-weights and --layers go with --config; a --model is loaded as it is.")
        assert model is not None
        return Source(model, dtype=dtype, weights=weights)
    config_of(config, layers)
    if not random_weights:
        raise CommandError(
            f"--config {config} names dimensions without weights. Add --random-weights (speed does not depend on the values), or "
            "name a checkpoint with --model."
        )
    return Source(config, True, layers, dtype, weights)


def pruning(grid: Grid) -> dict[str, Any]:
    """Arguments of :class:`~pop_mm.bench.Setup` about what is pruned.

    Raises
    ------
    CommandError
        A settings file names kernels.
    """
    settings = dict(grid.settings)
    if (kernels := settings.pop("kernels", None)) is not None:
        raise CommandError(
            f"The settings file has kernels={kernels!r}; bench compares kernels: give --kernels instead."
        )
    return {
        "budgets": grid.budgets,
        "ratios": grid.ratios,
        "methods": grid.methods or [*(["thresholds"] if grid.budgets else []), *(["pop"] if grid.ratios else [])],
        "gamma": settings.pop("gamma", 0.1),
        "batch_mode": settings.pop("batch", "shared"),
        "settings": settings,
    }


@contextmanager
def _bar(what: str, total: int) -> Iterator[Callable[[], object]]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(file=sys.stderr)
    hidden = loudness.silent() or not console.is_terminal
    with Progress(*columns, console=console, transient=True, refresh_per_second=1, disable=hidden) as progress:
        task = progress.add_task(what, total=total)
        yield lambda: progress.advance(task)
