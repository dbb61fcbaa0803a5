"""The fast executor of thresholds on a CPU: decode steps of one token of one sequence read the rows that pass, and no others.

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

from ..backends.inplace import direct_forward_fits
from ..backends.moved import before_moves
from ..classes import same_class
from ..events import tells
from ..experts import Experts
from ..groups import InputGroup
from ..interrupts import uninterrupted
from ..kernels import MOST_TOKENS
from ..kernels.activations import activation_name
from ..layout import FFN, Projection
from ..methods.thresholds import PASS_ALL
from ..ops import library
from ..ops.reference import FFNWeights
from ..ops.rows import Room, RowsFFN, RowsLinear
from ..ops.turn import Turned, turn
from ..ops.turn import why_not as why_not_turned
from ..phase import Forward, PhaseTracker, set_instance_attribute
from ..state import PromptState
from ..threshold_engine import RecordState, ThresholdEngine
from .masked import MaskedInputs


def why_not(record: FFN | Experts | InputGroup, plain_types: Sequence[type[nn.Module] | str]) -> str | None:
    """Why a record's weights cannot be read by rows, or None if they can; one that is not loaded is judged as on a CPU.

    Parameters
    ----------
    plain_types : sequence of type or str
        Classes of modules that are ``x @ W.T + b``, as :class:`pop_mm.layout.Projection` takes them.
    """
    if isinstance(record, Experts):
        reason = record.why_not_plain()
        module: Any = record.module
        if reason is None and module._is_expert_parallel:
            reason = f"the experts of {record.name} are on several devices"
    else:
        projections = _projections(record, plain_types)
        reason = next((why for p in projections if (why := p.why_not_plain())), None)
    if reason is not None:
        return reason
    tensors = [p for module in record.modules for p in module.parameters(False)]
    if any(p.device.type not in ("cpu", "meta") for p in tensors):
        return f"the weights of {record.name} are on {record.device}"
    dtypes = {p.dtype for p in tensors}
    if len(dtypes) > 1:
        return f"the weights of {record.name} have several dtypes"
    if (reason := library.why_not(dtypes.pop())) is not None:
        return f"there are no compiled kernels: {reason}"
    for weight in (p for p in tensors if p.dim() > 1 and p.device.type != "meta"):
        if not weight.is_contiguous() and (reason := why_not_turned(weight)):
            return f"a weight of {record.name} cannot be turned: {reason}"
    turning = [p for p in _turning(record) if p.device.type != "meta"]
    reason = next((why for p in turning if (why := why_not_turned(p))), None)
    return None if reason is None else f"a weight of {record.name} cannot be turned: {reason}"


def _projections(record: FFN | InputGroup, plain_types: Sequence[type[nn.Module] | str]) -> Sequence[Projection]:
    if isinstance(record, FFN):
        return record.projections
    return [
        Projection(f"a module of {record.name}", m, "out", 1, _is_transposed(m), tuple(plain_types))
        for m in record.modules
    ]


def _is_transposed(module: nn.Module) -> bool:
    return same_class(type(module), "transformers.pytorch_utils:Conv1D")


def _turning(record: FFN | Experts | InputGroup) -> list[nn.Parameter]:
    """The weights that are not stored input-major by their class."""
    if isinstance(record, Experts):
        module: Any = record.module
        return [] if module.is_transposed else [getattr(module, record.input_name), module.down_proj]
    if isinstance(record, FFN):
        pairs = [(p.module, p.transposed) for p in record.projections]
    else:
        pairs = [(module, _is_transposed(module)) for module in record.modules]
    return [module.weight for module, transposed in pairs if not transposed]  # type: ignore[misc]


class RowsRecord:
    """One record: its weights while they are turned, its thresholds at fixed addresses, and counts of what was kept.

    Attributes
    ----------
    x, h : Tensor
        ``[1]`` and ``[E]``, float32: the resident prompt's thresholds.
    kept : Tensor
        ``[2]``, int64: entries of x and h that were kept.
    vectors : list of int
        How many vectors those were among, of x and of h.
    makers : list of callable
        Make kernels on the turned weights, once they are; called with False they drop them.
    """

    def __init__(self, record: Any) -> None:
        experts = record.count if isinstance(record, Experts) else 1
        self.record = record
        self.x = torch.full((1,), PASS_ALL, dtype=torch.float32, device="cpu")
        self.h = torch.full((experts,), PASS_ALL, dtype=torch.float32, device="cpu")
        self.kept = torch.zeros(2, dtype=torch.int64, device="cpu")
        self.vectors = [0, 0]
        self.sizes = (record.size if isinstance(record, InputGroup) else record.hidden_size, record.size)
        self.makers: list[Callable[[bool], None]] = []
        self.ready = False
        self._turned: list[tuple[Turned, int]] = []

    @uninterrupted()
    def turn(self) -> list[nn.Parameter]:
        """Store the weights input-major and make the kernels; the parameters that have moved."""
        for parameter in _turning(self.record):
            if (turned := turn(parameter)) is not None:
                self._turned.append((turned, parameter.data_ptr()))
        for make in self.makers:
            make(True)
        self.ready = True
        return [turned.parameter for turned, _ in self._turned]

    @uninterrupted()
    def back(self) -> list[nn.Parameter]:
        """Store the weights as they were, but for those whose data somebody has replaced; the parameters that have moved."""
        self.ready = False
        for make in self.makers:
            make(False)
        moved = []
        while self._turned:
            turned, address = self._turned[-1]
            if turned.parameter.data_ptr() == address:
                turned.back()
                moved.append(turned.parameter)
            self._turned.pop()
        return moved

    def load(self, state: RecordState) -> None:
        """Take the thresholds of a prompt of one sequence."""
        for which, inputs in state.inputs.items():
            assert inputs.threshold is not None
            (self.x if which == "x" else self.h).fill_(float(inputs.threshold[0]))

    def flush(self, state: RecordState) -> None:
        """Hand the counts to a prompt."""
        for number, (which, kept) in enumerate(zip("xh", self.kept.tolist(), strict=True)):
            if self.vectors[number]:
                state.inputs[which].log(kept, self.vectors[number] * self.sizes[number])
        self.kept.zero_()
        self.vectors = [0, 0]


class RowsExecutor:
    """Turns weights at the first decode step of one sequence, and decodes by rows.

    Parameters
    ----------
    engine : ThresholdEngine
    tracker : PhaseTracker
    masked : MaskedInputs
        Serves what is not such a step.
    on_move : callable
        Told the parameters that have been given other memory.

    Attributes
    ----------
    seconds : float
        Spent turning weights.
    step : int
        Number of the step that runs.
    """

    name = "rows"

    def __init__(
        self,
        engine: ThresholdEngine,
        tracker: PhaseTracker,
        masked: MaskedInputs,
        on_move: Callable[[Iterable[Tensor]], None],
    ) -> None:
        self.engine = engine
        self.tracker = tracker
        self.events = engine.events
        self.room = Room()
        self.seconds = 0.0
        self.step = 0
        self._masked = masked
        self._on_move = on_move
        self._records: dict[int, RowsRecord] = {}
        self._resident: PromptState | None = None
        self._undo: list[Callable[[], object]] = []

    def attach(self, index: int) -> None:
        """Take over record number ``index`` of the engine."""
        record: Any = self.engine.ffns[index]
        mine = self._records[index] = RowsRecord(record)
        if isinstance(record, Experts):
            from .rows_experts import RowsExperts

            experts = RowsExperts(self, index, mine)
            self._undo.append(experts.detach)
            experts.attach()
        else:
            self._attach_modules(index, record, mine)

        def canonical(*_: Any) -> None:
            self._on_move(mine.back())

        for module in record.modules:
            self._undo += before_moves(module, canonical)

    def _attach_modules(self, index: int, record: FFN | InputGroup, mine: RowsRecord) -> None:
        holder = record.holder if isinstance(record, FFN) and _is_one_call(record) else None
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
                self._undo.append(set_instance_attribute(module, "forward", group.forward_of(number)))
        if holder is not None:
            assert isinstance(record, FFN)
            self._undo.append(set_instance_attribute(holder, "forward", self._holder_forward(index, record, mine)))

    def _holder_forward(self, index: int, ffn: FFN, mine: RowsRecord) -> Callable[..., Tensor]:
        """The whole FFN in one call. Hooks on its projections are respected: then those run one by one."""
        holder, tracker, room = ffn.holder, self.tracker, self.room
        norms = self.engine.channel_weights()[index].to(torch.float32).contiguous()
        name = activation_name(ffn.activation)
        assert holder is not None and name is not None
        own_forward = type(holder).forward
        ours = [p.module._forward_pre_hooks for p in ffn.projections]
        others = [p.module._forward_hooks for p in ffn.projections]
        if ffn.activation is not None:
            others += [ffn.activation._forward_hooks, ffn.activation._forward_pre_hooks]
        count = len(ours)
        kernel: RowsFFN | None = None

        def make(wanted: bool) -> None:
            nonlocal kernel
            kernel = None
            if wanted:
                views = [_detached(view) for p in ffn.projections for view in p.narrow_views(ffn.size)]
                gate = views[0] if len(views) == 3 else None
                kernel = RowsFFN(FFNWeights.alone(gate, views[-2], views[-1], name, norms[0]), room)

        mine.makers.append(make)
        x_bound, h_bound, kept = mine.x, mine.h, mine.kept

        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            current = tracker.current
            if (
                current is None
                or not current.fast
                or kernel is None
                or args
                or kwargs
                or sum(map(len, ours)) != count
                or any(others)
                or not kernel.takes(x)
            ):
                return own_forward(holder, x, *args, **kwargs)
            mine.vectors[0] += 1
            mine.vectors[1] += 1
            return kernel(x, x_bound, h_bound, kept)

        return forward

    def detach(self) -> None:
        """Give every weight its own order and every module its own forward back."""
        self.flush()
        self._resident = None
        try:
            for mine in self._records.values():
                mine.back()
        finally:
            while self._undo:
                self._undo.pop()()

    def begin(self, forward: Forward) -> None:
        """Before a decode step: say how it may be computed."""
        plain = forward.length == 1 and not torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")
        forward.few = plain and forward.rows <= MOST_TOKENS
        state: PromptState = forward.state
        if not plain or forward.rows != 1 or state.rows != 1:
            return
        if forward.valid is not None and not bool(forward.valid.all()):
            return
        if (self._resident is not state or not state.moved) and not self._load(state):
            return
        self._turn()
        self.step += 1
        forward.fast = True

    def _load(self, state: PromptState) -> bool:
        """Make a prompt the resident one; False if it decodes dense, for which nothing has to be turned."""
        states: Sequence[Any] = state.ffns
        found = {index: states[index] for index in self._records}
        bounds = [inputs.threshold for one in found.values() for inputs in one.inputs.values()]
        if all(float(bound) == PASS_ALL for bound in torch.cat(bounds).tolist()):
            return False
        self.flush()
        for index, mine in self._records.items():
            mine.load(found[index])
        self._resident, state.moved = state, True
        return True

    @tells("reordering")
    def _turn(self) -> None:
        missing = [mine for mine in self._records.values() if not mine.ready]
        if not missing:
            return
        started = time.perf_counter()
        for mine in missing:
            self._on_move(mine.turn())
        self.seconds += time.perf_counter() - started

    def flush(self) -> None:
        """Hand the counts to the resident prompt."""
        if self._resident is None:
            return
        states: Sequence[Any] = self._resident.ffns
        for index, mine in self._records.items():
            mine.flush(states[index])


class RowsLinears:
    """Linear modules of one input: the first that is called computes all, the others take their part."""

    def __init__(
        self,
        executor: RowsExecutor,
        index: int,
        mine: RowsRecord,
        modules: Sequence[nn.Module],
        norms: Tensor | None = None,
    ) -> None:
        self.modules = modules
        self._executor = executor
        self._index = index
        self._norms = norms
        self._mine = mine
        self._number = 0 if norms is None else 1
        self._bound = mine.x if norms is None else mine.h
        self._kept = mine.kept[self._number : self._number + 1]
        self._hooks = [module._forward_pre_hooks for module in modules]
        self._kernel: RowsLinear | None = None
        self._step = -1
        self._x: Tensor | None = None
        self._version = 0
        self._parts: list[Tensor | None] = [None] * len(modules)
        mine.makers.append(self._make)

    def _make(self, wanted: bool) -> None:
        self._kernel = self._x = None
        if wanted:
            weights: list[Any] = [(m.weight, getattr(m, "bias", None), _is_transposed(m)) for m in self.modules]
            views = [_detached((w if transposed else w.t(), bias)) for w, bias, transposed in weights]
            self._kernel = RowsLinear(views, self._executor.room)

    def alone(self) -> bool:
        """Whether nobody else looks at what the modules are given: then a step need not mask it."""
        return sum(map(len, self._hooks)) == len(self._hooks)

    def forward_of(self, number: int) -> Callable[[Tensor], Tensor]:
        """What to put in the place of a module's forward."""
        module, tracker, executor = self.modules[number], self._executor.tracker, self._executor
        own_forward = type(module).forward
        which = "x" if self._norms is None else "h"

        def forward(input: Tensor) -> Tensor:  # nn.Linear's name for it
            current = tracker.current
            if current is None or not current.fast or not self.alone():
                return own_forward(module, input)
            kernel = self._kernel
            if kernel is None or not kernel.takes(input):
                return own_forward(module, executor.engine.mask(self._index, which, current, input))
            part = self._parts[number]
            if input is not self._x or part is None or self._version != _version(input):
                part = self._compute(kernel, input)[number]
            self._parts[number] = None
            return part.view(*input.shape[:-1], -1)

        return forward

    def _compute(self, kernel: RowsLinear, x: Tensor) -> Sequence[Tensor]:
        kept = None
        if self._step != self._executor.step:
            self._step, kept = self._executor.step, self._kept
            self._mine.vectors[self._number] += 1
        parts = kernel(x, self._bound, self._norms, kept)
        if len(parts) > 1:
            self._x, self._version, self._parts = x, _version(x), list(parts)
        return parts


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def _detached(view: tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor | None]:
    weight, bias = view
    return weight.detach(), None if bias is None else bias.detach()


def _is_one_call(ffn: FFN) -> bool:
    """Whether the holder's forward is what the kernel computes."""
    return activation_name(ffn.activation) is not None and direct_forward_fits(ffn)


__all__ = ["RowsExecutor", "RowsLinears", "RowsRecord", "why_not"]
