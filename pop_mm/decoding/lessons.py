"""What decode steps taught about experts without a partition, so that it can be unlearned when their tokens are cropped off."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from ..errors import PhaseError
from ..tracking.step import Step

if TYPE_CHECKING:
    from .state import FFNState

_KEPT = 32  # that are learned again at most, to unlearn others


@dataclass(frozen=True)
class Lesson:
    """What one forward of decode steps taught.

    Attributes
    ----------
    before : FFNState or None
        What was known before it; None if the lessons before it tell.
    h : Tensor
        ``[N, D]``, activations in original channel order.
    step : Step
        Of those tokens.
    start, end : int
        Tokens that the cache held before and after the forward.
    """

    before: FFNState | None
    h: Tensor
    step: Step
    start: int
    end: int

    def up_to(self, length: int) -> Lesson:
        """The same from the tokens that a cache of ``length`` still holds."""
        kept = (self.step.column < length - self.start).nonzero().squeeze(1)
        return Lesson(self.before, self.h[kept], self.step[kept], self.start, min(self.end, length))


class Lessons:
    """The latest decode steps that the units of one FFN have learned from, in order.

    Lessons are unlearned by going back to what was known before one, and learning again what is still in the cache. So every 32nd
    lesson of single steps, and every forward of several, comes with what was known before; the first and the latest two of these
    are kept, and the lessons since the latter.
    """

    def __init__(self, lessons: list[Lesson] | None = None, lost: int = 0, first: Lesson | None = None) -> None:
        self._lessons = lessons or []
        self._lost = lost  # tokens of the cache up to which lessons are no longer kept
        self._first = first  # an answer is often cropped off as a whole

    def copy(self) -> Lessons:
        """An independent copy."""
        return Lessons(list(self._lessons), self._lost, self._first)

    def none(self) -> Lessons:
        """Of a cache whose lessons so far cannot be unlearned."""
        return Lessons(lost=self.taught_until)

    @property
    def taught_until(self) -> int:
        """Tokens that the cache held after the latest lesson; 0 before the first."""
        return self._lessons[-1].end if self._lessons else self._lost

    def remember(self, snapshot: Callable[[], FFNState], h: Tensor, step: Step, start: int) -> None:
        """Before a lesson: keep what it takes to unlearn it."""
        known = [number for number, lesson in enumerate(self._lessons) if lesson.before is not None]
        before = None
        if not known or step.length > 1 or len(self._lessons) - known[-1] >= _KEPT:
            before = snapshot()
            if len(known) > 1:
                self._lost = self._lessons[known[1] - 1].end
                del self._lessons[: known[1]]
        lesson = Lesson(before, h, step, start, start + step.length)
        if not self.taught_until:
            self._first = lesson
        self._lessons.append(lesson)

    def _is_before_all(self, length: int) -> bool:
        """Whether a cache of ``length`` tokens holds none that taught anything."""
        return self._first is not None and length <= self._first.start

    def check_crop(self, length: int) -> None:
        """Raise :class:`PhaseError` if a cache of ``length`` tokens has lost lessons that are no longer kept."""
        if length < self._lost and not self._is_before_all(length):
            raise PhaseError(
                f"The cache was cropped to {length} tokens, but what experts without a partition learned from its decode steps "
                f"can only be forgotten from token {self._lost} on. Copy the cache before these steps and call "
                "session.adopt(copy, original), or start a new cache."
            )

    def cropped(self, length: int) -> tuple[FFNState, list[Lesson]] | None:
        """What to go back to, and what to learn again, for a cache of ``length`` tokens; None if it holds every lesson.

        The lessons to learn again are forgotten here: :meth:`remember` or :meth:`keep` them.
        """
        if not self._lessons or length >= self._lessons[-1].end:
            return None
        if self._is_before_all(length):
            assert self._first is not None and self._first.before is not None
            before = self._first.before
            self._lessons, self._lost, self._first = [], 0, None
            return before, []
        first = next(number for number, lesson in enumerate(self._lessons) if lesson.end > length)
        first = max(number for number, lesson in enumerate(self._lessons[: first + 1]) if lesson.before is not None)
        again = [lesson.up_to(length) for lesson in self._lessons[first:]]
        del self._lessons[first:]
        assert again[0].before is not None
        return again[0].before, [lesson for lesson in again if len(lesson.h)]

    def keep(self, lesson: Lesson) -> None:
        """A lesson that is learned again."""
        self._lessons.append(lesson)
