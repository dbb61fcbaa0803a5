"""Methods: what the prefill must remember, and what a decode step may leave out. One file each."""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches

from ..errors import ConfigError


@dataclass(frozen=True)
class Method:
    """One way to decide what a decode step leaves out.

    Attributes
    ----------
    name : str
    about : str
        What it does, in one line.
    session : str
        ``"module:class"`` of the session that runs it, imported when it is first needed.
    """

    name: str
    about: str
    session: str = "pop_mm.session:Session"


METHODS = {
    method.name: method
    for method in (
        Method(
            "thresholds",
            "entries of each matrix's input above a threshold from the prompt",
            "pop_mm.threshold_session:ThresholdSession",
        ),
        Method("pop", "the paper: channels R that the prompt chose, and the best of its candidates C at each step"),
        Method("static", "the prompt's best channels by POP's score, at every step (the paper's variant 1)"),
        Method("full", "the best of all channels at every step; saves nothing (the paper's variant 2)"),
    )
}


def get_method(name: object) -> Method:
    """The method of this name.

    Raises
    ------
    ConfigError
        There is none; a misspelt name is put right.
    """
    if isinstance(name, str) and name in METHODS:
        return METHODS[name]
    close = get_close_matches(name, METHODS, 1) if isinstance(name, str) else []
    hint = f" Did you mean {close[0]!r}?" if close else ""
    raise ConfigError(f"Unknown method {name!r}; known: auto, {', '.join(METHODS)}.{hint}")


__all__ = ["METHODS", "Method", "get_method"]
