"""C sources as shared libraries: those that a wheel ships, else compiled on this machine on first use."""

from __future__ import annotations

import ctypes

from . import compiler, shipped
from .sources import Sources

__all__ = ["Sources", "load"]


def load(sources: Sources) -> ctypes.CDLL | str:
    """The library of some sources, or why there is none.

    A shipped library of exactly these sources comes first, in the best variant that the processor runs. Without one,
    the machine's own compiler makes the library.
    """
    found = shipped.load(sources)
    if isinstance(found, ctypes.CDLL):
        return found
    made = compiler.load(sources)
    return f"{found}; a compiler: {made}" if isinstance(made, str) and found is not None else made
