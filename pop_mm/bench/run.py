"""A benchmark run: in every cell, dense and pruned variants take turns in one process, round by round."""

from __future__ import annotations

import gc
import random
import statistics
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from typing import Any

from ..adapters import adapter_for
from ..inputs import Context, context_of
from ..session.plans import plans_of
from ..weights.experts import Experts
from .errors import BenchError
from .limits import amdahl_limit, backends_of, step_bytes
from .machine import machine_facts
from .memory import Job
from .parts import STEP_PARTS, Parts, measure_parts
from .prompts import Prompts
from .timing import Run, decode_options, generate, generate_timed, quartiles
from .variants import MOST_ROWS, STOCK_DENSE, Cell, Setup, Variant, running

_PART_TOKENS = 32  # of the runs that are looked at part by part
Runs = Mapping[Variant, list[Run]]
PartRuns = Mapping[Variant, list[tuple[Parts, Parts | None]]]


def check(model: Any, setup: Setup) -> None:
    """Raise if a setup does not fit a model; its weights are not needed.

    Raises
    ------
    BenchError
        A prompt and its new tokens are more than the model's table of positions has.
    AdapterError, ConfigError
        The model cannot be pruned, or not by such a ratio.
    """
    context = context_of(model)
    if context is not None and context.fixed and (beyond := _beyond_context(context, setup)):
        raise BenchError(f"{beyond}, and it has no positions beyond. Take shorter prompts or fewer new tokens.")
    for _, variant in setup.jobs():
        plans_of(model, setup.config(variant))


def _beyond_context(context: Context, setup: Setup) -> str | None:
    """The beginning of a sentence about prompts and new tokens that are more than the context; None if they are not."""
    longest = max(setup.prompts)
    if (tokens := longest + setup.new_tokens) <= context.tokens:
        return None
    return (
        f"Prompts of {longest} tokens and {setup.new_tokens} new ones are {tokens}, but the model's context is {context.tokens} "
        "tokens"
    )


def steps(setup: Setup) -> int:
    """How often :func:`measure` calls ``tick``."""
    return len(setup.cells()) * (setup.rounds + 1)


def measure(
    model: Any,
    tokenizer: Any,
    setup: Setup,
    tick: Callable[[], object] = lambda: None,
    peaks: Mapping[Job, float | None] | None = None,
) -> dict[str, Any]:
    """Measure every cell.

    Parameters
    ----------
    model : PreTrainedModel
        In eval mode; it is left bit for bit as it was.
    tokenizer : PreTrainedTokenizerBase or None
        Without one, the prompts are random ids.
    tick : callable
        Called after each round.
    peaks : mapping of Job to float
        Peak memory that was measured before, in bytes.

    Returns
    -------
    dict
        ``{"setup": ..., "machine": ..., "rows": [...], "notes": [...]}``.
    """
    check(model, setup)
    machine = machine_facts()
    prompts = Prompts(model, tokenizer, setup.seed)
    rows = []
    for cell in setup.cells():
        runs, parts = _rounds(model, prompts, setup, cell, tick)
        for variant in setup.variants(cell):
            memory = None if peaks is None else peaks.get((cell, variant))
            rows.append(_row(model, setup, cell, variant, runs, parts, memory))
    facts = {"dtype": str(model.dtype).removeprefix("torch."), "device": str(model.device)}
    return {
        "setup": {**asdict(setup), **facts, "parameters": model.num_parameters()},
        "machine": {**machine, "load_average_at_end": machine_facts()["load_average"]},
        "rows": rows,
        "notes": _notes(model, tokenizer, setup),
    }


def _rounds(
    model: Any, prompts: Prompts, setup: Setup, cell: Cell, tick: Callable[[], object]
) -> tuple[Runs, PartRuns]:
    """All variants in every round, in random order; one round to warm up comes first. A round has a prompt of its own."""
    order = random.Random(setup.seed)
    variants = setup.variants(cell)
    records = adapter_for(model).projections(model)
    options, uncompiled = decode_options(cell.cache, setup.compile), decode_options(cell.cache, False)
    runs: dict[Variant, list[Run]] = {variant: [] for variant in variants}
    parts: dict[Variant, list[tuple[Parts, Parts | None]]] = {variant: [] for variant in variants}
    for number in range(setup.rounds + 1):
        ids, following = (prompts.ids(n, cell.batch, cell.prompt) for n in (number, number + 1))
        for variant in order.sample(variants, len(variants)):
            gc.collect()
            with running(model, setup, variant):
                if setup.compile or variant.method == "thresholds":  # compiling and turning weights are not decoding
                    generate(model, following, setup.new_tokens if setup.compile else 2, **options)
                run = generate_timed(model, ids, setup.new_tokens, **options)
            if number:
                runs[variant].append(run)
        for variant in order.sample(variants, len(variants)) if number else ():
            with running(model, setup, variant) as attached:
                session = None if variant.method == "dense" else attached
                look = partial(measure_parts, model, records, session, new_tokens=min(setup.new_tokens, _PART_TOKENS))
                first = look(ids, **uncompiled)
                then = None if session is None else look(following, **uncompiled)
            parts[variant].append((first, then))
        tick()
    return runs, parts


def _row(
    model: Any, setup: Setup, cell: Cell, variant: Variant, runs: Runs, parts: PartRuns, memory: float | None
) -> dict[str, Any]:
    """One variant of a cell."""

    def median(name: str) -> float:
        return statistics.median(getattr(run, name) for run in runs[variant])

    def ratios(name: str, over: Variant) -> list[float]:
        return [getattr(o, name) / getattr(v, name) for o, v in zip(runs[over], runs[variant], strict=True)]

    context = cell.prompt + setup.new_tokens / 2
    config, same_dense = setup.config(variant), setup.dense_of(variant, cell)
    dense = step_bytes(model, setup.config(STOCK_DENSE), cell.batch, context)
    mine = step_bytes(model, config, cell.batch, context)
    left = mine.ffn / dense.ffn, mine.projections / dense.projections if dense.projections else 1.0
    limit = statistics.median(
        amdahl_limit(first.ffn_share, left[0], first.projections_share, left[1]) for first, _ in parts[same_dense]
    )
    speedups, same = ratios("decode", STOCK_DENSE), ratios("decode", same_dense)
    allocated = [run.peak_bytes for run in runs[variant] if run.peak_bytes is not None]
    peak = max(allocated) if allocated else memory
    backends = backends_of(model, config, cell.batch)
    return {
        "method": variant.method,
        "ratio": variant.ratio,
        "budget": variant.budget,
        "gamma": setup.gamma if variant.method == "pop" else None,
        **cell._asdict(),
        "new_tokens": setup.new_tokens,
        "kernels": "stock" if variant.kernels == "rows" and "rows" not in backends else variant.kernels,
        "compile": setup.compile,
        "backends": backends,
        "prefill_s": median("prefill"),
        "ttft_s": median("ttft"),
        "decode_tokens_per_s": cell.batch * (setup.new_tokens - 1) / median("decode"),
        "step_s": median("step"),
        "end_to_end_s": median("end_to_end"),
        "speedup": statistics.median(speedups),
        "speedup_quartiles": quartiles(speedups),
        "speedup_same_kernels": statistics.median(same),
        "speedup_same_kernels_quartiles": quartiles(same),
        "step_speedup": statistics.median(ratios("step", STOCK_DENSE)),
        "ttft_speedup": statistics.median(ratios("ttft", STOCK_DENSE)),
        "end_to_end_speedup": statistics.median(ratios("end_to_end", STOCK_DENSE)),
        "byte_limit": dense.total / mine.total,
        "bytes_per_token": {name: count / cell.batch for name, count in mine.parts.items()},
        "amdahl_limit": limit,
        "fraction_of_limit": statistics.median(same) / limit,
        "peak_memory_bytes": peak,
        **_by_part(parts[variant]),
    }


def _by_part(runs: list[tuple[Parts, Parts | None]]) -> dict[str, Any]:
    """Medians over rounds."""
    first = [parts for parts, _ in runs]
    then = [parts for _, parts in runs if parts is not None]

    def medians(found: list[dict[str, float]]) -> dict[str, float]:
        return {name: statistics.median(parts[name] for parts in found) for name in found[0]}

    return {
        "step_parts_s": medians([parts.step for parts in first]),
        "selection_share": statistics.median(parts.selection_share for parts in first) if then else None,
        "prompt_parts_s": {
            "first": medians([parts.prompt for parts in first]),
            "next": medians([parts.prompt for parts in then]) if then else None,
        },
        "prompt_overhead": {
            "first": statistics.median(parts.prompt_overhead for parts in first) if then else None,
            "next": statistics.median(parts.prompt_overhead for parts in then) if then else None,
        },
    }


def _notes(model: Any, tokenizer: Any, setup: Setup) -> list[str]:
    """What must be known to read the figures."""
    notes = []
    context = context_of(model)
    if context is not None and (beyond := _beyond_context(context, setup)):
        notes.append(f"{beyond}: the speeds are right, but its answers get worse beyond them.")
    if tokenizer is None:
        notes.append(
            "The prompts are random token ids, which no domain has in common: each prompt reorders as much as there can be."
        )
    if any(isinstance(record, Experts) for record in adapter_for(model).projections(model)):
        notes.append(
            "Byte limits count top-k experts for each row, at most all there are: how many different ones a batch needs is not "
            "known beforehand."
        )
    if any(set(setup.kernels) - {variant.kernels for variant in setup.variants(cell)} for cell in setup.cells()):
        notes.append(
            "The compiled kernels take at most {compiled} rows and Triton's at most {triton}: larger batches go "
            "without.".format_map(MOST_ROWS)
        )
    if setup.compile:
        notes.append("Parts, and with them Amdahl's limit, are those of a step that is not compiled by torch.compile.")
    return notes


__all__ = ["STEP_PARTS", "check", "measure", "steps"]
