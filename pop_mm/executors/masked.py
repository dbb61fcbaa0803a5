"""The reference executor of thresholds: zeroes the entries that do not pass in front of each matrix, and computes everything.

Works wherever a module can be called, however it stores its weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..asking import asking
from ..backends.base import Turns, current_forward
from ..backends.experts import MaskedExperts
from ..experts import Experts
from ..layout import FFN
from ..phase import PhaseTracker
from ..threshold_engine import ThresholdEngine

Changed = tuple[tuple[Any, ...], dict[str, Any]]


class MaskedInputs:
    """Forward pre-hooks on the modules of each record; routed experts are reached through transformers' ExpertsInterface."""

    name = "masked"

    def __init__(self, engine: ThresholdEngine, tracker: PhaseTracker) -> None:
        self._engine = engine
        self._tracker = tracker
        self._turns: dict[nn.Module, Turns[int]] = {}
        self.by_rows: dict[nn.Module, Any] = {}  # whose forwards leave out entries themselves in a fast step
        self._undo: list[Callable[[], object]] = []

    def attach(self, index: int) -> None:
        """Hook record number ``index`` of the engine."""
        record: Any = self._engine.ffns[index]
        if isinstance(record, Experts):
            experts = MaskedThresholdExperts(self._engine, index, self._tracker)
            self._undo.append(experts.detach)
            experts.attach()
            return
        if isinstance(record, FFN):
            self._hook(index, "h", record.down.module)
            for projection in record.inputs:
                self._hook(index, "x", projection.module)
            return
        for module in record.modules:
            self._hook(index, "x", module)

    def _hook(self, index: int, which: str, module: nn.Module) -> None:
        if module in self._turns:  # a module of several layers
            self._turns[module].add(index)
            return
        record: Any = self._engine.ffns[index]
        turns = self._turns[module] = Turns(index)

        tracker, by_rows = self._tracker, self.by_rows
        is_compiling = torch.compiler.is_compiling

        @torch.compiler.disable
        def masked(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Changed | None:
            if asking():  # its norms are being read: these are unit vectors
                return None
            forward = current_forward(tracker, record)
            return (self._engine.mask(turns.next(forward), which, forward, args[0]), *args[1:]), kwargs

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Changed | None:
            if not is_compiling():  # what disable() wraps costs more than this look
                forward = tracker.current
                if forward is not None and forward.fast and (rows := by_rows.get(module)) is not None and rows.alone():
                    return None
            return masked(args, kwargs)

        self._undo.append(module.register_forward_pre_hook(before, with_kwargs=True).remove)

    def detach(self) -> None:
        """Remove the hooks."""
        while self._undo:
            self._undo.pop()()
        self._turns.clear()
        self.by_rows.clear()


class MaskedThresholdExperts(MaskedExperts):
    """Masks what the experts of a layer are given, after the router has seen it whole, and their down projections' inputs."""

    def __init__(self, engine: ThresholdEngine, index: int, tracker: PhaseTracker) -> None:
        super().__init__(engine, index, tracker)
        self._thresholds = engine

    @torch.compiler.disable
    def __call__(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """``[T, H]``, ``[T, k]``, ``[T, k]`` to ``[T, H]``: every forward of the experts."""
        forward = self.forward
        return self._reference(forward, self._thresholds.mask(self._index, "x", forward, hidden), ids, weights)
