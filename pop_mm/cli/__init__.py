"""The ``pop-mm`` command: its options, and what becomes of errors.

Heavy modules are imported inside the commands, so that ``pop-mm --help`` is fast.
"""

from __future__ import annotations

import errno
import io
import logging
import os
import sys
import textwrap
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, cast

import typer

from .. import __version__
from ..errors import PopError, one_line

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
models_app = typer.Typer(no_args_is_help=True, help="Sample models that need no model hub.")
app.add_typer(models_app, name="models")

# click's base class of such errors, of whichever click (an own one, lately) typer uses
_USAGE_ERROR = cast("type[typer.BadParameter]", typer.BadParameter.__mro__[2])
_OUTPUT_ERRORS = (errno.ENOSPC, errno.EPIPE, errno.EIO, errno.EBADF, errno.EFBIG, errno.EDQUOT)  # of stdout

_MOST = 2**31 - 1  # of anything that is counted
Model = Annotated[str, typer.Option(help="A sample's name (smollm2-135m), a folder, or a hub id.", show_default=False)]
Ratio = Annotated[
    float | None, typer.Option(help="Share that POP leaves out while decoding, in [0, 1).", show_default=False)
]
Budget = Annotated[
    float | None,
    typer.Option(help="Share of the weights that a token reads, in (0, 1]; default 0.65.", show_default=False),
]
Method = Annotated[str, typer.Option(metavar="auto|thresholds|pop|static|full", help="auto: pop with a ratio.")]
Settings = Annotated[
    str | None,
    typer.Option(
        metavar="FILE", help="Settings that `pop-mm tune` found; options that are given win.", show_default=False
    ),
]
Scope = Annotated[str, typer.Option(metavar="overall|ffn", help="What ratio and budget are a share of.")]
Gamma = Annotated[float, typer.Option(help="Share of an FFN's channels that are candidates, in [0, 1].")]
Backend = Annotated[str, typer.Option(metavar="auto|masked|inplace", help="inplace is fast, masked saves no time.")]
Dtype = Annotated[str, typer.Option(metavar="auto|float32|bfloat16|float16", help="auto: the checkpoint's own.")]
Prefill = Annotated[str, typer.Option(metavar="dense|partition", help="partition: as in the paper.")]
ProbeTokens = Annotated[
    int,
    typer.Option(
        max=_MOST, metavar="N", help="With --prefill partition: tokens that choose the channels; 0: all of them."
    ),
]
MaxNewTokens = Annotated[int, typer.Option(min=1, max=_MOST, help="Longest answer, in tokens.")]
Temperature = Annotated[float, typer.Option(min=0, max=100, help="0 is greedy; above 0 the answer is sampled.")]
Seed = Annotated[int, typer.Option(min=0, max=2**63 - 1, help="For sampling.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, ...; auto: a GPU if there is one.")]
Methods = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME",
        help="dense|static|pop|full|thresholds|wanda_sp|magnitude|griffin|random; repeat it.",
        show_default=False,
    ),
]
Ratios = Annotated[
    list[float] | None,
    typer.Option(metavar="SHARE", help="To leave out, in [0, 1); repeat it for more.", show_default=False),
]
Budgets = Annotated[
    list[float] | None,
    typer.Option(metavar="SHARE", help="To read, in (0, 1]; default 0.65; repeat it for more.", show_default=False),
]
Gammas = Annotated[list[float], typer.Option(metavar="SHARE", help="Of pop: candidates, in [0, 1]; repeat it.")]
Prefills = Annotated[list[str], typer.Option(metavar="dense|partition", help="Repeat it for both.")]
Counts = Annotated[list[int], typer.Option(min=1, max=_MOST, metavar="N", help="Repeat it for more.")]
_SETTINGS = ("ratio", "budget", "method", "scope", "gamma", "backend")  # options that settings are named after
_OF_BUDGETS, _OF_RATIOS = ["thresholds", "pop"], ["static", "pop", "full"]  # methods of `eval`
_GAMMAS, _PREFILLS = [0.1], ["dense"]
_BATCHES, _PROMPTS, _CACHES = [1], [128], ["dynamic"]  # of `bench`
JsonFile = Annotated[str | None, typer.Option("--json", metavar="FILE", help="Save as JSON; - is stdout.")]
Plot = Annotated[str | None, typer.Option(metavar="FILE", help="Save a picture: .png, .svg or .pdf.")]


@app.callback(invoke_without_command=True)
def _about(
    version: Annotated[bool, typer.Option("--version", help="Print the version.", show_default=False)] = False,
) -> None:
    """Prune Hugging Face models while they decode (Partition-guided Online Pruning)."""
    if version:
        typer.echo(__version__)
        raise typer.Exit()


@app.command()
def generate(
    context: typer.Context,
    model: Model,
    prompt: Annotated[str, typer.Option(help="What to answer, or with --no-chat to continue.", show_default=False)],
    ratio: Ratio = None,
    budget: Budget = None,
    method: Method = "auto",
    scope: Scope = "overall",
    gamma: Gamma = 0.1,
    prefill: Prefill = "dense",
    probe_tokens: ProbeTokens = 0,
    backend: Backend = "auto",
    settings: Settings = None,
    max_new_tokens: MaxNewTokens = 64,
    temperature: Temperature = 0.0,
    seed: Seed = 0,
    chat: Annotated[bool, typer.Option(help="Use the tokenizer's chat template, if it has one.")] = True,
    dtype: Dtype = "auto",
    device: Device = "auto",
    json_file: JsonFile = None,
    plot: Plot = None,
) -> None:
    """Answer a prompt dense and pruned, side by side, with the decode speed of each."""
    from .generate import Sampling, run
    from .settings import config_of

    config = config_of(context, settings, *_SETTINGS, "prefill", "probe_tokens")
    sampling = Sampling(max_new_tokens, temperature, seed, chat)
    run(model, prompt, config, sampling, dtype, device, json_file, plot)


@app.command()
def ask(
    context: typer.Context,
    question: Annotated[str, typer.Argument(help="What to ask about the image.", show_default=False)],
    image: Annotated[list[str], typer.Option(metavar="FILE", help="Give it again for more.", show_default=False)],
    model: Model = "tiny-vlm",
    ratio: Ratio = None,
    budget: Budget = None,
    method: Method = "auto",
    scope: Scope = "overall",
    gamma: Gamma = 0.1,
    prefill: Prefill = "dense",
    probe_tokens: ProbeTokens = 0,
    backend: Backend = "auto",
    settings: Settings = None,
    max_new_tokens: MaxNewTokens = 64,
    temperature: Temperature = 0.0,
    seed: Seed = 0,
    dtype: Dtype = "auto",
    device: Device = "auto",
    json_file: JsonFile = None,
    plot: Plot = None,
) -> None:
    """Ask a vision-language model about images: dense and pruned, side by side, with the decode speed of each."""
    from .ask import run
    from .generate import Sampling
    from .settings import config_of

    config = config_of(context, settings, *_SETTINGS, "prefill", "probe_tokens")
    run(
        model,
        image,
        question,
        config,
        Sampling(max_new_tokens, temperature, seed, True),
        dtype,
        device,
        json_file,
        plot,
    )


@app.command("eval")
def evaluate(
    context: typer.Context,
    model: Model = "smollm2-135m",
    method: Methods = None,
    ratio: Ratios = None,
    budget: Budgets = None,
    gamma: Gammas = _GAMMAS,
    prefill: Prefills = _PREFILLS,
    scope: Scope = "overall",
    settings: Settings = None,
    text: Annotated[
        list[str] | None, typer.Option(metavar="FILE", help="Text to score; else prose that ships.")
    ] = None,
    dataset: Annotated[
        str | None, typer.Option(metavar="NAME", help="Of `datasets`, or a .jsonl, .csv or .parquet.")
    ] = None,
    subset: Annotated[str | None, typer.Option(metavar="NAME", help="The data set's configuration.")] = None,
    split: Annotated[str, typer.Option(help="The data set's split.")] = "test",
    column: Annotated[str, typer.Option(help="The data set's column of text.")] = "text",
    limit: Annotated[int | None, typer.Option(min=1, max=_MOST, help="Most pieces of text to score.")] = None,
    calibration: Annotated[list[str] | None, typer.Option(metavar="FILE", help="Calibration text of wanda_sp.")] = None,
    prompt: Annotated[int, typer.Option(min=1, max=_MOST, help="Prompt tokens of each piece.")] = 256,
    continuation: Annotated[int, typer.Option(min=1, max=_MOST, help="Decode steps scored.")] = 128,
    generate_tokens: Annotated[
        int, typer.Option("--generate", min=0, max=_MOST, help="Greedy tokens that are compared; 0: none.")
    ] = 16,
    batch: Annotated[str, typer.Option(metavar="per_sequence|shared", help="shared: a batch has one partition.")] = (
        "per_sequence"
    ),
    batch_size: Annotated[int, typer.Option(min=1, max=_MOST, help="Pieces of text at once.")] = 4,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Of random and the bootstrap.")] = 0,
    output: Annotated[
        str | None, typer.Option(metavar="DIR", help="Keep results here; an interrupted run goes on from it.")
    ] = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    json_file: JsonFile = None,
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
    setup = Setup(model, prompt, continuation, generate_tokens, scope, batch, batch_size, seed, others)
    source = Source(text or (), dataset, subset, split, column, limit, calibration or ())
    methods = grid.methods or (_OF_BUDGETS if grid.budgets else _OF_RATIOS)
    run(setup, methods, grid.ratios, gammas, prefills, source, output, dtype, device, json_file, grid.budgets)


@app.command("app")
def web_app(
    context: typer.Context,
    model: Model = "tiny-vlm",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Of 127.0.0.1; no other machine can reach it.")] = 7860,
    ratio: Ratio = None,
    budget: Budget = None,
    method: Method = "auto",
    scope: Scope = "overall",
    gamma: Gamma = 0.1,
    backend: Backend = "auto",
    settings: Settings = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
) -> None:
    """Serve a web page on this machine that answers a question dense and pruned. Needs the extra [app]."""
    from ..app.server import run
    from .settings import config_of

    run(model, port, config_of(context, settings, *_SETTINGS), dtype, device)


@app.command()
def inspect(
    context: typer.Context,
    model: Model,
    ratio: Ratio = None,
    budget: Budget = None,
    method: Method = "auto",
    scope: Scope = "overall",
    gamma: Gamma = 0.1,
    backend: Backend = "auto",
    settings: Settings = None,
    dtype: Dtype = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, one row per FFN.", show_default=False)] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Load the weights and probe the adapter; code 1 if it is broken.")
    ] = False,
) -> None:
    """Show what would be pruned, and what a decoded token would read. The weights are loaded for --check alone."""
    from .inspect import run
    from .settings import config_of

    config = config_of(context, settings, *_SETTINGS)
    if not run(model, config, dtype, as_json, check):
        raise typer.Exit(1)


@app.command()
def bench(
    context: typer.Context,
    model: Annotated[str | None, typer.Option(help="A sample's name, a folder, or a hub id.")] = None,
    config: Annotated[
        str | None, typer.Option(metavar="NAME", help="Published dimensions instead: llama3.2-1b, mixtral-8x7b, ...")
    ] = None,
    random_weights: Annotated[bool, typer.Option("--random-weights", help="Of --config; built on the device.")] = False,
    layers: Annotated[int | None, typer.Option(min=1, max=_MOST, help="Of --config: build fewer layers.")] = None,
    batch: Counts = _BATCHES,
    prompt: Counts = _PROMPTS,
    new_tokens: Annotated[int, typer.Option(min=4, max=_MOST, help="Decoded tokens, exactly.")] = 128,
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
    cache: Annotated[list[str], typer.Option(metavar="dynamic|static", help="Repeat it for both.")] = _CACHES,
    compiled: Annotated[
        bool, typer.Option("--compile", help="torch.compile, dense and pruned; needs --cache static.")
    ] = False,
    rounds: Annotated[int, typer.Option(min=1, max=_MOST, help="Rounds that count, after one to warm up.")] = 7,
    memory: Annotated[
        bool, typer.Option("--memory", help="Peak memory on a CPU too, each in a fresh process.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Of the order, prompts and random weights.")] = 0,
    dtype: Dtype = "auto",
    device: Device = "auto",
    json_file: JsonFile = None,
    plot: Plot = None,
) -> None:
    """Measure speed and memory, dense and pruned in turn, beside the byte limit and Amdahl's."""
    from ..bench import Setup
    from .bench import pruning, run, source_of
    from .settings import grid_of

    source = source_of(model, config, random_weights, layers, dtype)
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
    run(source, setup, kernels or [], memory, device, json_file, plot)


@app.command()
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
    prompt: Annotated[int, typer.Option(min=1, max=_MOST, help="Prompt tokens of each piece of text.")] = 256,
    continuation: Annotated[int, typer.Option(min=1, max=_MOST, help="Decode steps scored.")] = 128,
    limit: Annotated[int, typer.Option(min=1, max=_MOST, help="Most pieces of text to score.")] = 12,
    new_tokens: Annotated[int, typer.Option(min=4, max=_MOST, help="Decoded to measure speed, exactly.")] = 64,
    rounds: Annotated[
        int, typer.Option(min=0, max=_MOST, help="Dense and pruned in turn for each speed; 0: none.")
    ] = 3,
    dtype: Dtype = "auto",
    device: Device = "auto",
    json_file: JsonFile = None,
) -> None:
    """Find the budget for a quality or a speed on your text, and write the settings for it. Code 1: it cannot be met.

    Examples: pop-mm tune --model smollm2-135m --max-kl 0.05 --save settings.json; then
    pop-mm generate --model smollm2-135m --prompt "Why is the sky blue?" --settings settings.json
    """
    from .tune import run

    measured = (prompt, continuation, limit, new_tokens, rounds)
    if not run(model, max_kl, min_speedup, text or (), *measured, save, dtype, device, json_file):
        raise typer.Exit(1)


@app.command()
def adapters(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.", show_default=False)] = False,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print the table of docs/support.md.", show_default=False)
    ] = False,
) -> None:
    """List the model types that have an adapter."""
    import json

    from ..adapters import support_table
    from ..tables import adapters_markdown, adapters_table

    rows = support_table()
    if as_json and markdown:
        raise typer.BadParameter("Give --json or --markdown, not both.")
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
    elif markdown:
        typer.echo(adapters_markdown(rows))
    else:
        from rich.console import Console

        Console().print(adapters_table(rows))


@models_app.command("list")
def models_list() -> None:
    """List the sample models."""
    from rich.console import Console

    from ..folders import cache_folder
    from ..samples import SAMPLES
    from ..tables import samples_table

    console = Console()
    console.print(samples_table(SAMPLES.values()))
    console.print(f"They are kept in {cache_folder()} (POP_MM_CACHE).", highlight=False, soft_wrap=True)


@models_app.command("fetch")
def models_fetch(name: Annotated[str, typer.Argument(help="Name of a sample model.", show_default=False)]) -> None:
    """Fetch a sample model and print its folder."""
    from ..samples import fetch
    from .terminal import quiet

    with quiet():
        folder = fetch(name)
    typer.echo(folder)


@models_app.command("upcycle")
def models_upcycle(
    source: Annotated[str, typer.Option(help="A dense model: a sample, a folder or a hub id.", show_default=False)],
    to: Annotated[
        str, typer.Option(metavar="mixtral|qwen2_moe|qwen3_moe|qwen3_vl_moe", help="Type to make.", show_default=False)
    ],
    output: Annotated[str, typer.Option(metavar="DIR", help="New or empty folder for the model.", show_default=False)],
    experts: Annotated[int, typer.Option(help="Routed experts of each layer.")] = 4,
    top_k: Annotated[int, typer.Option(help="Routed experts that a token uses.")] = 2,
    router_seed: Annotated[int, typer.Option(help="For the random routers, and the noise.")] = 0,
    perturb: Annotated[float, typer.Option(help="Relative size of noise that makes the experts differ.")] = 0.0,
) -> None:
    """Make a Mixture-of-Experts model that computes what a dense one does."""
    from ..upcycle import logit_difference, upcycle
    from .terminal import quiet, spinner

    with quiet():
        made = upcycle(source, to, output, experts=experts, top_k=top_k, router_seed=router_seed, perturb=perturb)
        with spinner("Comparing the models"):
            difference, largest = logit_difference(source, made.path)
    typer.echo(made.path)
    typer.echo(
        f"{made.parameters:,} parameters, of which a token uses {made.active_parameters:,} (the source has "
        f"{made.source_parameters:,})\nlargest logit difference to the source {difference:.1e}, of logits up to "
        f"{largest:.1f}"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run ``pop-mm``.

    A user's mistake ends with a plain sentence and code 2, any other failure with one and code 1, Ctrl-C with code 130 and
    nothing. ``POP_MM_TRACEBACK=1`` prints the traceback of such other failures. What the encoding of stdout does not have is
    replaced by ``?``.

    Parameters
    ----------
    arguments : sequence of str, optional
        Instead of the process's own.
    """
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors in ("strict", "surrogateescape"):
        sys.stdout.reconfigure(errors="replace")
    with _without_logs():
        code = _run(arguments)
    sys.exit(code)


@contextmanager
def _without_logs() -> Iterator[None]:
    """Keep out of the output what packages log and warn of; those that transformers imports do so for what they miss."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _run(arguments: Sequence[str] | None) -> int:
    """The exit code."""
    try:
        code = app(args=None if arguments is None else list(arguments), prog_name="pop-mm", standalone_mode=False)
        if sys.stdout is not None:
            sys.stdout.flush()
    except (KeyboardInterrupt, typer.Abort):
        return 130
    except PopError as error:
        return _say(str(error), 2)
    except _USAGE_ERROR as error:
        return _say(error.format_message(), 2) if str(error) else 2
    except Exception as error:
        if isinstance(error, OSError) and error.filename is None and error.errno in _OUTPUT_ERRORS:
            return _say(f"The output cannot be written: {error.strerror}.", 2)
        return _say(_unexpected(error), 1)
    return code if isinstance(code, int) else 0


def _unexpected(error: Exception) -> str:
    shown = os.environ.get("POP_MM_TRACEBACK", "") not in ("", "0")
    if shown:
        traceback.print_exception(error)
    said = textwrap.shorten(one_line(error), 400, placeholder=" ...")
    hint = "" if shown else " (set POP_MM_TRACEBACK=1 to see where)"
    return f"{type(error).__name__}: {said}{hint}." if str(error) else f"{type(error).__name__}{hint}."


def _say(message: str, code: int) -> int:
    print("Error:", " ".join(message.split()), file=sys.stderr)
    return code
