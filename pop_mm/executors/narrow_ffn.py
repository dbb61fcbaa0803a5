"""One dense FFN in place: the order of its channels, and the forwards that decode on narrow views of its weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..decoding.state import PromptState
from ..interrupts import uninterrupted
from ..partition import Partition
from ..patching import Patches
from ..tracking.phase import Forward
from ..weights.layout import Projection, linear
from .base import current_forward, dense_ffn, hooks_on_parts, voices
from .direct import direct_forward, direct_forward_fits, down_input, static_linear
from .fused import compiled_forward, triton_forward
from .moved import MovedWeights
from .order import ChannelOrder
from .packing import PackedDown
from .scaled import narrow_forward

if TYPE_CHECKING:
    from .narrow import NarrowExecutor


class _Placed(NamedTuple):
    """A partition whose R and C stand at the front of an FFN's weights, and the ``ranks`` of its candidates there."""

    partition: Partition
    ranks: Tensor


class NarrowFFN:
    """FFN number ``index`` of an executor's engine.

    Attributes
    ----------
    moved : MovedWeights
    order : ChannelOrder
    down : PackedDown
    """

    def __init__(self, executor: NarrowExecutor, index: int) -> None:
        self._executor = executor
        self._engine = executor.engine
        self._tracker = executor.tracker
        self._index = index
        self._ffn = dense_ffn(executor.engine, index)
        self._sizes = executor.engine.sizes[index]
        self._placed: _Placed | None = None
        self.moved = MovedWeights(self._ffn, executor.versions)
        self.order = ChannelOrder(self._ffn.size, self._ffn.device, self.moved.exchange)
        self.down = PackedDown(self._ffn.down, self._sizes.width, self.moved)
        self._hooks = hooks_on_parts(self._ffn)

    def attach(self, patches: Patches) -> None:
        """Replace the forwards of its modules."""
        ffn = self._ffn
        replaced = [(p.module, self._input_forward(p)) for p in ffn.inputs]
        replaced.append((ffn.down.module, self._down_forward()))
        plain = all(p.stored.scale is None for p in ffn.projections)
        if plain and ffn.holder is not None and direct_forward_fits(ffn):
            replaced.append((ffn.holder, self._holder_forward()))
        for module, forward in replaced:
            patches.forward(module, forward)

    @uninterrupted()
    def restore(self) -> None:
        """Put every channel back."""
        self._placed = None
        if self.order.moved:
            self.moved.adopt({None: self.order.position_of})
        self.order.restore()
        self.moved.release()

    # where the channels stand ---------------------------------------------------------------------------------------

    def has(self, part: Partition) -> bool:
        """Whether R and C of this partition stand at the front."""
        return self._placed is not None and self._placed.partition is part

    @property
    def is_hooked(self) -> bool:
        """Whether somebody has hooks on its parts. They are to see all channels, in the order that the model has outside."""
        return any(self._hooks)

    @property
    def is_placed(self) -> bool:
        """Whether R and C of a prompt stand at the front."""
        return self._placed is not None

    @property
    def ranks(self) -> Tensor:
        """``[|C|]``: which of the candidates in ascending order stands at each place behind R."""
        assert self._placed is not None
        return self._placed.ranks

    @uninterrupted()
    def move(self, part: Partition, zones: Tensor) -> None:
        """Bring R and C to the front; ``zones`` are those of the partition, on the host."""
        self._placed = None  # nor is it placed if only some of them move
        self._executor.count_moved(self.order.place(zones.numpy(), part.sizes))
        self._placed = _Placed(part, self.order.candidate_ranks(zones.numpy(), part.sizes))

    def _place_prompt(self, state: PromptState) -> None:
        """Rank the channels, and move them, within a prefill."""
        part = self._engine.partition(self._index, state)
        with self._executor.moving():
            self.move(part, part.zones()[0].cpu())

    @property
    def positions(self) -> Tensor | None:
        """``[1, D]``: the position of each original channel; None if all are in their own places."""
        return self.order.position_of.unsqueeze(0) if self.order.moved else None

    # forwards -------------------------------------------------------------------------------------------------------

    def _input_forward(self, projection: Projection) -> Callable[[Tensor], Tensor]:
        tracker, module = self._tracker, projection.module
        own_forward = type(module).forward
        width, static, compiled = self._sizes.width, self._executor.static, self._executor.matvec is not None
        narrow = narrow_forward(projection, width)

        def forward(x: Tensor) -> Tensor:
            if static.active:
                return static_linear(projection, width, x, compiled)
            current = tracker.current
            if self.is_hooked:
                self._executor.put_back(self)
            elif current is not None and current.fast and self.is_placed:
                return narrow(x)
            return own_forward(module, x)

        return forward

    def _down_forward(self) -> Callable[[Tensor], Tensor]:
        ffn, sizes = self._ffn, self._sizes
        tracker, module = self._tracker, ffn.down.module
        own_forward = type(module).forward
        narrow, down = narrow_forward(ffn.down, sizes.width), self.down
        engine, index = self._engine, self._index
        has_candidates = sizes.candidates > 0
        static, compiled, guarded = self._executor.static, self._executor.matvec is not None, self.moved.guarded

        def forward(h: Tensor) -> Tensor:
            if static.active:
                if has_candidates:
                    h = static.without_dropped(index, h.reshape(-1, sizes.width)).view(h.shape)
                return static_linear(ffn.down, sizes.width, h, compiled)
            current = current_forward(tracker, ffn)
            if current.partial:
                return narrow(self._front_of_prompt(current, h))
            if not current.fast or not self.is_placed:
                if not sizes.dense:
                    h = engine.mask(index, "h", current, h, self.positions)
                return guarded(own_forward(module, h))
            if has_candidates:
                if h.requires_grad:
                    h = h.clone()
                zero_dropped(h, current)
            return down(h) if down.packed else guarded(narrow(h))

        zero_dropped = self._zero_dropped()
        return forward

    def _front_of_prompt(self, forward: Forward, h: Tensor) -> Tensor:
        """Rank and move an FFN's channels within a prefill: of ``[..., D]`` activations those of R and C, ``[..., K]``."""
        order, width = self.order, self._sizes.width
        before, rows = order.position_of, h.flatten(0, -2)
        self._engine.observe(self._index, forward, self._engine.step(forward, h.device), rows, self.positions)
        self._place_prompt(forward.state)
        places = before[order.front(width)]
        return rows.gather(1, places.expand(len(rows), -1)).view(*h.shape[:-1], width)

    def _probed_prompt(self, forward: Forward, x: Tensor) -> Tensor:
        """The whole FFN in a prefill: the probe tokens on all channels, to rank them, then every token on R and C."""
        ffn, sizes = self._ffn, self._sizes
        assert forward.probes is not None
        rows, probes = x.reshape(-1, x.shape[-1]), forward.probes.to(x.device)
        h = down_input(ffn, rows[probes], sizes.channels)
        self._engine.observe(self._index, forward, self._engine.step(forward, x.device), h, self.positions, probes)
        self._place_prompt(forward.state)
        h = down_input(ffn, rows, sizes.width)
        return linear(h, *ffn.down.narrow_views(sizes.width)[0]).view(x.shape)

    def _zero_dropped(self) -> Callable[[Tensor, Forward], None]:
        """What zeroes, in place, the candidates that a step leaves out of ``h``, ``[..., K]``."""
        engine, resident = self._engine, self._executor.candidates
        index, retained = self._index, self._sizes.retained

        def zero_dropped(h: Tensor, current: Forward) -> None:
            here = resident[index]
            if current.length == 1 and engine.own_choice is None:  # the common step
                here.leave_out(h if h.dim() == 2 else h.view(current.rows, -1), voices(current))
                return
            candidates = h.view(-1, h.shape[-1])[:, retained:]
            step = engine.step(current, h.device)
            candidates.scatter_(1, engine.choose(index, current, step, candidates, here.weight, here.ranks), 0)

        return zero_dropped

    @torch.inference_mode(False)  # views for forwards of every kind
    @torch.enable_grad()
    def _direct_forward(
        self, zero_dropped: Callable[[Tensor, Forward], None] | None
    ) -> Callable[[Tensor, Forward | None], Tensor]:
        """The FFN on narrow views of its weights as they are now, by the kernels of this session."""
        executor, index = self._executor, self._index
        stock = direct_forward(self._ffn, self._sizes.width, zero_dropped, self.down.view())
        if self._engine.own_choice is not None:
            return stock
        if executor.triton:
            return triton_forward(self._engine, index, executor.candidates, stock)
        if executor.matvec is not None:
            return compiled_forward(self._engine, index, executor.candidates, executor.matvec, executor.scratch, stock)
        return stock

    def _holder_forward(self) -> Callable[..., Tensor]:
        """The whole FFN of a decode step in one function.

        Calling three modules costs as much as a fifth of a small FFN: their Python objects have left the cache since
        the layer before. Hooks on the projections are respected: then the module's own forward runs.
        """
        ffn, sizes, tracker = self._ffn, self._sizes, self._tracker
        holder = ffn.holder
        assert holder is not None
        own_forward = type(holder).forward
        hooks = self._hooks
        zero_dropped = self._zero_dropped() if sizes.candidates else None
        compute = self._direct_forward(zero_dropped)
        static, down, guarded = self._executor.static, self.down, self.moved.guarded
        packed = down.packed

        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            nonlocal compute, packed
            if static.active:  # the compiler sees through modules
                return own_forward(holder, x, *args, **kwargs)
            current = tracker.current
            if current is not None and current.probes is not None and not any(hooks):
                return self._probed_prompt(current, x)
            if current is None or not current.fast or any(hooks) or not self.is_placed:
                return own_forward(holder, x, *args, **kwargs)
            if down.packed is not packed:
                packed = down.packed
                compute = self._direct_forward(zero_dropped)
            return guarded(compute(x, current))

        return forward


__all__ = ["NarrowFFN"]
