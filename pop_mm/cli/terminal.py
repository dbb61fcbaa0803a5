"""What commands share: silence for other libraries, spinners on stderr, and files for the results."""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from rich.console import Console

from ..errors import PopError, one_line
from . import loudness


class CommandError(PopError):
    """The command line asks for something that cannot be done."""


@contextmanager
def quiet() -> Iterator[None]:
    """Keep warnings and progress bars of transformers and the hub's client out of the output; errors still show."""
    if loudness.verbose():
        yield
        return
    from huggingface_hub.utils import logging as hub
    from transformers.utils import logging

    before, hub_before, bars = logging.get_verbosity(), hub.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    hub.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            loudness.only_own_warnings()
            yield
    finally:
        logging.set_verbosity(before)
        hub.set_verbosity(hub_before)
        if bars:
            logging.enable_progress_bar()


def spinner(text: str) -> AbstractContextManager[Any]:
    """A spinner on stderr while something takes long; nothing if that is no terminal, or with ``-q``."""
    return nullcontext() if loudness.silent() else Console(stderr=True).status(text)


def words(what: str, text: str | None, file: str | None = None) -> str:
    """What the user wants answered: the text itself, all of stdin if that is ``-``, or a file's.

    Raises
    ------
    CommandError
        Both or neither are given, or the file cannot be read as UTF-8.
    """
    if (text is None) == (file is None):
        raise CommandError(f"Give --{what} or --{what}-file, and not both (--{what} - is stdin).")
    if text is not None and text != "-":
        return text
    if file is None or file == "-":
        if sys.stdin is None or sys.stdin.isatty():
            warn(f"reading the {what} from the terminal; Ctrl-D ends it.")
        return "" if sys.stdin is None else sys.stdin.read().strip()
    with path_errors(file):
        try:
            return Path(file).expanduser().read_text(encoding="utf-8").strip()
        except UnicodeDecodeError as error:
            raise CommandError(f"The {what} in {file} is not valid UTF-8: save the file as UTF-8.") from error
        except OSError as error:
            raise CommandError(f"The file {file} cannot be read: {error.strerror or error}.") from error


@contextmanager
def path_errors(path: object) -> Iterator[None]:
    """Turn whatever a path raises that no system takes (too long, a null byte, an unknown ``~user``) into a sentence."""
    try:
        yield
    except PopError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        raise CommandError(
            f"The path {str(path)!r} cannot be used: {getattr(error, 'strerror', None) or one_line(error)}."
        ) from error


def check_writable(path: str | os.PathLike[str]) -> Path:
    """The path with ``~`` expanded, if a file can be written there.

    Raises
    ------
    CommandError
        It is a folder, its folder does not exist, the system refuses, or it is no path at all.
    """
    with path_errors(path):
        target = Path(path).expanduser()
        existed = target.exists()
        try:
            with target.open("ab"):
                pass
        except OSError as error:
            raise CommandError(f"The file {target} cannot be written: {error.strerror or error}.") from error
        if not existed:
            target.unlink()
    return target


def save_then(saves: Sequence[Callable[[], object]], show: Callable[[], object]) -> None:
    """Save all results and only then show them. What cannot be saved keeps nothing else from being saved or shown.

    Parameters
    ----------
    saves : sequence of callable
    show : callable
        Prints; the first error of ``saves`` is raised after it.
    """
    errors = []
    for save in saves:
        try:
            save()
        except Exception as error:
            errors.append(error)
    show()
    if errors:
        raise errors[0]


def warn(message: str) -> None:
    """A sentence on stderr about something that goes on all the same; nothing with ``-q``."""
    if loudness.silent():
        return
    Console(stderr=True).print(f"Warning: {message}", style="yellow", highlight=False, markup=False, soft_wrap=True)


def write_text(text: str, path: str | os.PathLike[str]) -> None:
    """Write a UTF-8 file; half characters, which names of files in other encodings have, are escaped as in JSON."""
    try:
        Path(path).expanduser().write_text(text, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise CommandError(f"The file {path} cannot be written: {error.strerror or error}.") from error


def write_json(value: object, path: str) -> None:
    """Write JSON to a file, or to stdout if the path is ``-`` (in ASCII, whatever the terminal's encoding)."""
    if path == "-":
        print(json.dumps(value, indent=2), flush=True)
    else:
        write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", path)
