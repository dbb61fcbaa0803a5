"""What every command has: ``-h``, ``-v``, ``-q``, and an example at the end of its help."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer

from .examples import EXAMPLES, SHORT
from .loudness import set_loudness

Verbose = Annotated[
    bool, typer.Option("--verbose", "-v", help="Show what other packages log, and tracebacks.", show_default=False)
]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="Results alone: no progress, notes or warnings.", show_default=False)
]


def sample_names(incomplete: str) -> list[str]:
    """Sample models, for the shell's completion."""
    from ..samples import SAMPLES

    return [name for name in SAMPLES if name.startswith(incomplete)]


class App(typer.Typer):
    """A group of commands. Help is plain text, which fits 80 columns and takes square brackets as they are."""

    def __init__(self, name: str, **settings: Any) -> None:
        names = {"help_option_names": ["-h", "--help"], "max_content_width": 80}
        super().__init__(
            no_args_is_help=True,
            rich_markup_mode=None,
            pretty_exceptions_enable=False,
            context_settings=names,
            epilog=_examples(name),
            **settings,
        )

    def command(  # type: ignore[override]
        self, name: str | None = None, **settings: Any
    ) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """As typer's, with what every command has."""

        def register(function: Callable[..., Any]) -> Callable[..., Any]:
            known = name or function.__name__
            examples, short = _examples(function.__name__), SHORT.get(function.__name__)
            add = super(App, self).command(known, epilog=examples, short_help=short, **settings)
            add(_with_loudness(function))
            return function

        return register


def _examples(name: str) -> str | None:
    """The examples of a command or group, on lines of their own; None if there are none."""
    lines = EXAMPLES.get(name)
    if lines is None:
        return None
    head = "Example:" if len(lines) == 1 else "Examples:"
    return "\n".join(["\b", head, *(f"  {line}" for line in lines)])


def _with_loudness(function: Callable[..., Any]) -> Callable[..., Any]:
    """The command with the options ``-v`` and ``-q``."""
    signature = inspect.signature(function, eval_str=True)

    @functools.wraps(function)
    def run(*arguments: Any, verbose: bool, quiet: bool, **options: Any) -> Any:
        if verbose or quiet:
            set_loudness(verbose, quiet)
        return function(*arguments, **options)

    more = {"verbose": Verbose, "quiet": Quiet}
    added = [inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=a) for n, a in more.items()]
    run.__signature__ = signature.replace(parameters=[*signature.parameters.values(), *added])  # type: ignore[attr-defined]
    run.__annotations__ = {**function.__annotations__, **more}
    return run


__all__ = ["App", "Quiet", "Verbose", "sample_names"]
