"""The fast executor of channels: R, then C stand first in the model's own weights, and decode runs on narrow views of them.

Reordering an FFN's channels does not change its function, so there is no second copy of any weight. One prompt's order is
resident at a time; any other prompt decodes through the reference path on the same, reordered weights.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..decoding.channel_engine import ChannelEngine
from ..decoding.state import PromptState
from ..events import tells
from ..kernels import MOST_TOKENS, Matvec
from ..kernels.ffn import Scratch
from ..patching import Patches
from ..tracking.phase import Forward, PhaseTracker
from ..weights.experts import Experts
from ..weights.layout import FFN
from .moved import MovedWeights, Versions, before_moves
from .narrow_experts import NarrowExperts
from .narrow_ffn import NarrowFFN
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
        :meth:`ChannelEngine.chooser` for them.
    slot : callable
        :meth:`ChannelEngine.step_slot` for them.
    """

    ranks: Tensor
    weight: Tensor
    leave_out: Callable[[Tensor, Tensor | None], None]
    slot: Callable[[], int]


class NarrowExecutor:
    """Reorders channels in the weights at the first decode step of a prompt, and decodes on narrow views.

    Attributes
    ----------
    candidates : dict of int to ResidentCandidates
        Of each FFN, those of the resident prompt.
    static : StaticSteps
        For steps that are compiled.
    backs : dict of nn.Module to callable
        Puts the channels of a module's weights back, for somebody who takes them.
    before_back : callable
        Told of FFNs whose channels are about to be put back so.
    """

    name = "inplace"

    def __init__(
        self,
        engine: ChannelEngine,
        tracker: PhaseTracker,
        versions: Versions,
        matvec: Matvec | None = None,
        triton: bool = False,
    ) -> None:
        self.engine = engine
        self.events = engine.events
        self.versions = versions
        self.tracker = tracker
        self.matvec = matvec
        self.triton = triton
        self.candidates: dict[int, ResidentCandidates] = {}
        self.static = StaticSteps(engine)
        self.scratch = Scratch()
        self.backs: dict[nn.Module, Callable[[], None]] = {}
        self.before_back: Callable[[FFN | Experts], None] = lambda _: None
        self._ffns: dict[int, NarrowFFN] = {}
        self._experts: dict[int, NarrowExperts] = {}
        self._static_loaded = False
        self._resident: PromptState | None = None
        self._patches = Patches()
        self._seconds = 0.0
        self._moved_channels = 0
        self._packed = False
        self._steps = 0  # of the resident prompt, since anything else ran

    @property
    def choosing_seconds(self) -> float:
        """Time that compiled kernels have spent choosing among candidates."""
        return float(self.scratch.seconds)

    @property
    def seconds(self) -> float:
        """Time spent moving channels."""
        return self._seconds + sum(experts.seconds for experts in self._experts.values())

    @property
    def moved_channels(self) -> int:
        """Channels moved so far."""
        return self._moved_channels + sum(experts.moved_channels for experts in self._experts.values())

    def count_on(self, before: NarrowExecutor) -> None:
        """Time and channels moved so far are those of another executor."""
        self._seconds, self._moved_channels = before.seconds, before.moved_channels

    def count_moved(self, channels: int) -> None:
        """So many more channels of a dense FFN have moved."""
        self._moved_channels += channels

    @contextmanager
    def moving(self) -> Iterator[None]:
        """Within: the time is that of moving channels."""
        started = time.perf_counter()
        yield
        self._seconds += time.perf_counter() - started

    # life -----------------------------------------------------------------------------------------------------------

    def attach(self, index: int) -> None:
        """Take over FFN number ``index`` of the engine."""
        record = self.engine.ffns[index]
        if record.experts is not None:
            moved = MovedWeights(record, self.versions)
            mine: NarrowFFN | NarrowExperts
            mine = self._experts[index] = NarrowExperts(
                self.engine, index, self.tracker, self.static, moved, self.matvec
            )
            self.static.load_experts(index)
            mine.attach()
        else:
            mine = self._ffns[index] = NarrowFFN(self, index)
            mine.attach(self._patches)

        def canonical(*_: Any) -> None:
            self.unpack()
            self._resident = None
            if mine.moved.holds:
                self.before_back(record)
            mine.restore()
            current = self.tracker.current
            if current is not None:  # a hook moves weights within a forward (accelerate's do)
                current.fast = current.few = False

        for module in record.modules:
            before_moves(module, canonical, self._patches)
            self.backs[module] = canonical

    def positions(self, record: FFN | Experts) -> Tensor | None:
        """``[U, D]``: where the original channels of each unit stand in its weights; None where they are in their own places."""
        every: dict[int, NarrowFFN | NarrowExperts] = {**self._ffns, **self._experts}
        return next((mine.positions for index, mine in every.items() if self.engine.ffns[index] is record), None)

    @property
    def touched(self) -> bool:
        """Whether somebody has written to moved weights, as far as a few numbers tell."""
        every: list[NarrowFFN | NarrowExperts] = [*self._ffns.values(), *self._experts.values()]
        return any(mine.moved.touched for mine in every)

    def moved_weights(self) -> dict[str, MovedWeights]:
        """Name of an FFN -> its weights, of those with channels that are not in their own places."""
        every: dict[int, NarrowFFN | NarrowExperts] = {**self._ffns, **self._experts}
        return {self.engine.ffns[index].name: mine.moved for index, mine in every.items() if mine.moved.holds}

    def detach(self) -> None:
        """Restore the original order and the modules' own forwards."""
        self.unpack()
        self._resident = None
        for ffn in self._ffns.values():
            ffn.restore()
        for experts in self._experts.values():
            experts.detach()
        self._patches.undo()

    # forwards -------------------------------------------------------------------------------------------------------

    def begin(self, forward: Forward) -> None:
        """Before a decode step: say how the FFNs may compute it."""
        forward.fast = self.place(forward.state)
        if not forward.fast or torch.is_grad_enabled():  # gradients of packed weights would be packed
            self.unpack()
        if forward.fast:
            self._steps += 1
            ours = self.matvec is not None or self.triton or self._static_loaded
            if self._steps == _PACK_AFTER and not ours and not torch.is_grad_enabled():
                self._pack()
        forward.few = (
            forward.fast
            and self.matvec is not None
            and forward.length == 1
            and forward.rows <= MOST_TOKENS
            and not torch.is_grad_enabled()
            and not torch.is_autocast_enabled("cpu")
        )

    def begin_prompt(self, forward: Forward) -> None:
        """Before a prefill that is completed on R and C: let each FFN move its channels as soon as it has ranked them.

        The prompt is not the resident one before its first decode step, so an older one can still go on in place.
        """
        if torch.is_grad_enabled() or not self._ffns:  # a graph would hold weights that move
            return
        forward.partial, self._resident = True, None
        if self.engine.method.probe_tokens:
            numbers = self.engine.probe_numbers(forward)
            if 2 * len(numbers) <= forward.rows * forward.length:  # else gate and up of all tokens cost less once
                forward.probes = numbers

    def prepare_traced(self, forward: Forward) -> bool:
        """Whether this forward can be a compiled step: one token a row, on what is resident."""
        if not forward.fast or forward.length > 1:
            return False
        self.unpack()
        if not all(ffn.is_placed and not ffn.is_hooked for ffn in self._ffns.values()):
            return False
        if not self._static_loaded:  # only here: most sessions never compile
            for index, here in self.candidates.items():
                self.static.load(index, here.weight, here.ranks)
            self._static_loaded = True
        return all(experts.prepare_traced(forward) for experts in self._experts.values())

    # the resident prompt --------------------------------------------------------------------------------------------

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
        with self.moving():
            if self._ffns:
                self._place_ffns(state)
            for experts in self._experts.values():
                experts.forget_resident()
        state.moved = True
        self._resident = state
        return True

    def _place_ffns(self, state: PromptState) -> None:
        self.static.flush()
        placed = {index: ffn for index, ffn in self._ffns.items() if not ffn.is_hooked}
        parts = {index: self.engine.partition(index, state) for index in placed}
        missing = {index: part for index, part in parts.items() if not self._ffns[index].has(part)}
        if missing:
            zones = [part.zones()[0] for part in missing.values()]
            # one transfer to the host for all FFNs: how many channels move is not known before
            on_host = torch.cat([z.to(zones[0].device) for z in zones]).cpu().split([len(z) for z in zones])
            for (index, part), zone in zip(missing.items(), on_host, strict=True):
                self._ffns[index].move(part, zone)
        for index, ffn in placed.items():
            ranks, weight = ffn.ranks, state.ffns[index].candidate_weight
            assert weight is not None
            weight = weight[0, ranks]
            leave_out = self.engine.chooser(index, state, weight, ranks)
            slot = self.engine.step_slot(index, state, ranks)
            self.candidates[index] = ResidentCandidates(ranks, weight, leave_out, slot)
        self._static_loaded = False

    def put_back(self, ffn: NarrowFFN) -> None:
        """Give an FFN's channels their own places within a forward, because somebody looks at them."""
        if ffn.is_placed or ffn.order.moved:
            self.unpack()
            with self.moving():
                ffn.restore()

    @tells("reordering")
    def _pack(self) -> None:
        with self.moving():
            for ffn in self._ffns.values():
                if ffn.is_placed and ffn.down.pays():
                    self._packed = True
                    ffn.down.pack()

    @tells("reordering")
    def unpack(self) -> None:
        """Before anything but a step of the resident prompt reads or moves weights."""
        self._steps = 0
        if self._packed:
            with self.moving():
                for ffn in self._ffns.values():
                    ffn.down.unpack()
            self._packed = False


__all__ = ["NarrowExecutor", "ResidentCandidates"]
