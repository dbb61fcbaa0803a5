"""How much the commands say: ``-v`` shows what other packages log and warn of, ``-q`` shows results and errors alone."""

from __future__ import annotations

import logging
import sys
import warnings
from typing import Any

from ..errors import PopWarning

_said = {"verbose": False, "quiet": False}


def set_loudness(verbose: bool, quiet: bool) -> None:
    """Begin with neither, or add to what was said: options stand in front of a command and behind it."""
    _said.update({"verbose": False, "quiet": False} if not (verbose or quiet) else {})
    _said["verbose"] |= verbose
    _said["quiet"] |= quiet
    if _said["verbose"]:
        logging.disable(logging.NOTSET)
        warnings.simplefilter("default")


def verbose() -> bool:
    """Whether ``-v`` was given."""
    return _said["verbose"]


def silent() -> bool:
    """Whether ``-q`` was given."""
    return _said["quiet"]


def only_own_warnings() -> None:
    """Within ``warnings.catch_warnings()``: of warnings, only pop_mm's own are shown, as a sentence and once each."""
    warnings.simplefilter("default" if verbose() else "ignore")
    if not verbose():
        warnings.filterwarnings("ignore" if silent() else "default", category=PopWarning)
        warnings.showwarning = _show


def _show(
    message: Warning | str, category: Any, filename: str, lineno: int, file: Any = None, line: Any = None
) -> None:
    print("Warning:", " ".join(str(message).split()), file=sys.stderr)


__all__ = ["only_own_warnings", "set_loudness", "silent", "verbose"]
