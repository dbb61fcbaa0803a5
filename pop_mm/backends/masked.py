"""The reference backend: zeroes what is left out in front of the down projection. Works wherever a module can be called.

It saves no time: every channel is still computed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..asking import asking
from ..engine import Engine
from ..experts import Experts
from ..phase import PhaseTracker
from .base import Turns, apply, current_forward, dense_ffn
from .experts import MaskedExperts


class MaskedBackend:
    """One forward pre-hook on each down projection, wherever and however that stores its weights.

    Routed experts are reached through transformers' ExpertsInterface.
    """

    name = "masked"

    def __init__(self, engine: Engine, tracker: PhaseTracker) -> None:
        self._engine = engine
        self._tracker = tracker
        self._turns: dict[nn.Module, Turns[int]] = {}
        self._undo: list[Callable[[], object]] = []

    def attach(self, index: int) -> None:
        """Hook FFN number ``index`` of the engine."""
        if isinstance(self._engine.ffns[index], Experts):
            experts = MaskedExperts(self._engine, index, self._tracker)
            self._undo.append(experts.detach)
            experts.attach()
            return
        ffn = dense_ffn(self._engine, index)
        module = ffn.down.module
        if module in self._turns:
            self._turns[module].add(index)
            return
        turns = self._turns[module] = Turns(index)

        @torch.compiler.disable
        def before_down(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            if asking():  # its norms are being read: these are unit vectors
                return args, kwargs
            forward = current_forward(self._tracker, ffn)
            return (apply(self._engine, turns.next(forward), forward, args[0], None), *args[1:]), kwargs

        self._undo.append(module.register_forward_pre_hook(before_down, with_kwargs=True).remove)

    def detach(self) -> None:
        """Remove the hooks."""
        while self._undo:
            self._undo.pop()()
        self._turns.clear()
