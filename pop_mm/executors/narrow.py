"""The fast backend: R, then C stand first in the model's own weights, and decode runs on narrow views of them.

Reordering an FFN's channels does not change its function, so there is no second copy of any weight. One prompt's order is
resident at a time; any other prompt decodes through the reference path on the same, reordered weights.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..engine import Engine
from ..events import tells
from ..experts import Experts
from ..interrupts import uninterrupted
from ..kernels import MOST_TOKENS, Matvec, View, traced
from ..kernels.ffn import Scratch
from ..layout import FFN, Projection, linear
from ..partition import Partition
from ..patching import Patches
from ..phase import Forward, PhaseTracker
from ..state import PromptState
from .base import current_forward, dense_ffn, voices
from .fused import compiled_forward, triton_forward
from .moved import MovedWeights, Versions, before_moves
from .narrow_experts import NarrowExperts
from .order import ChannelOrder
from .packing import PackedDown
from .static import StaticSteps

_PACK_AFTER = 8  # steps of one prompt without another in between: packing and unpacking cost as much as they save in 17


class ResidentCandidates(NamedTuple):
    """The candidates as they stand in the weights, right behind the retained channels.

    Attributes
    ----------
    ranks : Tensor
        ``[|C|]``: which of the candidates in ascending order stands at each place.
    weight : Tensor
        ``[|C|]``: the scorer's weight of the one at each place.
    leave_out : callable
        :meth:`Engine.chooser` for them.
    slot : callable
        :meth:`Engine.step_slot` for them.
    """

    ranks: Tensor
    weight: Tensor
    leave_out: Callable[[Tensor, Tensor | None], None]
    slot: Callable[[], int]


class _Placed(NamedTuple):
    """A partition whose R and C stand at the front of an FFN's weights, and the ``ranks`` of its candidates there."""

    partition: Partition
    ranks: Tensor


class NarrowExecutor:
    """Reorders channels in the weights at the first decode step of a prompt, and decodes on narrow views.

    Attributes
    ----------
    seconds : float
        Time spent moving channels.
    moved_channels : int
        Channels moved so far.
    static : StaticSteps
        For steps that are compiled.
    """

    name = "inplace"

    def __init__(
        self,
        engine: Engine,
        tracker: PhaseTracker,
        versions: Versions,
        matvec: Matvec | None = None,
        triton: bool = False,
    ) -> None:
        self._engine = engine
        self.events = engine.events
        self._versions = versions
        self._tracker = tracker
        self._matvec = matvec
        self._triton = triton
        self._orders: dict[int, ChannelOrder] = {}
        self._moved: dict[int, MovedWeights] = {}
        self._experts: dict[int, NarrowExperts] = {}
        self._placed: dict[int, _Placed] = {}
        self._candidates: dict[int, ResidentCandidates] = {}
        self.static = StaticSteps(engine)
        self._static_loaded = False
        self._resident: PromptState | None = None
        self._patches = Patches()
        self._seconds = 0.0
        self._moved_channels = 0
        self._scratch = Scratch()
        self._downs: dict[int, PackedDown] = {}
        self._packed = False
        self._steps = 0  # of the resident prompt, since anything else ran

    @property
    def choosing_seconds(self) -> float:
        """Time that compiled kernels have spent choosing among candidates."""
        return float(self._scratch.seconds)

    @property
    def seconds(self) -> float:
        """Time spent moving channels."""
        return self._seconds + sum(experts.seconds for experts in self._experts.values())

    @property
    def moved_channels(self) -> int:
        """Channels moved so far."""
        return self._moved_channels + sum(experts.moved_channels for experts in self._experts.values())

    def count_on(self, before: NarrowExecutor) -> None:
        """Time and channels moved so far are those of another backend."""
        self._seconds, self._moved_channels = before.seconds, before.moved_channels

    def attach(self, index: int) -> None:
        """Take over FFN number ``index`` of the engine."""
        record = self._engine.ffns[index]
        if isinstance(record, Experts):
            moved = MovedWeights(record, self._versions)
            self._experts[index] = experts = NarrowExperts(
                self._engine, index, self._tracker, self.static, moved, self._matvec
            )
            self.static.load_experts(index)
            experts.attach()
            restore = experts.restore
        else:
            moved = self._moved[index] = MovedWeights(record, self._versions)
            self._orders[index] = ChannelOrder(record.size, record.device, moved.exchange)
            self._downs[index] = PackedDown(record.down, self._engine.sizes[index].width, moved)
            self._replace_forwards(index, record)
            restore = partial(self._restore, index)

        def canonical(*_: Any) -> None:
            self.unpack()
            self._resident = None
            self._placed.pop(index, None)
            restore()
            if (
                current := self._tracker.current
            ) is not None:  # a hook moves weights within a forward (accelerate's do)
                current.fast = current.few = False

        for module in record.modules:
            before_moves(module, canonical, self._patches)

    @property
    def touched(self) -> bool:
        """Whether somebody has written to moved weights, as far as a few numbers tell."""
        return any(moved.touched for moved in self._moved.values()) or any(
            experts.moved.touched for experts in self._experts.values()
        )

    def moved_weights(self) -> dict[str, MovedWeights]:
        """Name of an FFN -> its weights, of those with channels that are not in their own places."""
        every = {**self._moved, **{index: experts.moved for index, experts in self._experts.items()}}
        return {self._engine.ffns[index].name: moved for index, moved in every.items() if moved.holds}

    def _replace_forwards(self, index: int, ffn: FFN) -> None:
        replaced = [(p.module, self._input_forward(index, p)) for p in ffn.inputs]
        replaced.append((ffn.down.module, self._down_forward(index)))
        if ffn.holder is not None and direct_forward_fits(ffn):
            replaced.append((ffn.holder, self._holder_forward(index)))
        for module, forward in replaced:
            self._patches.forward(module, forward)

    def detach(self) -> None:
        """Restore the original order and the modules' own forwards."""
        self.unpack()
        self._resident = None
        self._placed.clear()
        for index in self._orders:
            self._restore(index)
        for experts in self._experts.values():
            experts.detach()
        self._patches.undo()

    @uninterrupted()
    def _restore(self, index: int) -> None:
        """Put every channel of one FFN back."""
        order, moved = self._orders[index], self._moved[index]
        if order.moved:
            moved.adopt({None: order.position_of})
        order.restore()
        moved.release()

    def begin(self, forward: Forward) -> None:
        """Before a decode step: say how the FFNs may compute it."""
        forward.fast = self.place(forward.state)
        if not forward.fast or torch.is_grad_enabled():  # gradients of packed weights would be packed
            self.unpack()
        if forward.fast:
            self._steps += 1
            ours = self._matvec is not None or self._triton or self._static_loaded
            if self._steps == _PACK_AFTER and not ours and not torch.is_grad_enabled():
                self._pack()
        forward.few = (
            forward.fast
            and self._matvec is not None
            and forward.length == 1
            and forward.rows <= MOST_TOKENS
            and not torch.is_grad_enabled()
            and not torch.is_autocast_enabled("cpu")
        )

    def begin_prompt(self, forward: Forward) -> None:
        """Before a prefill that is completed on R and C: let each FFN move its channels as soon as it has ranked them.

        The prompt is not the resident one before its first decode step, so an older one can still go on in place.
        """
        if torch.is_grad_enabled() or not self._orders:  # a graph would hold weights that move
            return
        forward.partial, self._resident = True, None
        if self._engine.config.probe_tokens:
            numbers = self._engine.probe_numbers(forward)
            if 2 * len(numbers) <= forward.rows * forward.length:  # else gate and up of all tokens cost less once
                forward.probes = numbers

    def prepare_traced(self, forward: Forward) -> bool:
        """Whether this forward can be a compiled step: one token a row, on what is resident."""
        if not forward.fast or forward.length > 1:
            return False
        self.unpack()
        if not self._static_loaded:  # only here: most sessions never compile
            for index, here in self._candidates.items():
                self.static.load(index, here.weight, here.ranks)
            self._static_loaded = True
        return all(experts.prepare_traced(forward) for experts in self._experts.values())

    @tells("reordering")
    def place(self, state: PromptState) -> bool:
        """Bring a prompt's R and C to the front, if it may be the resident one.

        A new prompt always becomes resident. An older one does only if the resident prompt's cache is gone.

        Returns
        -------
        bool
            Whether the state is resident now.
        """
        if self._resident is state and state.moved:
            return True
        if state.moved and self._resident is not None and self._resident.alive:
            return False
        self.unpack()
        self._resident = None  # nor is it if this is not completed
        with self._moving():
            if self._orders:
                self._place_ffns(state)
            for experts in self._experts.values():
                experts.forget_resident()
        state.moved = True
        self._resident = state
        return True

    @contextmanager
    def _moving(self) -> Iterator[None]:
        """Within: the time is that of moving channels."""
        started = time.perf_counter()
        yield
        self._seconds += time.perf_counter() - started

    @tells("reordering")
    def _pack(self) -> None:
        with self._moving():
            for down in self._downs.values():
                if down.pays():
                    self._packed = True
                    down.pack()

    @tells("reordering")
    def unpack(self) -> None:
        """Before anything but a step of the resident prompt reads or moves weights."""
        self._steps = 0
        if self._packed:
            with self._moving():
                for down in self._downs.values():
                    down.unpack()
            self._packed = False

    def _place_ffns(self, state: PromptState) -> None:
        self.static.flush()
        parts = {index: self._engine.partition(index, state) for index in self._orders}
        missing = {index: part for index, part in parts.items() if not self._is_placed(index, part)}
        if missing:
            zones = [part.zones()[0] for part in missing.values()]
            # one transfer to the host for all FFNs: how many channels move is not known before
            on_host = torch.cat([z.to(zones[0].device) for z in zones]).cpu().split([len(z) for z in zones])
            for (index, part), zone in zip(missing.items(), on_host, strict=True):
                self._move(index, part, zone)
        for index in parts:
            ranks, weight = self._placed[index].ranks, state.ffns[index].candidate_weight
            assert weight is not None
            weight = weight[0, ranks]
            leave_out = self._engine.chooser(index, state, weight, ranks)
            slot = self._engine.step_slot(index, state, ranks)
            self._candidates[index] = ResidentCandidates(ranks, weight, leave_out, slot)
        self._static_loaded = False

    def _place_prompt(self, index: int, state: PromptState) -> None:
        """Rank the channels of one FFN, and move them, within a prefill."""
        part = self._engine.partition(index, state)
        with self._moving():
            self._move(index, part, part.zones()[0].cpu())

    def _is_placed(self, index: int, part: Partition) -> bool:
        return index in self._placed and self._placed[index].partition is part

    @uninterrupted()
    def _move(self, index: int, part: Partition, zones: Tensor) -> None:
        """Bring R and C of one FFN to the front; ``zones`` are those of its partition, on the host."""
        order = self._orders[index]
        self._placed.pop(index, None)  # nor is it placed if only some of them move
        self._moved_channels += order.place(zones.numpy(), part.sizes)
        self._placed[index] = _Placed(part, order.candidate_ranks(zones.numpy(), part.sizes))

    def _input_forward(self, index: int, projection: Projection) -> Callable[[Tensor], Tensor]:
        tracker, module = self._tracker, projection.module
        own_forward = type(module).forward
        width, static, compiled = self._engine.sizes[index].width, self.static, self._matvec is not None
        narrow = projection.narrow(width)

        def forward(x: Tensor) -> Tensor:
            if static.active:
                return static_linear(projection, width, x, compiled)
            current = tracker.current
            if current is not None and current.fast:
                return narrow(x)
            return own_forward(module, x)

        return forward

    def _down_forward(self, index: int) -> Callable[[Tensor], Tensor]:
        ffn, sizes = dense_ffn(self._engine, index), self._engine.sizes[index]
        tracker, module = self._tracker, ffn.down.module
        own_forward = type(module).forward
        narrow, down = ffn.down.narrow(sizes.width), self._downs[index]
        engine, order = self._engine, self._orders[index]
        has_candidates = sizes.candidates > 0
        static, compiled, guarded = self.static, self._matvec is not None, self._moved[index].guarded

        def forward(h: Tensor) -> Tensor:
            if static.active:
                if has_candidates:
                    h = static.without_dropped(index, h.reshape(-1, sizes.width)).view(h.shape)
                return static_linear(ffn.down, sizes.width, h, compiled)
            current = current_forward(tracker, ffn)
            if current.partial:
                return narrow(self._front_of_prompt(index, current, h))
            if not current.fast:
                if not sizes.dense:
                    h = engine.mask(index, "h", current, h, positions_of(order))
                return guarded(own_forward(module, h))
            if has_candidates:
                if h.requires_grad:
                    h = h.clone()
                zero_dropped(h, current)
            return down(h) if down.packed else guarded(narrow(h))

        zero_dropped = self._zero_dropped(index)
        return forward

    def _front_of_prompt(self, index: int, forward: Forward, h: Tensor) -> Tensor:
        """Rank and move an FFN's channels within a prefill: of ``[..., D]`` activations those of R and C, ``[..., K]``."""
        order, width = self._orders[index], self._engine.sizes[index].width
        before, rows = order.position_of, h.flatten(0, -2)
        self._engine.observe(index, forward, self._engine.step(forward, h.device), rows, positions_of(order))
        self._place_prompt(index, forward.state)
        places = before[order.front(width)]
        return rows.gather(1, places.expand(len(rows), -1)).view(*h.shape[:-1], width)

    def _probed_prompt(self, index: int, forward: Forward, x: Tensor) -> Tensor:
        """The whole FFN in a prefill: the probe tokens on all channels, to rank them, then every token on R and C."""
        ffn, order, sizes = dense_ffn(self._engine, index), self._orders[index], self._engine.sizes[index]
        assert forward.probes is not None
        rows, probes = x.reshape(-1, x.shape[-1]), forward.probes.to(x.device)
        h = down_input(ffn, rows[probes], sizes.channels)
        self._engine.observe(index, forward, self._engine.step(forward, x.device), h, positions_of(order), probes)
        self._place_prompt(index, forward.state)
        h = down_input(ffn, rows, sizes.width)
        return linear(h, *ffn.down.narrow_views(sizes.width)[0]).view(x.shape)

    def _zero_dropped(self, index: int) -> Callable[[Tensor, Forward], None]:
        """What zeroes, in place, the candidates that a step leaves out of ``h``, ``[..., K]``."""
        engine, resident = self._engine, self._candidates
        retained = engine.sizes[index].retained

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
        self, index: int, zero_dropped: Callable[[Tensor, Forward], None] | None
    ) -> Callable[[Tensor, Forward | None], Tensor]:
        """The FFN on narrow views of its weights as they are now, by the kernels of this session."""
        sizes, down = self._engine.sizes[index], self._downs[index].view()
        stock = direct_forward(dense_ffn(self._engine, index), sizes.width, zero_dropped, down)
        if self._engine.own_choice is not None:
            return stock
        if self._triton:
            return triton_forward(self._engine, index, self._candidates, stock)
        if self._matvec is not None:
            return compiled_forward(self._engine, index, self._candidates, self._matvec, self._scratch, stock)
        return stock

    def _holder_forward(self, index: int) -> Callable[..., Tensor]:
        """The whole FFN of a decode step in one function.

        Calling three modules costs as much as a fifth of a small FFN: their Python objects have left the cache since
        the layer before. Hooks on the projections are respected: then the module's own forward runs.
        """
        ffn, sizes, tracker = dense_ffn(self._engine, index), self._engine.sizes[index], self._tracker
        holder = ffn.holder
        assert holder is not None
        own_forward = type(holder).forward
        bypassed = [*(p.module for p in ffn.projections), ffn.activation]
        hooks = [h for m in bypassed if m is not None for h in (m._forward_hooks, m._forward_pre_hooks)]
        zero_dropped = self._zero_dropped(index) if sizes.candidates else None
        compute = self._direct_forward(index, zero_dropped)
        static, down, guarded = self.static, self._downs[index], self._moved[index].guarded
        packed = down.packed

        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            nonlocal compute, packed
            if static.active:  # the compiler sees through modules
                return own_forward(holder, x, *args, **kwargs)
            current = tracker.current
            if current is not None and current.probes is not None and not any(hooks):
                return self._probed_prompt(index, current, x)
            if current is None or not current.fast or any(hooks):
                return own_forward(holder, x, *args, **kwargs)
            if down.packed is not packed:
                packed = down.packed
                compute = self._direct_forward(index, zero_dropped)
            return guarded(compute(x, current))

        return forward


def positions_of(order: ChannelOrder) -> Tensor | None:
    """``[1, D]``: the position of each original channel of an FFN; None if all are in their own places."""
    return order.position_of.unsqueeze(0) if order.moved else None


def down_input(ffn: FFN, rows: Tensor, width: int) -> Tensor:
    """The input of the down projection on an FFN's first ``width`` channels, ``[N, H]`` to ``[N, width]``."""
    parts = [linear(rows, *view) for p in ffn.inputs for view in p.narrow_views(width)]
    assert ffn.activation is not None
    h = ffn.activation.forward(parts[0])
    return h.mul_(parts[1]) if len(parts) == 2 else h


def static_linear(projection: Projection, width: int, x: Tensor, compiled: bool) -> Tensor:
    """A projection on its first ``width`` channels, traceable: ``[..., in]`` to ``[..., out]``."""
    rows = x.reshape(-1, x.shape[-1])
    views = projection.narrow_views(width)
    parts = [
        traced.matvec(rows, weight.t(), bias)
        if compiled and traced.fits(rows, weight.t())
        else linear(rows, weight, bias)
        for weight, bias in views
    ]
    out = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
    return out.view(*x.shape[:-1], out.shape[-1])


def direct_forward(
    ffn: FFN, width: int, zero_dropped: Callable[[Tensor, Forward], None] | None, down: View
) -> Callable[[Tensor, Forward | None], Tensor]:
    """An FFN as one function on views of its first ``width`` channels: ``act(gate) * up`` or ``act(up)``, then ``down``."""
    inputs = [view for p in ffn.inputs for view in p.narrow_views(width)]
    assert ffn.activation is not None
    activation = ffn.activation.forward

    def compute(x: Tensor, current: Forward | None) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        parts = [linear(rows, *view) for view in inputs]
        h = activation(parts[0])
        if len(parts) == 2:
            h = h * parts[1] if h.requires_grad else h.mul_(parts[1])
        if zero_dropped is not None:
            assert current is not None
            if h.requires_grad:
                h = h.clone()
            zero_dropped(h, current)
        return linear(h, *down).view(x.shape)

    return compute


@torch.no_grad()
def direct_forward_fits(ffn: FFN) -> bool:
    """Whether the holder's forward is just that, as far as one random token can tell."""
    holder, weight = ffn.holder, ffn.down.weight
    if holder is None or ffn.activation is None or "forward" in holder.__dict__:
        return False
    x = torch.randn(1, 1, ffn.hidden_size, generator=torch.Generator().manual_seed(0)).to(weight.device, weight.dtype)
    try:
        expected = holder(x)
        found = direct_forward(ffn, ffn.size, None, ffn.down.narrow_views(ffn.size)[0])(x, None)
    except Exception:  # a holder that wants more than x is left to its own forward
        return False
    if not isinstance(expected, Tensor) or expected.shape != found.shape:
        return False
    scale = float(expected.abs().max())
    return math.isfinite(scale) and torch.allclose(
        expected, found, rtol=0, atol=scale * 50 * torch.finfo(expected.dtype).eps
    )
