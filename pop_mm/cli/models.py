"""``pop-mm models``: sample models, and mixtures made of dense ones."""

from __future__ import annotations

from typing import Annotated

import typer

from .framework import App, sample_names

models_app = App("models", help="Sample models that need no model hub.")


@models_app.command("list")
def models_list() -> None:
    """List the sample models."""
    from rich.console import Console

    from ..folders import cache_folder
    from ..report.tables import samples_table
    from ..samples import SAMPLES

    console = Console()
    console.print(samples_table(SAMPLES.values()))
    console.print(f"They are kept in {cache_folder()} (POP_MM_CACHE).", highlight=False, soft_wrap=True)


@models_app.command("fetch")
def models_fetch(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME",
            help="Of a sample model: see `pop-mm models list`.",
            show_default=False,
            autocompletion=sample_names,
        ),
    ],
) -> None:
    """Fetch a sample model and print its folder."""
    from ..samples import fetch
    from .terminal import quiet

    with quiet():
        folder = fetch(name)
    typer.echo(folder)


@models_app.command("upcycle")
def models_upcycle(
    source: Annotated[
        str, typer.Option(metavar="NAME", help="A dense model: a sample, a folder or a hub id.", show_default=False)
    ],
    to: Annotated[
        str, typer.Option(metavar="mixtral|qwen2_moe|qwen3_moe|qwen3_vl_moe", help="Type to make.", show_default=False)
    ],
    output: Annotated[str, typer.Option(metavar="DIR", help="New or empty folder for the model.", show_default=False)],
    experts: Annotated[int, typer.Option(metavar="N", help="Routed experts of each layer.")] = 4,
    top_k: Annotated[int, typer.Option(metavar="N", help="Routed experts that a token uses.")] = 2,
    router_seed: Annotated[int, typer.Option(metavar="N", help="For the random routers, and the noise.")] = 0,
    perturb: Annotated[
        float, typer.Option(metavar="SHARE", help="Relative size of noise that makes the experts differ.")
    ] = 0.0,
) -> None:
    """Make a Mixture-of-Experts model that computes what a dense one does."""
    from ..samples.upcycle import logit_difference, upcycle
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
