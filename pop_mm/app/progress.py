"""What has been said so far: both answers of a question, and the turns before it."""

from __future__ import annotations

from dataclasses import dataclass

from ..report.report import Report
from ..report.threshold_report import ThresholdReport


@dataclass(frozen=True)
class Turn:
    """An earlier turn of a chat: what was asked, and what the model answered either way."""

    question: str
    dense: str
    pruned: str


@dataclass(frozen=True)
class Answer:
    """An answer, so far.

    Attributes
    ----------
    text : str
    ids : tuple of int
        Of its tokens.
    tokens_per_s : float or None
        Decode speed without prefill, known when ``done``; None for a single token.
    done : bool
    """

    text: str = ""
    ids: tuple[int, ...] = ()
    tokens_per_s: float | None = None
    done: bool = False

    @property
    def tokens(self) -> int:
        """How many."""
        return len(self.ids)


@dataclass(frozen=True)
class Progress:
    """Both answers, so far.

    Attributes
    ----------
    dense, pruned : Answer
    report : Report or ThresholdReport or None
        Of the pruned answer's session; only in the last one, where all is done.
    waiting : int
        How many questions come before this one.
    """

    dense: Answer = Answer()
    pruned: Answer = Answer()
    report: Report | ThresholdReport | None = None
    waiting: int = 0

    @property
    def speedup(self) -> float | None:
        """Decode speed as a factor of the dense one."""
        dense, pruned = self.dense.tokens_per_s, self.pruned.tokens_per_s
        return pruned / dense if dense and pruned else None

    @property
    def same_tokens(self) -> int | None:
        """How many tokens both answers begin with alike; None where they are the same to the end."""
        dense, pruned = self.dense.ids, self.pruned.ids
        if dense == pruned:
            return None
        unlike = (n for n, (one, other) in enumerate(zip(dense, pruned, strict=False)) if one != other)
        return next(unlike, min(len(dense), len(pruned)))
