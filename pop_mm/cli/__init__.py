"""The ``pop-mm`` command and its subcommands, in the order of its help."""

from __future__ import annotations

from typing import Annotated

import typer

from .. import __version__
from . import answering, describing, measuring
from .framework import App, Quiet, Verbose
from .loudness import set_loudness
from .models import models_app
from .running import main
from .serve import serve as _serve

app = App("pop-mm")
app.add_typer(models_app, name="models")


@app.callback(invoke_without_command=True)
def _about(
    version: Annotated[bool, typer.Option("--version", help="Print the version.", show_default=False)] = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Make Hugging Face models answer faster: a token reads only the weights that it needs."""
    set_loudness(verbose, quiet)
    if version:
        typer.echo(__version__)
        raise typer.Exit()


app.command()(answering.generate)
app.command()(answering.chat)
app.command()(answering.ask)
app.command("eval")(measuring.evaluate)
app.command("app")(answering.web_app)
app.command()(_serve)
app.command()(describing.inspect)
app.command()(measuring.bench)
app.command()(measuring.tune)
app.command()(describing.adapters)

__all__ = ["app", "main"]
