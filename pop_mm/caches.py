"""Caches of transformers: which rows of them were exchanged, and how many tokens they hold."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

_ROW_METHODS = ("reorder_cache", "batch_select_indices")  # of a cache: both take the rows that it has from now on


class _RowMethod:
    """A method of one cache that tells which rows it moved; a deep copy of the cache gets one that tells nothing."""

    def __init__(self, cache: Any, name: str, moved: Callable[[Tensor], None] | None) -> None:
        self._cache = weakref.ref(cache)
        self._name = name
        self._moved = moved

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        cache = self._cache()
        result = getattr(type(cache), self._name)(cache, *args, **kwargs)
        if self._moved is not None:
            self._moved(next(iter((*args, *kwargs.values()))))
        return result

    def __deepcopy__(self, memo: dict[int, Any]) -> _RowMethod:
        return _RowMethod(memo[id(self._cache())], self._name, None)


def follow_rows(cache: Any, moved: Callable[[Tensor], None]) -> None:
    """Tell which rows the cache has from now on, whenever they are exchanged."""
    for name in _ROW_METHODS:
        if hasattr(type(cache), name):
            vars(cache)[name] = _RowMethod(cache, name, moved)


def leave_rows(cache: Any) -> None:
    """Undo :func:`follow_rows`."""
    for name in _ROW_METHODS:
        vars(cache).pop(name, None)


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


__all__ = ["follow_rows", "known_length", "leave_rows", "use_cache"]
