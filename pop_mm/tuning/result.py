"""What tuning found: the curve that was walked and the settings that were chosen, as numbers, JSON, a table or HTML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import PopError
from ..report.paragraphs import number_of
from ..report.shown import Values
from ..settings.config import PopConfig

if TYPE_CHECKING:
    from rich.table import Table


class TuneError(PopError):
    """A target that cannot be met, or no target at all."""


@dataclass(frozen=True)
class TunePoint:
    """One setting that was measured.

    Attributes
    ----------
    budget : float
    scope : {"overall", "ffn"}
    bytes_read : float
        Share of the layers' weight bytes, attention and FFNs, that a decoded token reads.
    holds : bool
        Whether the target is met.
    kl : float or None
        Mean over texts, nats a token; None where it was not measured, as for everything below.
    kl_interval : tuple of float or None
        95 %, bootstrap over texts; None for a single text.
    agreement : float or None
        Share of steps with the dense model's most likely token.
    speedup : float or None
        Decode speed over the dense model's on torch's kernels, median over rounds.
    speedup_range : tuple of float or None
        Lowest and highest round.
    tokens_per_s, dense_tokens_per_s : float or None
    """

    budget: float
    scope: str
    bytes_read: float
    holds: bool = False
    kl: float | None = None
    kl_interval: tuple[float, float] | None = None
    agreement: float | None = None
    speedup: float | None = None
    speedup_range: tuple[float, float] | None = None
    tokens_per_s: float | None = None
    dense_tokens_per_s: float | None = None

    @property
    def config(self) -> PopConfig:
        """The settings."""
        return PopConfig(budget=self.budget, scope=self.scope, method="thresholds")  # type: ignore[arg-type]


@dataclass(frozen=True, repr=False)
class TuneResult(Values):
    """The curve that was walked, and what was chosen.

    Attributes
    ----------
    max_kl, min_speedup : float or None
        The target; one of them.
    curve : sequence of TunePoint
        In the order in which they were measured.
    chosen : TunePoint or None
        None if the target cannot be met.
    best : TunePoint
        The chosen one, or else the nearest to the target.
    texts, prompt, continuation : int
        Texts, their prompt tokens, and the steps of each.
    notes : sequence of str
    """

    max_kl: float | None
    min_speedup: float | None
    curve: Sequence[TunePoint]
    chosen: TunePoint | None
    best: TunePoint
    texts: int
    prompt: int
    continuation: int
    notes: Sequence[str] = ()

    @property
    def met(self) -> bool:
        """Whether the target is met."""
        return self.chosen is not None

    @property
    def config(self) -> PopConfig | None:
        """The chosen settings, for :func:`pop_mm.prune`; None if the target cannot be met."""
        return None if self.chosen is None else self.chosen.config

    @property
    def target(self) -> str:
        """In words: ``"KL at most 0.05"``."""
        return f"KL at most {self.max_kl:g}" if self.max_kl is not None else f"speed-up at least {self.min_speedup:g}"

    @property
    def unmet(self) -> str:
        """A sentence about the best that was reached."""
        best = self.best
        reached = f"a KL of {best.kl:.4g}" if self.max_kl is not None else f"a speed-up of {best.speedup:.2f}"
        remedy = "a larger KL" if self.max_kl is not None else "a smaller speed-up"
        return (
            f"The target, {self.target}, cannot be met by thresholds on this model, text and machine: the best is {reached}, at "
            f"a budget of {best.budget:g}. Ask for {remedy}, or use the dense model."
        )

    def save(self, path: str | Path) -> Path:
        """Write the settings file, for ``--settings`` and :meth:`PopConfig.load`.

        Raises
        ------
        TuneError
            The target cannot be met; nothing is written.
        ConfigError
            The file cannot be written.
        """
        if self.config is None:
            raise TuneError(self.unmet)
        return self.config.save(path)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as :meth:`to_json` writes them."""
        return {
            "target": {"max_kl": self.max_kl, "min_speedup": self.min_speedup},
            "met": self.met,
            "config": None if self.config is None else self.config.changes(),
            "chosen": None if self.chosen is None else asdict(self.chosen),
            "best": asdict(self.best),
            "curve": list(self._shown_rows()),
            "texts": self.texts,
            "prompt": self.prompt,
            "continuation": self.continuation,
            "notes": list(self.notes),
        }

    def _shown_rows(self) -> Sequence[Mapping[str, Any]]:
        return [asdict(point) for point in self.curve]

    @property
    def rows(self) -> list[list[str]]:
        """Cells of the whole table, by falling bytes: budget, of what, bytes read, KL, same top token, speed-up, verdict."""
        return [
            [
                f"{point.budget:.3g}",
                "attention and FFNs" if point.scope == "overall" else "FFNs",
                f"{point.bytes_read:.1%}",
                _with_range(point.kl, point.kl_interval, ".3g"),
                "-" if point.agreement is None else f"{point.agreement:.1%}",
                _with_range(point.speedup, point.speedup_range, ".2f"),
                self._verdict(point),
            ]
            for point in self._points
        ]

    @property
    def _points(self) -> list[TunePoint]:
        return sorted(self.curve, key=lambda point: -point.bytes_read)

    def _verdict(self, point: TunePoint) -> str:
        return "chosen" if point == self.chosen else "holds" if point.holds else "no"

    @property
    def table(self) -> Table:
        """For a terminal, as wide as it is."""
        return self._table(_HEADS, self.rows, left=1)

    @property
    def short_table(self) -> Table:
        """For a narrow terminal, four columns: the setting, its bytes, what the target asks for, and the verdict."""
        asked = "KL to dense" if self.max_kl is not None else "speed-up"
        rows = [
            [
                f"budget {point.budget:.3g}" + ("" if point.scope == "overall" else " of the FFNs"),
                f"{point.bytes_read:.1%}",
                _with_range(point.kl, None, ".3g")
                if self.max_kl is not None
                else _with_range(point.speedup, None, ".2f"),
                self._verdict(point),
            ]
            for point in self._points
        ]
        return self._table(("setting", "bytes read", asked, ""), rows, left=0)

    def _table(self, heads: Sequence[str], rows: Sequence[Sequence[str]], left: int) -> Table:
        from rich import box
        from rich.table import Table

        table = Table(title=self.title, box=box.SIMPLE_HEAD, title_justify="left")
        for number, name in enumerate(heads):
            table.add_column(name, justify="left" if number == left else "right", no_wrap=True)
        for row in rows:
            table.add_row(*row, style="bold" if row[-1] == "chosen" else None)
        return table

    @property
    def title(self) -> str:
        """Of the table."""
        texts = number_of(self.texts, "text")
        return f"{self.target}: {texts}, {self.prompt} prompt tokens, {self.continuation} steps each"

    def __repr__(self) -> str:
        point = self.best
        found = [f"budget={point.budget:g}", f"scope={point.scope!r}"]
        found += [] if point.kl is None else [f"kl={point.kl:.4g}"]
        found += [] if point.speedup is None else [f"speedup={point.speedup:.2f}"]
        state = "chosen" if self.met else "not met, best"
        return f"TuneResult({self.target}; {state}: {', '.join(found)}; {len(self.curve)} points)"

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{escape(name)}</th>" for name in _HEADS)
        body = "".join(
            ("<tr style='font-weight:bold'>" if row[-1] == "chosen" else "<tr>")
            + "".join(f"<td>{escape(cell)}</td>" for cell in row)
            + "</tr>"
            for row in self.rows
        )
        notes = "".join(f"<p>{escape(note)}</p>" for note in (*([] if self.met else [self.unmet]), *self.notes))
        return f"<table><caption>{escape(self.title)}</caption><tr>{head}</tr>{body}</table>{notes}"


_HEADS = ("budget", "of", "layers' bytes", "KL [95 %]", "same top token", "speed-up [range]", "")


def _with_range(value: float | None, interval: tuple[float, float] | None, form: str) -> str:
    if value is None:
        return "-"
    return f"{value:{form}}" + ("" if interval is None else f" [{interval[0]:{form}}, {interval[1]:{form}}]")


__all__ = ["TuneError", "TunePoint", "TuneResult"]
