"""Routed experts on both backends, reached through transformers' ExpertsInterface. Routing is never touched.

The interface picks a function by a name in the config. A session puts its own name there; whatever it does not compute
itself it hands on to the implementation that was selected before, with the input of the down projections looked at.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..engine import Engine
from ..errors import SessionError
from ..events import tells
from ..experts import Experts, ExpertViews
from ..interrupts import uninterrupted
from ..kernels import Matvec
from ..layout import linear
from ..ops.select import choose
from ..phase import Forward, PhaseTracker, set_instance_attribute
from ..state import FFNState
from .base import Turns, current_forward
from .moved import MovedWeights
from .order import ChannelOrder
from .static import StaticSteps, fixed

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
    """The reference: the experts as they are, with what is left out zeroed in front of their down projections."""

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
        self._local = threading.local()
        self._undo: list[Callable[[], object]] = []

    def attach(self) -> None:
        """Take over the module. If that fails, :meth:`detach` undoes what was done."""
        module = self._module
        self._undo.append(_select(module.config))
        if module in _HANDLERS:
            _HANDLERS[module].add(self)
        else:
            _HANDLERS[module] = Turns(self)
        self._undo.append(partial(_HANDLERS.pop, module, None))
        if module.has_gate:
            self._activate = own_gate = module._apply_gate

            def gate(gate_up: Tensor) -> Tensor:
                return self._look(own_gate(gate_up))

            self._undo.append(set_instance_attribute(module, "_apply_gate", gate))
        else:
            self._activate = module.act_fn.forward
            hook = module.act_fn.register_forward_hook(lambda _, __, h: self._look(h))
            self._undo.append(hook.remove)

    def detach(self) -> None:
        """Give the module back as it was."""
        while self._undo:
            self._undo.pop()()

    @property
    def forward(self) -> Forward:
        """The forward that the experts run in."""
        return current_forward(self._tracker, self._record)

    @torch.compiler.disable
    def __call__(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """``[T, H]``, ``[T, k]``, ``[T, k]`` to ``[T, H]``: every forward of the experts."""
        return self._reference(self.forward, hidden, ids, weights)

    def _look(self, h: Tensor) -> Tensor:
        between: Callable[[Tensor], Tensor] | None = getattr(self._local, "between", None)
        return h if between is None else between(h)

    def _state(self, forward: Forward) -> FFNState:
        state: FFNState = forward.state.ffns[self._index]
        return state

    def _reference(self, forward: Forward, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """The implementation that was selected before, with the engine's say on the down projections' inputs."""
        before = _SELECTED[id(self._module.config)].before

        def between(order: Tensor | None, h: Tensor) -> Tensor:
            step = self._engine.step(forward, h.device).routed(ids, weights, order, self._record.count)
            return self._engine.apply(self._index, forward, step, h, self._positions)

        if before in (None, "eager"):
            size = self._record.size
            return run_experts(self._record, hidden, ids, weights, lambda e: self._record.views(e, size), between)
        if before == "batched_mm":
            order = None
        else:  # the others run sorted by expert; what runs as one kernel cannot be looked into, so it is replaced
            before, order = "grouped_mm", torch.sort(ids.reshape(-1))[1]
        self._local.between = partial(between, order)
        try:
            return _stock(self._module, before)(hidden, ids, weights)
        finally:
            self._local.between = None


class InplaceExperts(MaskedExperts):
    """Reorders the channels of an expert when a decode step first needs it, and decodes on narrow views."""

    def __init__(
        self,
        engine: Engine,
        index: int,
        tracker: PhaseTracker,
        static: StaticSteps,
        moved: MovedWeights,
        matvec: Matvec | None = None,
    ) -> None:
        super().__init__(engine, index, tracker)
        record = self._record
        self._static = static
        self._matvec = matvec
        self.moved = moved
        self._orders = [
            ChannelOrder(record.size, record.device, partial(moved.exchange, expert=expert))
            for expert in range(record.count)
        ]
        self._placed: set[int] = set()
        self._ranks: dict[int, Tensor] = {}  # [|C|], of each expert's candidates as they stand in the weights
        self._views: dict[int, ExpertViews] = {}
        self._weight: Tensor | None = None  # [E, |C|], of the candidates as they stand in the weights
        self.seconds = 0.0
        self.moved_channels = 0

    def attach(self) -> None:
        """Take over the module. If that fails, :meth:`detach` undoes what was done."""
        super().attach()
        module, static = self._module, self._static

        def forward(*args: Any, **kwargs: Any) -> Tensor:
            if static.active:
                return self._traced(*args, **kwargs)
            return type(module).forward(module, *args, **kwargs)

        self._undo.append(set_instance_attribute(module, "forward", forward))

    def detach(self) -> None:
        """Restore the original order, and give the module back as it was."""
        self.restore()
        super().detach()

    @uninterrupted()
    def restore(self) -> None:
        """Put every channel back."""
        self.forget_resident()
        self.moved.adopt({e: order.position_of for e, order in enumerate(self._orders) if order.moved})
        for order in self._orders:
            order.restore()
        self.moved.release()
        self._positions = None

    def forget_resident(self) -> None:
        """Another prompt decodes from now on: every expert has to be placed anew."""
        self._placed.clear()

    @torch.compiler.disable
    def __call__(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """``[T, H]``, ``[T, k]``, ``[T, k]`` to ``[T, H]``: every forward of the experts."""
        forward = self.forward
        if forward.fast:
            state = self._state(forward)
            if state.all_ready or self._ready(state, ids):
                return self.moved.guarded(self._narrow(forward, state, hidden, ids, weights))
        return self.moved.guarded(self._reference(forward, hidden, ids, weights))

    def _ready(self, state: FFNState, ids: Tensor) -> bool:
        assert state.ready is not None
        flat = ids.reshape(-1)
        return bool(state.ready[flat[flat < self._record.count]].all())

    def _narrow(self, forward: Forward, state: FFNState, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """A decode step on R and C of the experts that it needs."""
        sizes = self._engine.sizes[self._index]

        def views(expert: int) -> ExpertViews:
            if expert not in self._placed:
                self._place(state, expert)
            if expert not in self._views:
                with torch.inference_mode(False), torch.enable_grad():  # views for forwards of every kind
                    self._views[expert] = self._record.views(expert, sizes.width)
            return self._views[expert]

        def between(order: Tensor | None, h: Tensor) -> Tensor:
            if not sizes.candidates:
                return h
            h = h.clone() if h.requires_grad else h
            candidates = h[:, sizes.retained :]
            candidates.scatter_(1, self._choose(forward, candidates, ids, weights, order), 0)
            return h

        alone = len(ids) == 1 and not self._module._is_expert_parallel
        matvec = self._matvec if alone and forward.few else None
        result = run_experts(self._record, hidden, ids, weights, views, between, alone, matvec)
        state.count_tokens(ids if forward.valid is None else ids[forward.valid.reshape(-1)], state.decode_tokens)
        return result

    def prepare_traced(self, forward: Forward) -> bool:
        """Place every expert, if this decode step can be a compiled one: one token, and all experts have partitions."""
        state = self._state(forward)
        if forward.rows > 1 or self._module._is_expert_parallel or not state.all_ready:
            return False
        for expert in range(self._record.count if len(self._placed) < self._record.count else 0):
            if expert not in self._placed:
                self._place(state, expert)
        return True

    def _traced(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """:meth:`_narrow` for one token, traceable: the experts' weights are looked up within the products."""
        sizes, record, experts = self._engine.sizes[self._index], self._record, ids[0]
        views = record.all_views(sizes.width)
        h = self._activate(torch.cat([chosen_product(hidden, *view, experts) for view in views.inputs], -1))
        if sizes.candidates:
            assert self._weight is not None
            candidates = h[:, sizes.retained :]
            dropped = choose(candidates, self._weight[experts], sizes.candidates_dropped)
            h = torch.cat([h[:, : sizes.retained], candidates.scatter(1, dropped, 0)], 1)
        self._static.count(self._index, experts)
        out = chosen_product(h, *views.down, experts)
        if getattr(self._module, "has_post_expert_norm", False):
            out = self._module.post_expert_norm(out)
        return (out * weights[0].unsqueeze(1)).sum(0, keepdim=True).to(hidden.dtype)

    @tells("selection")
    def _choose(
        self, forward: Forward, candidates: Tensor, ids: Tensor, weights: Tensor, order: Tensor | None
    ) -> Tensor:
        """``[N, n]``: which of the candidates (``[N, |C|]``, as they stand in the weights) each slot leaves out."""
        assert self._weight is not None
        own = self._engine.own_choice is not None
        if order is None and not own:  # one token: nothing to share, and the router's weight changes no ranking
            return choose(candidates, self._weight[ids[0]], self._engine.sizes[self._index].candidates_dropped)
        step = self._engine.step(forward, candidates.device).routed(ids, weights, order, self._record.count)
        assert step.expert is not None
        ranks = torch.stack([self._ranks[expert] for expert in step.expert.tolist()]) if own else None
        return self._engine.choose(self._index, forward, step, candidates, self._weight[step.expert], ranks)

    @tells("reordering")
    @uninterrupted()
    def _place(self, state: FFNState, expert: int) -> None:
        """Bring R and C of an expert to the front."""
        started = time.perf_counter()
        assert state.partition is not None and state.candidate_weight is not None
        if self._positions is None or self._weight is None or self._weight.shape != state.candidate_weight.shape:
            with torch.inference_mode(False):  # buffers that may be written in and out of inference mode
                self._positions = torch.stack([order.position_of for order in self._orders])
                self._weight = fixed(torch.zeros_like(state.candidate_weight))
        order, sizes = self._orders[expert], self._engine.sizes[self._index]
        zones = state.partition[expert].zones().cpu().numpy()
        try:
            self.moved_channels += order.place(zones, sizes)
        finally:  # some have moved even where it fails
            self._positions[expert] = order.position_of
        self._ranks[expert] = order.candidate_ranks(zones, sizes)
        self._weight[expert] = state.candidate_weight[expert][self._ranks[expert]]
        self._placed.add(expert)
        self.seconds += time.perf_counter() - started


def chosen_product(x: Tensor, weight: Tensor, bias: Tensor | None, experts: Tensor) -> Tensor:
    """``x[i] @ weight[experts[i]] + bias[experts[i]]``, summed in float32, in a form that the compiler fuses.

    Parameters
    ----------
    x : Tensor
        ``[k, in]``, or ``[1, in]`` for all.
    weight, bias : Tensor
        ``[E, in, out]``, ``[E, out]``.
    experts : Tensor
        ``[k]``.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    out = (x.unsqueeze(2).to(wide) * weight[experts].to(wide)).sum(1).to(x.dtype)
    return out if bias is None else out + bias[experts]


def run_experts(
    record: Experts,
    hidden: Tensor,
    ids: Tensor,
    weights: Tensor,
    views: Callable[[int], ExpertViews],
    between: Callable[[Tensor | None, Tensor], Tensor],
    alone: bool = False,
    matvec: Matvec | None = None,
) -> Tensor:
    """Expert by expert, as the classes' own forwards do it, on any width.

    Parameters
    ----------
    hidden, ids, weights : Tensor
        ``[T, H]``, ``[T, k]``, ``[T, k]``.
    views : callable
        The weights of an expert, all of one width K.
    between : callable
        Takes the slots' flat (token, choice) numbers (None if in that very order) and the inputs of the down
        projections, ``[N, K]``; returns what goes into them.
    alone : bool
        There is one token, and all its experts are on this device: nothing has to be sorted.
    matvec : Matvec, optional
        The compiled kernel, for one token alone.

    Returns
    -------
    Tensor
        ``[T, H]``.
    """
    module: Any = record.module
    if alone:
        order, experts, counts = None, ids[0].tolist(), [1] * ids.shape[1]
        inputs = [hidden] * len(experts)
    else:
        flat = ids.reshape(-1)
        every = torch.bincount(flat, minlength=record.count)[: record.count].tolist()  # another device's are beyond
        experts = [expert for expert, count in enumerate(every) if count]
        if not experts:
            return torch.zeros_like(hidden)
        counts = [every[expert] for expert in experts]
        order = torch.argsort(flat, stable=True)[: sum(counts)]
        tokens = order // ids.shape[1]
        inputs = [hidden[rows] for rows in tokens.split(counts)]
    used = [views(expert) for expert in experts]
    packed = [r for expert in used if (r := expert.rows) and r[0].takes(hidden)] if matvec is not None else []
    compiled = matvec if len(packed) == len(used) else None
    if compiled is not None:
        gate_up = compiled([inward for inward, _ in packed], hidden).view(len(used), -1)
    else:
        gate_up = torch.cat(
            [
                torch.cat([linear(x, *view) for view in expert.inputs], -1)
                for x, expert in zip(inputs, used, strict=True)
            ]
        )
    h = between(order, module._apply_gate(gate_up) if module.has_gate else module.act_fn(gate_up))
    if compiled is not None:
        out = compiled([outward for _, outward in packed], h)
    else:
        out = torch.cat([linear(part, *expert.down) for part, expert in zip(h.split(counts), used, strict=True)])
    if getattr(module, "has_post_expert_norm", False):
        out = module.post_expert_norm(out)
    if order is None:
        return (out * weights[0].unsqueeze(1)).sum(0, keepdim=True).to(hidden.dtype)
    out = out * weights.reshape(-1)[order].unsqueeze(1)
    return torch.zeros_like(hidden).index_add_(0, tokens, out.to(hidden.dtype))


__all__ = ["InplaceExperts", "MaskedExperts", "run_experts"]
