"""What a session does besides the model's own arithmetic, told to one listener: a clock, say.

Nobody listens as a rule, so that an event costs a look at an attribute.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal, Protocol, TypeVar

Part = Literal["statistics", "partition", "selection", "reordering"]
F = TypeVar("F", bound=Callable[..., Any])


class Listener(Protocol):
    """Is told when a part begins and when the part that began last ends; parts may lie within each other."""

    def push(self, part: str) -> None:
        """A part begins."""

    def pop(self) -> None:
        """The part that began last ends."""

    def now(self) -> float:
        """Seconds on a clock, once the device has done what it was given."""

    def took(self, part: str, seconds: float) -> None:
        """A part within the one that runs took so long: for parts of a few operations, which :meth:`push` would outweigh."""


class Events:
    """Of one session.

    Attributes
    ----------
    listener : Listener or None
        Set it before the prompt that is to be listened to.
    """

    def __init__(self) -> None:
        self.listener: Listener | None = None

    def told(self, part: Part, function: F) -> F:
        """The function as a part, if somebody listens now; the function itself if not."""
        listener = self.listener
        if listener is None:
            return function

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            listener.push(part)
            try:
                return function(*args, **kwargs)
            finally:
                listener.pop()

        return call  # type: ignore[return-value]

    def told_briefly(self, part: Part, function: F) -> F:
        """As :meth:`told`, for a part of a few operations."""
        listener = self.listener
        if listener is None:
            return function

        @functools.wraps(function)
        def call(*args: Any) -> Any:
            started = listener.now()
            found = function(*args)
            listener.took(part, listener.now() - started)
            return found

        return call  # type: ignore[return-value]


def tells(part: Part) -> Callable[[F], F]:
    """Decorator of a method whose object has ``events``: it is a part of the session's work."""

    def decorate(method: F) -> F:
        @functools.wraps(method)
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            if self.events.listener is None:
                return method(self, *args, **kwargs)
            return self.events.told(part, method)(self, *args, **kwargs)

        return call  # type: ignore[return-value]

    return decorate


__all__ = ["Events", "Listener", "tells"]
