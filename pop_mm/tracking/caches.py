"""Caches of transformers: which rows of them were exchanged, and how many tokens they hold."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from ..patching import leave_calls, tell_calls

CACHE_NAMES = ("cache", "past_key_values")  # among arguments and outputs: of transformers 5.24 and later, and before
_ROW_METHODS = ("reorder_cache", "batch_select_indices")  # of a cache: both take the rows that it has from now on


def follow_rows(cache: Any, moved: Callable[[Tensor], None]) -> None:
    """Tell which rows the cache has from now on, whenever they are exchanged."""
    for name in _ROW_METHODS:
        if hasattr(type(cache), name):
            tell_calls(cache, name, moved)


def leave_rows(cache: Any) -> None:
    """Undo :func:`follow_rows`."""
    for name in _ROW_METHODS:
        leave_calls(cache, name)


def cache_in(inputs: Mapping[str, Any]) -> Any:
    """The cache among a forward's arguments; None without one."""
    return next((cache for name in CACHE_NAMES if (cache := inputs.get(name)) is not None), None)


def cache_of(output: Any) -> Any:
    """The cache that a forward or ``generate`` returned; None if it returned none."""
    return next((cache for name in CACHE_NAMES if (cache := getattr(output, name, None)) is not None), None)


def cache_name(call: Callable[..., Any]) -> str:
    """The name of the cache among the arguments of a forward, or of what takes any arguments."""
    return CACHE_NAMES[CACHE_NAMES[0] not in inspect.signature(call).parameters]


def use_cache(model: nn.Module, inputs: dict[str, Any]) -> bool:
    """Whether a forward with these inputs makes or continues a cache."""
    use = inputs.get("use_cache")
    return bool(getattr(model.config, "use_cache", True) if use is None else use)


def known_length(cache: Any) -> int | None:
    """Tokens that a cache holds, or None if asking would wait for an accelerator (a static cache counts on its device)."""
    length = cache.get_seq_length()
    if isinstance(length, Tensor) and length.device.type != "cpu":
        return None
    return int(length)


__all__ = [
    "CACHE_NAMES",
    "cache_in",
    "cache_name",
    "cache_of",
    "follow_rows",
    "known_length",
    "leave_rows",
    "use_cache",
]
