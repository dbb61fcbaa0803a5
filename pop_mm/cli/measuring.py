"""Commands that measure quality and speed, and find settings for them.

Heavy modules are imported inside the commands, so that ``pop-mm --help`` is fast.
"""

from __future__ import annotations

from typing import Annotated

import typer

from .options import (
    BATCHES,
    CACHES,
    GAMMAS,
    OF_BUDGETS,
    OF_RATIOS,
    PREFILLS,
    PROMPTS,
    Budgets,
    Counts,
    Device,
    Dtype,
    Gamma,
    Gammas,
    JsonFile,
    Methods,
    Model,
    Plot,
    Prefills,
    Ratios,
    Scope,
    Settings,
    Weights,
    Wide,
    counted,
    seeded,
)


def evaluate(
    context: typer.Context,
    model: Model = "smollm2-135m",
    method: Methods = None,
    ratio: Ratios = None,
    budget: Budgets = None,
    gamma: Gammas = GAMMAS,
    prefill: Prefills = PREFILLS,
    scope: Scope = "overall",
    settings: Settings = None,
    text: Annotated[
        list[str] | None, typer.Option(metavar="FILE", help="Text to score; else prose that ships.")
    ] = None,
    dataset: Annotated[
        str | None, typer.Option(metavar="NAME", help="Of `datasets`, or a .jsonl, .csv or .parquet.")
    ] = None,
    subset: Annotated[str | None, typer.Option(metavar="NAME", help="The data set's configuration.")] = None,
    split: Annotated[str, typer.Option(metavar="NAME", help="The data set's split.")] = "test",
    column: Annotated[str, typer.Option(metavar="NAME", help="The data set's column of text.")] = "text",
    limit: Annotated[
        int | None, typer.Option(callback=counted(1), metavar="N", help="Most pieces of text to score.")
    ] = None,
    calibration: Annotated[list[str] | None, typer.Option(metavar="FILE", help="Calibration text of wanda_sp.")] = None,
    prompt: Annotated[int, typer.Option(callback=counted(1), metavar="N", help="Prompt tokens of each piece.")] = 256,
    continuation: Annotated[int, typer.Option(callback=counted(1), metavar="N", help="Decode steps scored.")] = 128,
    generate_tokens: Annotated[
        int,
        typer.Option("--generate", callback=counted(0), metavar="N", help="Greedy tokens that are compared; 0: none."),
    ] = 16,
    batch: Annotated[str, typer.Option(metavar="per_sequence|shared", help="shared: a batch has one partition.")] = (
        "per_sequence"
    ),
    batch_size: Annotated[int, typer.Option(callback=counted(1), metavar="N", help="Pieces of text at once.")] = 4,
    seed: Annotated[int, typer.Option(callback=seeded, metavar="N", help="Of random and the bootstrap.")] = 0,
    output: Annotated[
        str | None, typer.Option(metavar="DIR", help="Keep results here; an interrupted run goes on from it.")
    ] = None,
    dtype: Dtype = "auto",
    weights: Weights = "auto",
    device: Device = "auto",
    json_file: JsonFile = None,
    wide: Wide = False,
) -> None:
    """Measure what pruning costs in quality: KL to the dense model, agreement and perplexity, beside the real cost."""
    from ..evaluation.run import Setup
    from .evaluate import Source, run
    from .settings import grid_of

    grid = grid_of(context, settings, scope="scope", batch="batch", gamma="gamma", prefill="prefill")
    others = {"scope": scope, "batch": batch, "gamma": gamma, "prefill": prefill, **grid.settings}
    scope, batch = others.pop("scope"), others.pop("batch")
    gammas, prefills = (
        found if isinstance(found := others.pop(name), list) else [found] for name in ("gamma", "prefill")
    )
    setup = Setup(model, prompt, continuation, generate_tokens, scope, batch, batch_size, seed, others, weights)
    source = Source(text or (), dataset, subset, split, column, limit, calibration or ())
    methods = grid.methods or (OF_BUDGETS if grid.budgets else OF_RATIOS)
    run(setup, methods, grid.ratios, gammas, prefills, source, output, dtype, device, json_file, grid.budgets, wide)


def bench(
    context: typer.Context,
    model: Annotated[str | None, typer.Option(metavar="NAME", help="A sample's name, a folder, or a hub id.")] = None,
    config: Annotated[
        str | None, typer.Option(metavar="NAME", help="Published dimensions instead: llama3.2-1b, mixtral-8x7b, ...")
    ] = None,
    random_weights: Annotated[bool, typer.Option("--random-weights", help="Of --config; built on the device.")] = False,
    layers: Annotated[
        int | None, typer.Option(callback=counted(1), metavar="N", help="Of --config: build fewer layers.")
    ] = None,
    batch: Counts = BATCHES,
    prompt: Counts = PROMPTS,
    new_tokens: Annotated[int, typer.Option(callback=counted(4), metavar="N", help="Decoded tokens, exactly.")] = 128,
    budget: Budgets = None,
    ratio: Ratios = None,
    method: Annotated[
        list[str] | None,
        typer.Option(
            metavar="thresholds|pop|static",
            help="Repeat it for more; default: thresholds with budgets, pop with ratios.",
            show_default=False,
        ),
    ] = None,
    scope: Scope = "overall",
    gamma: Gamma = 0.1,
    batch_mode: Annotated[
        str, typer.Option(metavar="shared|per_sequence", help="per_sequence: one partition a row.")
    ] = ("shared"),
    settings: Settings = None,
    kernels: Annotated[
        list[str] | None,
        typer.Option(
            metavar="stock|compiled|triton", help="Repeat it; default: stock, and compiled if there is a compiler."
        ),
    ] = None,
    cache: Annotated[list[str], typer.Option(metavar="dynamic|static", help="Repeat it for both.")] = CACHES,
    compiled: Annotated[
        bool, typer.Option("--compile", help="torch.compile, dense and pruned; needs --cache static.")
    ] = False,
    rounds: Annotated[
        int, typer.Option(callback=counted(1), metavar="N", help="Rounds that count, after one to warm up.")
    ] = 7,
    memory: Annotated[
        bool, typer.Option("--memory", help="Peak memory on a CPU too, each in a fresh process.")
    ] = False,
    seed: Annotated[
        int, typer.Option(callback=seeded, metavar="N", help="Of the order, prompts and random weights.")
    ] = 0,
    dtype: Dtype = "auto",
    weights: Weights = "auto",
    device: Device = "auto",
    json_file: JsonFile = None,
    plot: Plot = None,
    wide: Wide = False,
) -> None:
    """Measure speed and memory, dense and pruned in turn, beside the byte limit and Amdahl's."""
    from ..bench import Setup
    from .bench import pruning, run, source_of
    from .settings import grid_of

    source = source_of(model, config, random_weights, layers, dtype, weights)
    pruned = pruning(grid_of(context, settings, scope="scope", gamma="gamma", batch_mode="batch"))
    setup = Setup(
        batches=batch,
        prompts=prompt,
        new_tokens=new_tokens,
        kernels=kernels or ["stock"],
        caches=cache,
        compile=compiled,
        rounds=rounds,
        seed=seed,
        **pruned,
    )
    run(source, setup, kernels or [], memory, device, json_file, plot, wide)


def tune(
    model: Model,
    max_kl: Annotated[
        float | None,
        typer.Option("--max-kl", metavar="NATS", help="Find the smallest budget that keeps this KL to dense."),
    ] = None,
    min_speedup: Annotated[
        float | None,
        typer.Option("--min-speedup", metavar="FACTOR", help="Find the largest budget that is so much faster."),
    ] = None,
    text: Annotated[list[str] | None, typer.Option(metavar="FILE", help="Your text; else prose that ships.")] = None,
    save: Annotated[str | None, typer.Option(metavar="FILE", help="Write the settings file, for --settings.")] = None,
    prompt: Annotated[
        int, typer.Option(callback=counted(1), metavar="N", help="Prompt tokens of each piece of text.")
    ] = 256,
    continuation: Annotated[int, typer.Option(callback=counted(1), metavar="N", help="Decode steps scored.")] = 128,
    limit: Annotated[int, typer.Option(callback=counted(1), metavar="N", help="Most pieces of text to score.")] = 12,
    new_tokens: Annotated[
        int, typer.Option(callback=counted(4), metavar="N", help="Decoded to measure speed, exactly.")
    ] = 64,
    rounds: Annotated[
        int,
        typer.Option(callback=counted(0), metavar="N", help="Dense and pruned in turn for each speed; 0: none."),
    ] = 3,
    dtype: Dtype = "auto",
    weights: Weights = "auto",
    device: Device = "auto",
    json_file: JsonFile = None,
    wide: Wide = False,
) -> None:
    """Find the budget for a quality or a speed on your text, and write the settings for it. Code 1: it cannot be met."""
    from .tune import run

    measured = (prompt, continuation, limit, new_tokens, rounds)
    if not run(model, max_kl, min_speedup, text or (), *measured, save, dtype, device, json_file, weights, wide):
        raise typer.Exit(1)


__all__ = ["bench", "evaluate", "tune"]
