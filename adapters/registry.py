"""Which adapter serves which ``config.model_type``."""

from __future__ import annotations

from collections.abc import Callable
from difflib import get_close_matches
from functools import cache
from importlib import metadata
from typing import TYPE_CHECKING, TypeVar

from pop_mm.errors import AdapterError

if TYPE_CHECKING:
    from .base import Adapter

_ADAPTERS: dict[str, type[Adapter]] = {}
SHIPPED: dict[str, type[Adapter]] = {}  # those of pop_mm itself, once all its tables are loaded
_ENTRY_POINTS = "pop_mm.adapters"
A = TypeVar("A", bound="type[Adapter]")


def register_adapter(*model_types: str) -> Callable[[A], A]:
    """Class decorator: serve these ``config.model_type`` values with this adapter.

    Raises
    ------
    AdapterError
        The class is no :class:`~pop_mm.adapters.Adapter`, or a model type is served already (``unregister_adapter`` it
        first).
    """

    def register(cls: A) -> A:
        from .base import Adapter

        if not (isinstance(cls, type) and issubclass(cls, Adapter)):
            raise AdapterError(f"register_adapter needs a subclass of pop_mm.adapters.Adapter; got {cls!r}.")
        if not model_types or not all(isinstance(name, str) and name for name in model_types):
            raise AdapterError("register_adapter needs at least one model type, e.g. @register_adapter('my_model').")
        for name in model_types:
            if name in _ADAPTERS and _ADAPTERS[name] is not cls:
                raise AdapterError(
                    f"The model type {name!r} is served by {_ADAPTERS[name].__name__} already; call "
                    f"unregister_adapter({name!r}) first to replace it."
                )
        for name in model_types:
            _ADAPTERS[name] = cls
        return cls

    return register


def unregister_adapter(model_type: str) -> None:
    """Forget the adapter of one model type. An unknown one is an error."""
    if _ADAPTERS.pop(model_type, None) is None:
        raise AdapterError(f"No adapter is registered for the model type {model_type!r}.{suggestion(model_type)}")


@cache
def entry_points(group: str) -> tuple[metadata.EntryPoint, ...]:
    """Those of the packages that are installed now; to look for them takes milliseconds at every session."""
    return tuple(metadata.entry_points(group=group))


def registered_adapters() -> dict[str, type[Adapter]]:
    """Model type -> adapter class, sorted, with those of the entry point group ``pop_mm.adapters``.

    An entry point of an installed package is named after its model type. It does not replace an adapter that is
    registered already.
    """
    for entry in entry_points(group=_ENTRY_POINTS):
        if entry.name in _ADAPTERS:
            continue
        try:
            cls = entry.load()
        except Exception as error:
            raise AdapterError(
                f"The adapter that an installed package offers for {entry.name!r} ({entry.value}) cannot be loaded: "
                f"{type(error).__name__}: {error}. Repair or uninstall that package."
            ) from error
        register_adapter(entry.name)(cls)
    return dict(sorted(_ADAPTERS.items()))


def is_shipped(model_type: object, adapter: Adapter) -> bool:
    """Whether pop_mm itself serves this model type with this adapter."""
    return isinstance(model_type, str) and SHIPPED.get(model_type) is type(adapter)


def suggestion(model_type: str) -> str:
    """A " Did you mean ...?" for a misspelt model type, or nothing."""
    close = get_close_matches(model_type, _ADAPTERS, 1, cutoff=0.8)
    return f" Did you mean {close[0]!r}?" if close else ""
