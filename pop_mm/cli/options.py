"""Options that several commands have, with the help that is shown for each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import typer

from .framework import sample_names


def counted(least: int, most: int = 2**31 - 1) -> Callable[[int | list[int] | None], int | list[int] | None]:
    """A callback that refuses other numbers; ``min=`` and ``max=`` would print both in every help."""

    def check(value: int | list[int] | None) -> int | list[int] | None:
        for number in value if isinstance(value, list) else [value]:
            if number is not None and not least <= number <= most:
                raise typer.BadParameter(f"{number} is not from {least} to {most}.")
        return value

    return check


seeded = counted(0, 2**63 - 1)


Model = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="A sample's name (smollm2-135m), a folder, or a hub id.",
        autocompletion=sample_names,
    ),
]
Ratio = Annotated[
    float | None,
    typer.Option(metavar="SHARE", help="Share that POP leaves out while decoding, in [0, 1).", show_default=False),
]
Budget = Annotated[
    float | None,
    typer.Option(
        metavar="SHARE", help="Share of the weights that a token reads, in (0, 1]; default 0.65.", show_default=False
    ),
]
Method = Annotated[
    str, typer.Option(metavar="auto|thresholds|pop|static|full", help="auto: pop with a ratio, else thresholds.")
]
Settings = Annotated[
    str | None,
    typer.Option(
        metavar="FILE", help="Settings that `pop-mm tune` found; options that are given win.", show_default=False
    ),
]
Scope = Annotated[str, typer.Option(metavar="overall|ffn", help="What ratio and budget are a share of.")]
Gamma = Annotated[
    float, typer.Option(metavar="SHARE", help="Share of an FFN's channels that are candidates, in [0, 1].")
]
Backend = Annotated[str, typer.Option(metavar="auto|masked|inplace", help="inplace is fast, masked saves no time.")]
Dtype = Annotated[str, typer.Option(metavar="auto|float32|bfloat16|float16", help="auto: the checkpoint's own.")]
Weights = Annotated[
    str,
    typer.Option(
        metavar="auto|int8|int8+head", help="int8: quantise the layers by torchao after loading; +head: lm_head too."
    ),
]
Prefill = Annotated[str, typer.Option(metavar="dense|partition", help="partition: fewer channels for the prompt too.")]
ProbeTokens = Annotated[
    int,
    typer.Option(
        callback=counted(0),
        metavar="N",
        help="With --prefill partition: tokens that choose the channels; 0: all of them.",
    ),
]
MaxNewTokens = Annotated[int, typer.Option(callback=counted(1), metavar="N", help="Longest answer, in tokens.")]
Temperature = Annotated[
    float, typer.Option(min=0, max=100, metavar="T", help="0 is greedy; above 0 the answer is sampled.")
]
Seed = Annotated[int, typer.Option(callback=seeded, metavar="N", help="For sampling.")]
Device = Annotated[str, typer.Option(metavar="NAME", help="cpu, cuda, ...; auto: a GPU if there is one.")]
Methods = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME",
        help="dense, thresholds, pop, static, full, griffin, wanda_sp, magnitude or random; repeat it.",
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
Counts = Annotated[list[int], typer.Option(callback=counted(1), metavar="N", help="Repeat it for more.")]
SETTINGS = ("ratio", "budget", "method", "scope", "gamma", "backend")  # options that settings are named after
OF_BUDGETS, OF_RATIOS = ["thresholds", "pop"], ["static", "pop", "full"]  # methods of `eval`
GAMMAS, PREFILLS = [0.1], ["dense"]
BATCHES, PROMPTS, CACHES = [1], [128], ["dynamic"]  # of `bench`
Wide = Annotated[bool, typer.Option("--wide", help="All columns, as wide as they are.", show_default=False)]
JsonFile = Annotated[str | None, typer.Option("--json", metavar="FILE", help="Save as JSON; - is stdout.")]
Plot = Annotated[str | None, typer.Option(metavar="FILE", help="Save a picture: .png, .svg or .pdf.")]
