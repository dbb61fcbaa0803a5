"""Which class something is: by identity, also for classes that are not imported until they are used."""

from __future__ import annotations

import sys


def same_class(kind: type, known: type | str) -> bool:
    """Whether a class is this one; ``"module:Class"`` names one that may not have been imported, so that nothing is of it."""
    if isinstance(known, str):
        module, _, name = known.partition(":")
        return getattr(sys.modules.get(module), name, None) is kind
    return kind is known


def is_a(kind: type, *known: type | str) -> bool:
    """Whether a class is one of these or a subclass of one."""
    return any(same_class(parent, one) for parent in kind.__mro__ for one in known)
