"""Routed experts, reached through transformers' ExpertsInterface. Routing is never touched.

The interface picks a function by a name in the config. A session puts its own name there; whatever it does not compute
itself it hands on to the implementation that was selected before, with the input of the down projections looked at.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..decoding.engine import Engine
from ..decoding.state import FFNState
from ..errors import SessionError
from ..patching import Patches
from ..tracking.phase import Forward, PhaseTracker
from ..weights.experts import Experts
from ..weights.layout import linear
from .base import Turns, current_forward, hooks_of
from .run_experts import run_experts

IMPLEMENTATION = "pop_mm"
_HANDLERS: weakref.WeakKeyDictionary[nn.Module, Turns[MaskedExperts]] = weakref.WeakKeyDictionary()
_LOCK = threading.Lock()


@dataclass
class _Selection:
    """A config whose implementation is ours for now."""

    config: Any
    before: str | None
    users: int = 0


_SELECTED: dict[int, _Selection] = {}


def _dispatch(module: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    """What transformers calls for every module whose config names :data:`IMPLEMENTATION`."""
    turns = _HANDLERS.get(module)
    if turns is not None:
        return turns.next(turns.first.forward)(*args, **kwargs)
    selection = _SELECTED.get(id(module.config))
    if selection is None:
        raise SessionError(
            "This model was copied while the original was being pruned, so its config names an experts implementation that "
            "only the session provides. Copy it outside the session, or call model.set_experts_implementation(...)."
        )
    return _stock(module, selection.before)(*args, **kwargs)  # another model with the same config


def _stock(module: nn.Module, name: str | None) -> Callable[..., Tensor]:
    """An implementation of transformers, bound to the module."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    eager = type(module).forward.__wrapped__  # type: ignore[attr-defined]
    return partial(ALL_EXPERTS_FUNCTIONS.get_interface(name, eager), module)


def _select(config: Any) -> Callable[[], None]:
    """Name our implementation in a config; returns what puts back the one before, once nobody uses ours any more."""
    from transformers.integrations.moe import ExpertsInterface

    ExpertsInterface.register(IMPLEMENTATION, _dispatch)
    with _LOCK:
        selection = _SELECTED.setdefault(id(config), _Selection(config, config._experts_implementation))
        selection.users += 1
        config._experts_implementation_internal = IMPLEMENTATION

    def undo() -> None:
        with _LOCK:
            selection.users -= 1
            if not selection.users:
                config._experts_implementation_internal = selection.before
                del _SELECTED[id(config)]

    return undo


class MaskedExperts:
    """The reference: the experts as they are, with what is left out zeroed in front of their matrices. The router sees it all."""

    def __init__(self, engine: Engine, index: int, tracker: PhaseTracker) -> None:
        record = engine.ffns[index]
        assert isinstance(record, Experts)
        self._engine = engine
        self.events = engine.events
        self._index = index
        self._record = record
        self._module: Any = record.module
        self._tracker = tracker
        self._positions: Tensor | None = (
            None  # [E, D]: where each expert's original channels are, if not in their own places
        )
        self._activate: Callable[[Tensor], Tensor]  # what is between the projections
        activation = getattr(self._module, "act_fn", None)
        self._hooks = hooks_of([activation] if isinstance(activation, nn.Module) else [])
        self._own_hooks = 0
        self._local = threading.local()
        self._patches = Patches()

    def attach(self) -> None:
        """Take over the module. If that fails, :meth:`detach` undoes what was done."""
        module = self._module
        self._patches.undo_by(_select(module.config))
        if module in _HANDLERS:
            _HANDLERS[module].add(self)
        else:
            _HANDLERS[module] = Turns(self)
        self._patches.undo_by(_HANDLERS.pop, module, None)
        if module.has_gate:
            self._activate = own_gate = module._apply_gate

            def gate(gate_up: Tensor) -> Tensor:
                return self._look(own_gate(gate_up))

            self._patches.replace(module, "_apply_gate", gate)
        else:
            self._activate = module.act_fn.forward
            self._patches.hook(module.act_fn.register_forward_hook(lambda _, __, h: self._look(h)))
            self._own_hooks = 1

    def detach(self) -> None:
        """Give the module back as it was."""
        self._patches.undo()

    @property
    def _is_hooked(self) -> bool:
        """Whether somebody else has hooks on the activation, which see the channels."""
        return sum(map(len, self._hooks)) != self._own_hooks

    @property
    def forward(self) -> Forward:
        """The forward that the experts run in."""
        return current_forward(self._tracker, self._record)

    @torch.compiler.disable
    def __call__(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """``[T, H]``, ``[T, k]``, ``[T, k]`` to ``[T, H]``: every forward of the experts."""
        forward = self.forward
        return self._reference(forward, self._engine.mask(self._index, "x", forward, hidden), ids, weights)

    def _look(self, h: Tensor) -> Tensor:
        between: Callable[[Tensor], Tensor] | None = getattr(self._local, "between", None)
        return h if between is None else between(h)

    def _state(self, forward: Forward) -> FFNState:
        state: FFNState = forward.state.ffns[self._index]
        return state

    def _product(self, hidden: Tensor) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
        """What multiplies inputs of experts with their weights, expert by expert."""
        return linear

    def _reference(self, forward: Forward, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """The implementation that was selected before, with the engine's say on the down projections' inputs."""
        before = _SELECTED[id(self._module.config)].before
        if self._module._is_expert_parallel and torch.is_grad_enabled() and hidden.requires_grad:
            raise SessionError(
                f"With gradients, tokens of {self._record.name} are sent to the process that has their expert, so it is unknown "
                "which token an expert sees. Call the model under torch.no_grad()."
            )

        def between(order: Tensor | None, h: Tensor) -> Tensor:
            step = self._engine.step(forward, h.device).routed(ids, weights, order, self._record.count)
            return self._engine.apply(self._index, forward, step, h, self._positions)

        product = self._product(hidden)
        if before in (None, "eager") or product is not linear:
            views = partial(self._record.views, width=self._record.held)
            return run_experts(self._record, hidden, ids, weights, views, between, product=product)
        if before == "batched_mm":
            order = None
        else:  # the others run sorted by expert; what runs as one kernel cannot be looked into, so it is replaced
            before, order = "grouped_mm", torch.sort(ids.reshape(-1))[1]
        self._local.between = partial(between, order)
        try:
            return _stock(self._module, before)(hidden, ids, weights)
        finally:
            self._local.between = None


__all__ = ["IMPLEMENTATION", "MaskedExperts"]
