"""Text for a terminal that wraps between words, and never between a figure and its unit."""

from __future__ import annotations

import re
from collections.abc import Sequence
from textwrap import TextWrapper
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

_GLUE = "\u00a0"  # a space at which textwrap does not break; rich does
_UNIT = re.compile(r"(?<=\d) (?=(?:s|ms|B|kB|MB|GB|TB)\b)")


class Paragraphs:
    """Paragraphs one below the other, each as wide as the terminal.

    Parameters
    ----------
    parts : sequence of (str, str)
        Text and rich style of each.
    """

    def __init__(self, parts: Sequence[tuple[str, str]]) -> None:
        self.parts = parts

    @classmethod
    def summary(cls, lines: Sequence[str], notes: Sequence[str]) -> Paragraphs:
        """A report's: its first line in bold, notes in yellow."""
        return cls([(lines[0], "bold"), *((line, "") for line in lines[1:]), *((note, "yellow") for note in notes)])

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The paragraphs, wrapped."""
        from rich.text import Text

        wrapper = TextWrapper(options.max_width, break_on_hyphens=False)
        for text, style in self.parts:
            for line in wrapper.wrap(_UNIT.sub(_GLUE, text)):
                yield Text(line.replace(_GLUE, " "), style)


def number_of(count: int, noun: str) -> str:
    """Count and noun: ``"1 text"``, ``"2 texts"``."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


__all__ = ["Paragraphs", "number_of"]
