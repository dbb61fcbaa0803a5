"""Which class something is: by identity, also for classes that are not imported until they are used; and whose code it runs."""

from __future__ import annotations

import sys


def is_own(module: str) -> bool:
    """Whether a module of this name is one of pop_mm's."""
    return module.partition(".")[0] == __package__


def same_class(kind: type, known: type | str) -> bool:
    """Whether a class is this one; ``"module:Class"`` names one that may not have been imported, so that nothing is of it."""
    if isinstance(known, str):
        module, _, name = known.partition(":")
        return getattr(sys.modules.get(module), name, None) is kind
    return kind is known


def is_a(kind: type, *known: type | str) -> bool:
    """Whether a class is one of these or a subclass of one."""
    return any(same_class(parent, one) for parent in kind.__mro__ for one in known)


def has_own_forward(kind: type) -> bool:
    """Whether a class of modules computes what was written for it: its forward is a function of the module that defines it.

    Libraries and experiments put other functions there for all instances (``nn.Linear.forward = ...``).
    """
    home = next((parent for parent in kind.__mro__ if "forward" in vars(parent)), kind)
    module = sys.modules.get(home.__module__)
    return module is None or getattr(vars(home).get("forward"), "__globals__", None) is vars(module)
