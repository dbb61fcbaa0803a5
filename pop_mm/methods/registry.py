"""Names for classes that users may add to: methods and scorers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from typing import Generic, TypeVar

from ..errors import ConfigError

T = TypeVar("T")


class Registry(Mapping[str, type[T]], Generic[T]):
    """Classes by their ``name``, in the order in which they were registered.

    Parameters
    ----------
    what : str
        What they are, for errors: "method".
    kind : type
        Their base class.
    other : sequence of str
        Names that stand for something else in the same place.
    """

    def __init__(self, what: str, kind: type[T], other: Sequence[str] = ()) -> None:
        self._what = what
        self._kind = kind
        self._other = other
        self._classes: dict[str, type[T]] = {}

    def check_free(self, cls: type[T]) -> None:
        """Raise :class:`ConfigError` if the name of a class is taken."""
        name: str = cls.name  # type: ignore[attr-defined]
        if name in self._classes or name in (*self._other, "dense"):
            raise ConfigError(f"A {self._what} named {name!r} exists; choose another name.")

    def register(self, cls: type[T]) -> None:
        """Make a class available. A name that is taken is an error."""
        self.check_free(cls)
        self._classes[cls.name] = cls  # type: ignore[attr-defined]

    def unregister(self, name: str) -> None:
        """Forget a class."""
        self._classes.pop(name, None)

    def get_instance(self, wanted: str | T) -> T:
        """One of the class of that name, or the instance itself.

        Raises
        ------
        ConfigError
            There is none; a misspelt name is put right.
        """
        if isinstance(wanted, self._kind):
            return wanted
        if isinstance(wanted, str) and wanted in self._classes:
            return self._classes[wanted]()
        close = get_close_matches(str(wanted), self._classes, 1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        known = ", ".join((*self._other, *self._classes))
        raise ConfigError(f"Unknown {self._what} {wanted!r}; known: {known}.{hint}")

    def __getitem__(self, name: str) -> type[T]:
        return self._classes[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._classes)

    def __len__(self) -> int:
        return len(self._classes)


__all__ = ["Registry"]
