"""Commands that describe a model, or the model types with an adapter, without an answer.

Heavy modules are imported inside the commands, so that ``pop-mm --help`` is fast.
"""

from __future__ import annotations

from typing import Annotated

import typer

from .options import (
    SETTINGS,
    Backend,
    Budget,
    Dtype,
    Gamma,
    Method,
    Model,
    Ratio,
    Scope,
    Settings,
    Weights,
    Wide,
)


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
    weights: Weights = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, one row per FFN.", show_default=False)] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Load the weights and probe the adapter; code 1 if it is broken.")
    ] = False,
    wide: Wide = False,
) -> None:
    """Show what would be pruned, and what a decoded token would read. The weights are loaded for --check alone."""
    from .inspect import run
    from .settings import config_of

    config = config_of(context, settings, *SETTINGS)
    if not run(model, config, dtype, as_json, check, wide, weights):
        raise typer.Exit(1)


def adapters(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.", show_default=False)] = False,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print the table of docs/support.md.", show_default=False)
    ] = False,
) -> None:
    """List the model types that have an adapter."""
    import json

    from ..adapters import support_table
    from ..report.tables import adapters_markdown, adapters_table

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


__all__ = ["adapters", "inspect"]
