"""A progress bar for work that may be short: it is drawn once it is known to take long."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

NOT_LONG = 2.0  # seconds
_SURE_AFTER = 0.3  # seconds of work that tell how long the rest will take


@contextmanager
def bar_if_long(what: str, total: float) -> Iterator[Callable[[float], None]]:
    """Within: call what it yields with the amount of work that was just done. A bar on stderr follows, if that is a terminal.

    Parameters
    ----------
    what : str
        The work, in front of the bar.
    total : float
        Amount of all work, in any unit.
    """
    started, done = time.perf_counter(), 0.0
    show: Callable[[float], None] | None = None
    with ExitStack() as stack:

        def advance(amount: float) -> None:
            nonlocal done, show
            done += amount
            if show is not None:
                show(done)
                return
            spent = time.perf_counter() - started
            if spent > _SURE_AFTER and done > 0 and spent * total / done > NOT_LONG:
                show = stack.enter_context(_bar(what, total))
                show(done)

        yield advance


@contextmanager
def _bar(what: str, total: float) -> Iterator[Callable[[float], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    console = Console(file=sys.stderr)
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, total=total)
        yield lambda done: progress.update(task, completed=done)


__all__ = ["bar_if_long"]
