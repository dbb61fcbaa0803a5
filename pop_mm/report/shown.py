"""How sessions, reports and results show themselves: a line in a terminal, a small table in a notebook, JSON, pandas."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from shutil import get_terminal_size
from typing import Any

from ..errors import PopError

_LONGEST_NOTE = 160  # characters


class Values:
    """What has plain values (:meth:`to_dict`) and rows of them."""

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """Plain values, as :meth:`to_json` writes them."""

    @abstractmethod
    def _shown_rows(self) -> Sequence[Mapping[str, Any]]:
        """One row for each part, for pandas."""

    def to_json(self, path: str | Path | None = None) -> str:
        """JSON text of :meth:`to_dict`; written to a UTF-8 file too if a path is given."""
        text = json.dumps(self.to_dict(), indent=2)
        if path is not None:
            Path(path).expanduser().write_text(text + "\n", encoding="utf-8")
        return text

    def to_pandas(self) -> Any:
        """A ``pandas.DataFrame`` with one row for each part, with the keys of docs/json.md.

        Raises
        ------
        PopError
            pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise PopError("to_pandas() needs pandas, which is not installed: pip install pandas.") from error
        return pandas.DataFrame.from_records(list(self._shown_rows()))


class Shown(Values):
    """What has a line about itself and a small table too."""

    @abstractmethod
    def _shown_line(self) -> str:
        """What it is, in a line."""

    @abstractmethod
    def _shown_table(self) -> tuple[Sequence[str], Sequence[Sequence[str]]]:
        """Heads and cells of the small table; the first column numbers layers, and equal rows share a line of it."""

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self._shown_line()}>"

    def _repr_html_(self) -> str:
        """For notebooks."""
        heads, rows = self._shown_table()
        head = "".join(f"<th>{escape(name)}</th>" for name in heads)
        body = "".join("<tr>" + "".join(f"<td>{escape(c)}</td>" for c in row) + "</tr>" for row in grouped(rows))
        return f"<p>{escape(self._shown_line())}</p><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


class ShownReport(Shown):
    """What a session did: its line, and its tables for ``print``."""

    def _shown_line(self) -> str:
        return of_report(self)

    def __str__(self) -> str:
        return printed(self)


def grouped(rows: Sequence[Sequence[str]]) -> list[list[str]]:
    """Rows that are equal but for their first cell, a number, as one row: ``0-3, 5``."""
    numbers: dict[tuple[str, ...], list[str]] = {}
    for first, *rest in rows:
        numbers.setdefault(tuple(rest), []).append(first)
    return [[_spans(firsts), *rest] for rest, firsts in numbers.items()]


def _spans(names: Sequence[str]) -> str:
    if not all(name.isdigit() for name in names):
        return ", ".join(dict.fromkeys(names))
    spans: list[list[int]] = []
    for number in sorted({int(name) for name in names}):
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(f"{low}" if low == high else f"{low}-{high}" for low, high in spans)


def counts(backends: Mapping[str, int]) -> str:
    """``"28 rows, 2 masked"``."""
    return ", ".join(f"{count} {name}" for name, count in backends.items())


def of_report(report: Any) -> str:
    """The line of a report: settings, tokens, what was read, and the first notes.

    Parameters
    ----------
    report : Report or ThresholdReport
    """
    times, left_out = report.timings, report.left_out_share
    parts = [report.config.label, f"{report.prompt_tokens} prompt tokens", f"{times.decode_forwards} decode steps"]
    if left_out is not None:
        parts.append(f"{1 - left_out:.0%} of the weights read")
    line = f"{', '.join(parts)}; {counts(report.backends)}"
    notes = [note if len(note) <= _LONGEST_NOTE else note[:_LONGEST_NOTE] + " ..." for note in report.notes[:3]]
    more = [f"and {len(report.notes) - 3} more notes"] if len(report.notes) > 3 else []
    return ". ".join([line, *(note.rstrip(".") for note in notes), *more, "print(report) shows all"])


def printed(report: Any) -> str:
    """What ``print(report)`` shows: as wide as the terminal, at most 120 characters, which it has where there is none."""
    from rich.console import Console

    console = Console(width=min(120, get_terminal_size((120, 24)).columns))
    with console.capture() as capture:
        console.print(report)
    return capture.get()


def share(value: float | None) -> str:
    """``"70.0%"``, or a dash for what is not known."""
    return "-" if value is None else f"{value:.1%}"


__all__ = ["Shown", "ShownReport", "Values", "counts", "grouped", "of_report", "printed", "share"]
