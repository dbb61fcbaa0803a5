"""What was known before each prefill forward of a prompt, so that its cache may be cropped back to there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

from torch import Tensor

from ..errors import PhaseError

KEPT = 4  # snapshots of one prompt: each is as large as its statistics

Snapshot = TypeVar("Snapshot")


@dataclass(frozen=True)
class Chunk(Generic[Snapshot]):
    """One prefill forward, or several that can no longer be told apart.

    Attributes
    ----------
    start, end : int
        Tokens that the cache held before and after it.
    before : Snapshot or None
        What was known before it; None of the first, before which nothing was.
    rows : Tensor or None
        Which row of ``before`` each row of the batch is now; None if they are the same.
    continues : bool
        ``generate`` has split a prompt, and this is not its first part.
    """

    start: int
    end: int
    before: Snapshot | None
    rows: Tensor | None = None
    continues: bool = False


class History(Generic[Snapshot]):
    """The prefill forwards of one prompt, in order. At most four snapshots are kept."""

    def __init__(self, chunks: list[Chunk[Snapshot]] | None = None) -> None:
        self._chunks = chunks or []

    def copy(self) -> History[Snapshot]:
        """An independent copy; snapshots are never changed, so they are shared."""
        return History(list(self._chunks))

    def begin(self, start: int, columns: int, snapshot: Callable[[], Snapshot], continues: bool) -> None:
        """A prefill forward of ``columns`` tokens begins, on a cache of ``start``.

        If that is one too many to keep, two that follow one another become one: of those that ``generate`` has split rather
        than of two that were given apart.
        """
        before = snapshot() if self._chunks else None
        self._chunks.append(Chunk(start, start + columns, before, None, continues))
        if len(self._chunks) > KEPT + 1:
            later = next((i for i, chunk in enumerate(self._chunks) if i and chunk.continues), 1)
            self._chunks[later - 1] = replace(self._chunks[later - 1], end=self._chunks[later].end)
            del self._chunks[later]

    def end(self, length: int) -> None:
        """The latest prefill forward has ended, and the cache holds ``length`` tokens."""
        self._chunks[-1] = replace(self._chunks[-1], end=length)

    def cropped(self, length: int) -> Chunk[Snapshot] | None:
        """The earliest prefill forward that a cache of ``length`` tokens no longer holds; None if it holds all.

        Raises
        ------
        PhaseError
            A part of one was cropped off.
        """
        gone = None
        for chunk in reversed(self._chunks):
            if length >= chunk.end:
                break
            if length > chunk.start or chunk.before is None:
                raise PhaseError(
                    f"The cache was cropped to {length} tokens, or others were dropped from it between two forwards, which is "
                    f"inside what was prefilled from {chunk.start} to {chunk.end}: what its tokens taught can only be forgotten "
                    f"together. Prefill the first {length} tokens alone, copy that cache before more follows, and call "
                    "session.adopt(copy, original); or start a new cache. A cache that drops tokens should do so in update()."
                )
            gone = chunk
        return gone

    def forget(self, first: Chunk[Snapshot]) -> None:
        """Forget one and all that came after it."""
        del self._chunks[self._chunks.index(first) :]

    def select_rows(self, rows: Tensor) -> None:
        """Row b of the batch is row ``rows[b]`` of before. Snapshots are only moved when they are needed."""
        for number, chunk in enumerate(self._chunks):
            if chunk.before is not None:
                moved = rows if chunk.rows is None else chunk.rows[rows.to(chunk.rows.device)]
                self._chunks[number] = replace(chunk, rows=moved)
