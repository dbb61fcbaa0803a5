"""What several executors need."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any, Generic, TypeVar, cast

from torch import Tensor, nn

from ..decoding.engine import Engine
from ..errors import PhaseError
from ..tracking.phase import Forward, PhaseTracker
from ..weights.layout import FFN

T = TypeVar("T")


class Turns(Generic[T]):
    """Whose turn it is where several layers call one module: in each forward they do so in the order of the layers."""

    def __init__(self, first: T) -> None:
        self._users = [first]
        self._calls: weakref.WeakKeyDictionary[Forward, int] = weakref.WeakKeyDictionary()

    @property
    def first(self) -> T:
        """Of the first layer."""
        return self._users[0]

    def add(self, user: T) -> None:
        """The next layer that calls the module."""
        self._users.append(user)

    def next(self, forward: Forward) -> T:
        """Who calls now."""
        if len(self._users) == 1:
            return self._users[0]
        calls = self._calls.get(forward, 0)
        self._calls[forward] = calls + 1
        return self._users[calls % len(self._users)]


def current_forward(tracker: PhaseTracker, record: Any) -> Forward:
    """The forward that a record runs in. One that was called past the model cannot be attributed."""
    forward = tracker.current
    if forward is None:
        raise PhaseError(
            f"{record.name} ran outside a forward of the pruned model (a part of the model was called directly), so it is "
            "unknown whether this is prefill or decode. Call the model that was given to prune(), or leave the session first."
        )
    return forward


def dense_ffn(engine: Engine, index: int) -> FFN:
    """Number ``index`` of the FFNs, which is not a set of experts."""
    return cast(FFN, engine.ffns[index])


def hooks_of(modules: Iterable[nn.Module]) -> list[dict[int, Any]]:
    """The forward hooks and pre-hooks of modules: the dicts themselves, so that they tell later ones too."""
    return [hooks for m in dict.fromkeys(modules) for hooks in (m._forward_hooks, m._forward_pre_hooks)]


def hooks_on_parts(ffn: FFN) -> list[dict[int, Any]]:
    """Hooks on the parts of an FFN, which see its channels, and run only if the parts are called one by one."""
    parts = [*ffn.modules, *([] if ffn.activation is None else [ffn.activation])]
    if ffn.holder is not None:
        parts += [part for part in ffn.holder.modules() if part is not ffn.holder]
    return hooks_of(parts)


def voices(forward: Forward) -> Tensor | None:
    """Which sequences of a step of one token each have a say in a choice that they share, ``[B]``; None for all, or one alone."""
    return None if forward.valid is None or forward.rows == 1 else forward.valid[:, 0]
