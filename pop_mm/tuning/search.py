"""Bisection over a few candidates."""

from __future__ import annotations

from collections.abc import Callable, Sequence


def first_that_holds(candidates: Sequence[float], holds: Callable[[float], bool]) -> float | None:
    """The first candidate that holds, where all after one that holds do too; None if not even the last one does.

    Asks ``ceil(log2(n + 1))`` times at most, of n candidates.
    """
    low, high = 0, len(candidates)  # the answer is one of low ... high; high = n stands for none
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(candidates[middle]) else (middle + 1, high)
    return candidates[low] if low < len(candidates) else None


def most_questions(count: int) -> int:
    """How often :func:`first_that_holds` asks at most, of ``count`` candidates."""
    return count.bit_length()


__all__ = ["first_that_holds", "most_questions"]
