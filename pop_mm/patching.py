"""The one place that changes a model or a cache: attributes on instances and hooks, undone exactly, the last change first."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import ExitStack
from types import TracebackType
from typing import Any

import torch
from torch import nn

from .errors import SessionError


class Patches:
    """What was put on instances of modules; :meth:`undo` takes all of it back. May be used again after that.

    If a step of undoing fails, the others are done all the same, and its error is raised then.
    """

    def __init__(self) -> None:
        self._stack = ExitStack()

    def replace(self, instance: object, name: str, value: object) -> None:
        """Set an attribute on the instance."""
        had, before = name in instance.__dict__, instance.__dict__.get(name)
        instance.__dict__[name] = value
        self.undo_by(_put_back, instance, name, value, had, before)

    def remove(self, instance: object, name: str) -> None:
        """Take an attribute off the instance, so that its class's shows."""
        self.undo_by(instance.__dict__.__setitem__, name, instance.__dict__.pop(name))

    def forward(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        """Replace a module's forward, on the instance.

        Raises
        ------
        SessionError
            Calls of the module would run past it.
        """
        if (reason := why_not(module)) is not None:
            raise SessionError(
                f"The forward of a {type(module).__name__} cannot be replaced: {reason}. Leave the session and give it "
                "the module as it was before."
            )
        self.replace(module, "forward", forward)

    def hook(self, handle: torch.utils.hooks.RemovableHandle) -> None:
        """A hook that has just been registered."""
        self.undo_by(handle.remove)

    def undo_by(self, undo: Callable[..., object], *args: Any) -> None:
        """Call this, in its turn, to undo a change that was made otherwise."""
        self._stack.callback(undo, *args)

    def undo(self) -> None:
        """Put everything back as it was."""
        self._stack.close()

    def __enter__(self) -> Patches:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()


def _put_back(instance: object, name: str, value: object, had: bool, before: object) -> None:
    if instance.__dict__.get(name) is not value and instance.__dict__.get(f"_old_{name}") is value:
        # accelerate's hooks, added since, call the forward that they found
        instance.__dict__[f"_old_{name}"] = before if had else getattr(type(instance), name).__get__(instance)
    elif had:
        instance.__dict__[name] = before
    else:
        instance.__dict__.pop(name, None)


def why_not(module: nn.Module) -> str | None:
    """Why calls of a module would run past a forward that is put on the instance, or None if they would not."""
    if isinstance(module, torch.jit.ScriptModule):
        return "it is a TorchScript module, whose calls run compiled code"
    if module.__dict__.get("_compiled_call_impl") is not None:
        return "it is compiled (module.compile()), and its calls run the compiled code"
    return None


class _Told:
    """A method of one instance, which it does not keep alive, that tells its first argument after each call."""

    def __init__(self, instance: Any, name: str, told: Callable[[Any], None] | None) -> None:
        self._instance = weakref.ref(instance)
        self._name = name
        self._told = told

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        instance = self._instance()
        result = getattr(type(instance), self._name)(instance, *args, **kwargs)
        if self._told is not None:
            self._told(next(iter((*args, *kwargs.values()))))
        return result

    def __deepcopy__(self, memo: dict[int, Any]) -> _Told:
        return _Told(memo[id(self._instance())], self._name, None)


def tell_calls(instance: object, name: str, told: Callable[[Any], None]) -> None:
    """Call ``told`` with the first argument after every call of a method of its class; a deep copy's calls tell nothing.

    Unlike :class:`Patches`, it does not keep the instance alive, so it suits what comes and goes while a session lasts.
    """
    instance.__dict__[name] = _Told(instance, name, told)


def leave_calls(instance: object, name: str) -> None:
    """Undo :func:`tell_calls`."""
    instance.__dict__.pop(name, None)


__all__ = ["Patches", "leave_calls", "tell_calls", "why_not"]
