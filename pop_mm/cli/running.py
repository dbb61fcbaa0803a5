"""Runs ``pop-mm``, and what becomes of errors: a sentence on stderr and an exit code."""

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
from typing import cast

import typer

from ..errors import PopError, one_line
from ..inputs import TokenError
from ..samples import HubError
from . import loudness

# click's base class of such errors, of whichever click (an own one, lately) typer uses
_USAGE_ERROR = cast("type[typer.BadParameter]", typer.BadParameter.__mro__[2])
_OUTPUT_ERRORS = (errno.ENOSPC, errno.EPIPE, errno.EIO, errno.EBADF, errno.EFBIG, errno.EDQUOT)  # of stdout


def main(arguments: Sequence[str] | None = None) -> None:
    """Run ``pop-mm``.

    A user's mistake ends with a plain sentence and code 2, any other failure (a model that the hub does not give, or whose
    embedding lacks a token) with one and code 1, Ctrl-C with code 130 and nothing. ``-v`` or ``POP_MM_TRACEBACK=1`` print
    the traceback of such other failures. What the encoding of stdout does not have is replaced by ``?``.

    Parameters
    ----------
    arguments : sequence of str, optional
        Instead of the process's own.
    """
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors in ("strict", "surrogateescape"):
        sys.stdout.reconfigure(errors="replace")
    loudness.set_loudness(False, False)
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
            loudness.only_own_warnings()
            yield
    finally:
        logging.disable(before)


def _run(arguments: Sequence[str] | None) -> int:
    """The exit code."""
    from . import app

    try:
        code = app(args=None if arguments is None else list(arguments), prog_name="pop-mm", standalone_mode=False)
        if sys.stdout is not None:
            sys.stdout.flush()
    except (KeyboardInterrupt, typer.Abort):
        return 130
    except (HubError, TokenError) as error:
        return _say(str(error), 1)
    except PopError as error:
        return _say(str(error), 2)
    except _USAGE_ERROR as error:
        return _say(error.format_message(), 2) if str(error) else 2
    except Exception as error:
        if isinstance(error, OSError) and error.filename is None and error.errno in _OUTPUT_ERRORS:
            return _say(f"The output cannot be written: {error.strerror}.", 1)
        return _say(_unexpected(error), 1)
    return code if isinstance(code, int) else 0


def _unexpected(error: Exception) -> str:
    shown = loudness.verbose() or os.environ.get("POP_MM_TRACEBACK", "") not in ("", "0")
    if shown:
        traceback.print_exception(error)
    said = textwrap.shorten(one_line(error), 400, placeholder=" ...")
    hint = "" if shown else " (set POP_MM_TRACEBACK=1 to see where)"
    return f"{type(error).__name__}: {said}{hint}." if str(error) else f"{type(error).__name__}{hint}."


def _say(message: str, code: int) -> int:
    print("Error:", " ".join(message.split()), file=sys.stderr)
    return code


__all__ = ["main"]
