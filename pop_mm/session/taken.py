"""Weights that somebody takes from a model inside a session: they are given as the model holds them outside."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from types import FrameType
from typing import Any

import torch
from torch import nn

from ..classes import is_own
from ..patching import Patches

Named = Iterator[tuple[str, Any]]


class TakenWeights:
    """Puts weights back before ``parameters()`` or ``named_parameters()`` gives them to somebody.

    Parameters
    ----------
    backs : mapping of nn.Module to callable
        Puts the weights of a module back, until the next decode step.
    """

    def __init__(self, backs: Mapping[nn.Module, Callable[[], None]]) -> None:
        weights = ((tensor, back) for module, back in backs.items() for tensor in module._parameters.values())
        self._backs = {id(tensor): back for tensor, back in weights if tensor is not None}

    def install(self, modules: Iterable[nn.Module], patches: Patches) -> None:
        """Watch these modules; ``patches`` undoes it."""
        for module in modules if self._backs else ():
            own = module.named_parameters
            named: Any = partial(self._named, own)
            named.__func__ = getattr(own, "__func__", None)  # torch's compiler asks for it
            patches.replace(module, "named_parameters", named)

    def _named(self, own: Callable[..., Named], *args: Any, **kwargs: Any) -> Named:
        named = own(*args, **kwargs)
        return named if torch.compiler.is_compiling() or _only_looks() else self._given_back(named)

    def _given_back(self, named: Named) -> Named:
        for name, parameter in named:
            back = self._backs.get(id(parameter))
            if back is not None:
                back()
            yield name, parameter


def _only_looks() -> bool:
    """Whether this package asks, or torch's compiler: for shapes, dtypes and addresses, as for a report."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and frame.f_globals.get("__name__") == nn.Module.__module__:
        frame = frame.f_back
    asker = "" if frame is None else str(frame.f_globals.get("__name__"))
    return is_own(asker) or asker.startswith("torch._dynamo")


__all__ = ["TakenWeights"]
