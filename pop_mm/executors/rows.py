"""The fast executor of thresholds: decode steps of one token of one sequence read the rows that pass, and no others.

The weights of each record are stored input-major in the same Parameters (:mod:`pop_mm.ops.turn`) from the first such step on, and
as they were again when the session ends or somebody takes or moves them. Whatever else runs (prompts, several tokens, batches)
is masked, on the turned weights.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..decoding.state import PromptState
from ..decoding.threshold_engine import ThresholdEngine
from ..events import tells
from ..kernels import MOST_TOKENS
from ..methods.thresholds import PASS_ALL
from ..ops.rows import Room
from ..ops.turn import hand_back
from ..patching import Patches
from ..tracking.phase import Forward, PhaseTracker
from ..waiting import bar_if_long
from ..weights.experts import Experts
from ..weights.groups import InputGroup
from ..weights.layout import FFN
from .masked import MaskedExecutor
from .moved import before_moves
from .rows_ffn import RowsHolder, is_one_call
from .rows_linears import RowsLinears
from .rows_record import RowsRecord


class RowsExecutor:
    """Turns weights at the first decode step of one sequence, and decodes by rows.

    Parameters
    ----------
    engine : ThresholdEngine
    tracker : PhaseTracker
    masked : MaskedExecutor
        Serves what is not such a step.
    on_move : callable
        Told the parameters that have been given other memory.
    triton : bool
        Whether by the Triton kernels, on a GPU, instead of compiled ones on a CPU.

    Attributes
    ----------
    seconds : float
        Spent turning weights.
    step : int
        Number of the step that runs.
    backs : dict of nn.Module to callable
        Puts the weights of a module back, for somebody who takes them.
    """

    name = "rows"

    def __init__(
        self,
        engine: ThresholdEngine,
        tracker: PhaseTracker,
        masked: MaskedExecutor,
        on_move: Callable[[Iterable[Tensor]], None],
        triton: bool = False,
    ) -> None:
        self.engine = engine
        self.triton = triton
        self.tracker = tracker
        self.events = engine.events
        self.room = Room()
        self.seconds = 0.0
        self.step = 0
        self.backs: dict[nn.Module, Callable[[], None]] = {}
        self._masked = masked
        self._on_move = on_move
        self._records: dict[int, RowsRecord] = {}
        self._resident: PromptState | None = None
        self._factor: Tensor | None = None  # of the resident prompt's thresholds
        self._kept: dict[torch.device, Tensor] = {}  # [records, 2], int64: of each record on the device, of x and of h
        costs = [[cost.get(which, 0.0) for which in "xh"] for cost in engine.costs]
        self._costs = torch.tensor(costs, dtype=torch.float64, device="cpu").view(-1)
        self._whole: list[tuple[list[int], int, float]] = []  # vectors of a record, which of them, weights of one
        self._before = 0.0, 0.0  # weights read up to the latest such step, and of how many
        self._patches = Patches()

    def attach(self, index: int) -> None:
        """Take over record number ``index`` of the engine."""
        record: Any = self.engine.ffns[index]
        device = record.device
        if device not in self._kept:
            self._kept[device] = torch.zeros(len(self.engine.ffns), 2, dtype=torch.int64, device=device)
        mine = self._records[index] = RowsRecord(record, self._kept[device][index])
        for which, cost in self.engine.costs[index].items():
            number = "xh".index(which)
            self._whole.append((mine.vectors, number, cost * mine.sizes[number]))
        if isinstance(record, Experts):
            from .rows_experts import RowsExperts

            experts = RowsExperts(self, index, mine)
            self._patches.undo_by(experts.detach)
            experts.attach()
        else:
            self._attach_modules(index, record, mine)

        def canonical(*_: Any) -> None:
            self._on_move(mine.back())

        tied = getattr(record, "tied", None)
        for module in (*record.modules, *([] if tied is None else [tied])):
            before_moves(module, canonical, self._patches)
            if tied is None:  # an embedding is a model's first weight, at which everybody looks for its device
                self.backs[module] = canonical

    def _attach_modules(self, index: int, record: FFN | InputGroup, mine: RowsRecord) -> None:
        holder = record.holder if isinstance(record, FFN) and is_one_call(record) else None
        self._masked.attach(index)
        linears = []
        if isinstance(record, FFN):
            norms = self.engine.channel_weights()[index][0].to(torch.float32).contiguous()
            linears = [
                RowsLinears(self, index, mine, [p.module for p in record.inputs]),
                RowsLinears(self, index, mine, [record.down.module], norms),
            ]
        else:
            linears = [RowsLinears(self, index, mine, record.modules)]
        for group in linears:
            for number, module in enumerate(group.modules):
                self._masked.by_rows[module] = group
                self._patches.forward(module, group.forwards[number])
        if holder is not None:
            assert isinstance(record, FFN)
            self._masked.by_rows[holder] = whole = RowsHolder(self, index, mine, record)
            self._patches.forward(holder, whole.forward)

    def detach(self) -> None:
        """Give every weight its own order and every module its own forward back."""
        self.flush()
        self._resident = None
        failed: list[BaseException] = []
        weights = sum(mine.turned_bytes for mine in self._records.values())
        with bar_if_long("turning weights back", weights) as advance:
            for mine in self._records.values():
                size = mine.turned_bytes
                try:
                    mine.back()
                except BaseException as error:  # Ctrl-C, or no memory: the other weights go back all the same
                    failed.append(error)
                advance(size)
        if weights:
            hand_back()
        self._patches.undo()
        if failed:
            raise failed[0]

    def begin(self, forward: Forward) -> None:
        """Before a decode step: say how it may be computed."""
        plain = forward.length == 1 and not torch.is_grad_enabled() and not any(map(_is_autocast, self._kept))
        forward.few = plain and forward.rows <= MOST_TOKENS
        state: PromptState = forward.state
        if not plain or forward.rows != 1 or state.rows != 1:
            return
        if forward.valid is not None and not bool(forward.valid.all()):
            return
        answer = self.engine.answer(forward)
        factor = None if answer is None or answer.factors is None else answer.factors[0, 0]
        known = self._resident is state and state.moved and _same(factor, self._factor)
        if not known and not self._load(state, factor):
            return
        self._turn()
        self.step += 1
        forward.fast = True

    def end(self, forward: Forward) -> None:
        """After a decode step by rows: say what its token read."""
        answer = self.engine.answer(forward) if forward.fast else None
        if answer is not None:
            before, (read, whole) = self._before, self._read()
            answer.read = answer.read + torch.tensor([[read - before[0], whole - before[1]]], dtype=torch.float64)
            self._before = read, whole

    def _read(self) -> tuple[float, float]:
        """Weights read since the last flush, and of how many."""
        read = sum([float(torch.dot(kept.view(-1).double().to("cpu"), self._costs)) for kept in self._kept.values()])
        return read, sum([vectors[number] * weights for vectors, number, weights in self._whole])

    def _load(self, state: PromptState, factor: Tensor | None) -> bool:
        """Make a prompt the resident one; False if it decodes dense, for which nothing has to be turned."""
        states: Sequence[Any] = state.ffns
        found = {index: states[index] for index in self._records}
        bounds = [inputs.threshold for one in found.values() for inputs in one.inputs.values()]
        if all(float(bound) == PASS_ALL for bound in torch.cat(bounds).tolist()):
            return False
        self.flush()
        for index, mine in self._records.items():
            mine.load(found[index], factor if self.engine.costs[index] else None)
        self._resident, self._factor, state.moved = state, factor, True
        return True

    @tells("reordering")
    def _turn(self) -> None:
        missing = [mine for mine in self._records.values() if not mine.ready]
        if not missing:
            return
        started = time.perf_counter()
        try:
            with bar_if_long("turning weights", sum(mine.whole_bytes for mine in missing)) as advance:
                for mine in missing:
                    try:
                        mine.turn()
                    finally:  # what has moved before Ctrl-C, or before memory ran out, has moved
                        self._on_move(mine.turned)
                    advance(mine.whole_bytes)
        finally:
            hand_back()
            self.seconds += time.perf_counter() - started

    def flush(self) -> None:
        """Hand the counts to the resident prompt."""
        if self._resident is None:
            return
        states: Sequence[Any] = self._resident.ffns
        for index, mine in self._records.items():
            mine.flush(states[index])
        self._before = 0.0, 0.0


def _is_autocast(device: torch.device) -> bool:
    """Whether products on a device run in another dtype than was asked for."""
    return torch.is_autocast_enabled(device.type)


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b or (a is not None and b is not None and bool(a == b))


__all__ = ["RowsExecutor"]
