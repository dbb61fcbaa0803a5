"""Routed experts in place: R, then C of an expert stand first in its weights, and decode runs on narrow views of them."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..decoding.channel_engine import ChannelEngine
from ..decoding.state import FFNState
from ..events import tells
from ..interrupts import uninterrupted
from ..kernels import Matvec
from ..ops.select import choose
from ..tracking.phase import Forward, PhaseTracker
from ..weights.experts import ExpertViews
from .experts import MaskedExperts
from .moved import MovedWeights
from .order import ChannelOrder
from .run_experts import chosen_product, run_experts
from .static import StaticSteps, fixed


class NarrowExperts(MaskedExperts):
    """Reorders the channels of an expert when a decode step first needs it, and decodes on narrow views."""

    _engine: ChannelEngine

    def __init__(
        self,
        engine: ChannelEngine,
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

        self._patches.forward(module, forward)

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

    @property
    def positions(self) -> Tensor | None:
        """``[E, D]``: the position of each original channel; None if all are in their own places."""
        return self._positions

    def forget_resident(self) -> None:
        """Another prompt decodes from now on: every expert has to be placed anew."""
        self._placed.clear()

    @torch.compiler.disable
    def __call__(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """``[T, H]``, ``[T, k]``, ``[T, k]`` to ``[T, H]``: every forward of the experts."""
        forward = self.forward
        if self._is_hooked:
            self.restore()
        elif forward.fast:
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
        if forward.rows > 1 or self._module._is_expert_parallel or not state.all_ready or self._is_hooked:
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


__all__ = ["NarrowExperts"]
