"""Methods: what the prefill must remember, and what a decode step may leave out. One file each."""

from __future__ import annotations

from .base import Abouts, ChannelMethod, Method, chosen_method, get_method, register_method, unregister_method
from .fixed import Griffin, Magnitude, Random, WandaSp
from .full import Full
from .pop import Pop
from .static import Static
from .thresholds import Thresholds

for _method in (Static, Pop, Full, Thresholds, WandaSp, Magnitude, Griffin, Random):  # in the order of tables
    register_method(_method)
METHODS = Abouts()

__all__ = [
    "METHODS",
    "ChannelMethod",
    "Full",
    "Griffin",
    "Magnitude",
    "Method",
    "Pop",
    "Random",
    "Static",
    "Thresholds",
    "WandaSp",
    "chosen_method",
    "get_method",
    "register_method",
    "unregister_method",
]
