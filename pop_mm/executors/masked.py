"""The reference executor: zeroes what is left out in front of a matrix, and computes everything. It saves no time.

Works wherever a module can be called, however it stores its weights. Routed experts are reached through transformers'
ExpertsInterface.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..asking import asking
from ..engine import Engine
from ..patching import Patches
from ..phase import PhaseTracker
from .base import Turns, current_forward
from .experts import MaskedExperts


class MaskedExecutor:
    """One forward pre-hook on each module whose input the method masks.

    Attributes
    ----------
    by_rows : dict
        Module -> what leaves out its entries itself in a fast step.
    """

    name = "masked"

    def __init__(self, engine: Engine, tracker: PhaseTracker) -> None:
        self._engine = engine
        self._tracker = tracker
        self._turns: dict[nn.Module, Turns[int]] = {}
        self.by_rows: dict[nn.Module, Any] = {}
        self._patches = Patches()

    def attach(self, index: int) -> None:
        """Hook record number ``index`` of the engine."""
        record: Any = self._engine.ffns[index]
        if record.experts is not None:
            experts = MaskedExperts(self._engine, index, self._tracker)
            self._patches.undo_by(experts.detach)
            experts.attach()
            return
        for which in self._engine.masks:
            for module in record.by_input.get(which, ()):
                self._hook(index, which, module)

    def _hook(self, index: int, which: str, module: nn.Module) -> None:
        if module in self._turns:  # a module of several layers
            self._turns[module].add(index)
            return
        engine, tracker, by_rows = self._engine, self._tracker, self.by_rows
        record, turns = engine.ffns[index], Turns(index)
        self._turns[module] = turns

        is_compiling = torch.compiler.is_compiling

        @torch.compiler.disable
        def masked(args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            if asking():  # its norms are being read: these are unit vectors
                return None
            forward = current_forward(tracker, record)
            found = engine.mask(turns.next(forward), which, forward, args[0])
            return None if found is args[0] else (found, *args[1:])

        def before(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            if not is_compiling():  # what disable() wraps costs more than this look
                forward = tracker.current
                if forward is not None and forward.fast and (rows := by_rows.get(module)) is not None and rows.alone():
                    return None
            return masked(args)

        self._patches.hook(module.register_forward_pre_hook(before))

    def detach(self) -> None:
        """Remove the hooks."""
        self._patches.undo()
        self._turns.clear()
        self.by_rows.clear()


__all__ = ["MaskedExecutor"]
