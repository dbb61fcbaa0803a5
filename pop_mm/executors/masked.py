"""The reference executor: zeroes what is left out in front of a matrix, and computes everything. It saves no time.

Works wherever a module can be called, however it stores its weights. Routed experts are reached through transformers'
ExpertsInterface.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from ..decoding.engine import Engine
from ..errors import SessionError
from ..formats.asking import asking
from ..patching import Patches
from ..tracking.phase import Forward, PhaseTracker
from ..weights.exchange import as_integers
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
        self._hidden: weakref.WeakKeyDictionary[Forward, Tensor] = weakref.WeakKeyDictionary()
        self._checks: dict[nn.Module, torch.utils.hooks.RemovableHandle] = {}  # torch runs none after Ctrl-C
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
        if (source := getattr(record, "source", None)) is not None:
            self._patches.hook(source.register_forward_hook(self._keep_hidden))

    def _keep_hidden(self, source: nn.Module, args: Any, output: Any) -> None:
        """Hidden states of all positions, of which an lm_head may be given the last ones alone."""
        forward = self._tracker.current
        if forward is not None and forward.length > 1:
            self._hidden[forward] = output[0]

    def _hook(self, index: int, which: str, module: nn.Module) -> None:
        if module in self._turns:  # a module of several layers
            self._turns[module].add(index)
            return
        engine, tracker, by_rows = self._engine, self._tracker, self.by_rows
        record, turns = engine.ffns[index], Turns(index)
        mask = self._mask_head if record.role == "lm_head" else engine.mask
        self._turns[module] = turns

        is_compiling = torch.compiler.is_compiling

        def masked(args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            if asking():  # its norms are being read: these are unit vectors
                return None
            forward = current_forward(tracker, record)
            found = mask(turns.next(forward), which, forward, args[0])
            if next(reversed(module._forward_pre_hooks)) != handle.id:
                self._hold_to(record.name, module, forward, found)
            return None if found is args[0] else (found, *args[1:])

        untraced = torch.compiler.disable(masked)  # which costs more than a look at the step

        def before(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            if is_compiling():
                return untraced(args)
            forward = tracker.current
            if forward is not None and forward.fast and (rows := by_rows.get(module)) is not None and rows.alone():
                return None
            return masked(args)

        handle = module.register_forward_pre_hook(before)
        self._patches.hook(handle)

    def _mask_head(self, index: int, which: str, forward: Forward, x: Tensor) -> Tensor:
        """:meth:`Engine.mask`; an lm_head that is given the last positions alone is masked as one that is given all."""
        if x.shape[:-1].numel() == forward.rows * forward.length:
            return self._engine.mask(index, which, forward, x)
        hidden = self._hidden.get(forward)
        last = None if hidden is None else hidden[:, hidden.shape[1] - x.shape[-2] :]
        if last is None or last.shape != x.shape or last.dtype != x.dtype or not torch.equal(last, x):
            record: Any = self._engine.ffns[index]
            raise SessionError(
                f"{record.name} was given something else than the last hidden states of a {type(record.source).__name__} (shape "
                f"{tuple(x.shape)}, in a forward of {forward.length} positions), so the prompt's thresholds for it cannot be "
                "taken from those. Leave head_budget out."
            )
        assert hidden is not None
        found = self._engine.mask(index, which, forward, hidden)
        return x if found is hidden else found[:, -x.shape[-2] :]

    def _hold_to(self, name: str, module: nn.Module, forward: Forward, x: Tensor) -> None:
        """Refuse this call of a module if hooks that were added behind the session's give it anything else than ``x``."""
        left, dtype = as_integers(x).clone(), x.dtype

        def check(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self._let_go(module)
            if output is None or self._tracker.current is not forward:  # it failed, or an earlier one did
                return
            now = args[0]
            if now.shape != left.shape or now.dtype != dtype or not torch.equal(as_integers(now), left):
                raise SessionError(
                    f"A forward pre-hook that was added to a {type(module).__name__} of {name} inside the session changes what "
                    "the module is given, behind the session, which chooses what to leave out of it. Remove the hook, leave the "
                    "session, and register it before a new one, which then comes behind the hook."
                )

        self._let_go(module)
        self._checks[module] = module.register_forward_hook(check, prepend=True, always_call=True)

    def _let_go(self, module: nn.Module) -> None:
        if (handle := self._checks.pop(module, None)) is not None:
            handle.remove()

    def detach(self) -> None:
        """Remove the hooks."""
        for module in list(self._checks):
            self._let_go(module)
        self._patches.undo()
        self._turns.clear()
        self.by_rows.clear()


__all__ = ["MaskedExecutor"]
