"""A line in front of a model that can do one thing at a time: who came first goes first."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_LOOK = 0.2  # seconds between looks whether somebody who waits has given up


class FullError(Exception):
    """Too many wait already."""


class Line:
    """Lets one in at a time, in the order of arrival.

    Parameters
    ----------
    most : int
        How many may wait behind the one that is in.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._tickets: deque[object] = deque()
        self._moved = threading.Condition()

    @property
    def busy(self) -> bool:
        """Whether somebody is in, or waits."""
        return bool(self._tickets)

    @contextmanager
    def turn(
        self, given_up: Callable[[], bool] = lambda: False, tell: Callable[[int], object] = lambda before: None
    ) -> Iterator[bool]:
        """Wait for one's turn, which lasts as long as the block.

        Parameters
        ----------
        given_up : callable
            Asked while waiting.
        tell : callable
            Told how many come before, whenever that changes; not called where nobody does.

        Yields
        ------
        bool
            False after having given up: it is not one's turn.

        Raises
        ------
        FullError
            The line is full.
        """
        ticket = object()
        with self._moved:
            if len(self._tickets) > self._most:
                raise FullError(f"{self._most} wait already.")
            self._tickets.append(ticket)
        try:
            yield self._wait(ticket, given_up, tell)
        finally:
            with self._moved:
                self._tickets.remove(ticket)
                self._moved.notify_all()

    def _wait(self, ticket: object, given_up: Callable[[], bool], tell: Callable[[int], object]) -> bool:
        told = 0
        with self._moved:
            while not given_up():
                before = self._tickets.index(ticket)
                if before != told:
                    tell(before)
                    told = before
                if not before:
                    return True
                self._moved.wait(_LOOK)
        return False
