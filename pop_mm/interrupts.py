"""Ctrl-C, where half of the work would leave a model that is broken."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Within: Ctrl-C waits for the end. It reaches Python in the main thread alone, so others have nothing to do."""
    own = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(own):
        yield
        return
    waiting: list[tuple[int, FrameType | None]] = []
    signal.signal(signal.SIGINT, lambda *pressed: waiting.append(pressed))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, own)
        if waiting:
            own(*waiting[0])
