"""How the thread that answers tells the thread that asks about every token, and how the latter stops it."""

from __future__ import annotations

import queue
import threading
from typing import Any

import torch
from torch import Tensor

from ..cli.generate import Clock


class Run:
    """What the two threads share.

    Attributes
    ----------
    events : SimpleQueue
        ``("dense" or "pruned", list of new token ids)``, the :class:`Stream` instead of ids when that answer is complete, a
        ``Report``, an ``Exception``, or how many questions come first; at the end None.
    stop : Event
        Set when nobody reads on, or wants to.
    """

    def __init__(self, stop: threading.Event | None = None) -> None:
        self.events: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.stop = stop or threading.Event()


class Stream(Clock):
    """A streamer that passes new tokens on; text is made of them elsewhere, so that it does not cost decode time."""

    def __init__(self, run: Run, which: str) -> None:
        super().__init__()
        self._run, self._which = run, which

    def put(self, value: Tensor) -> None:
        """A token, or at first the prompt."""
        super().put(value)
        if len(self.times) > 1:
            self._run.events.put((self._which, value.tolist()))


class Stop:
    """A stopping criterion: the wish of the thread that asks."""

    def __init__(self, run: Run) -> None:
        self._stop = run.stop

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        """Whether to stop, for every row."""
        return torch.full((len(input_ids),), self._stop.is_set(), device=input_ids.device)
