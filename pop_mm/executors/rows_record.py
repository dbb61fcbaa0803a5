"""The weights of a record that are read by rows: whether they can be, and how they are stored meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..classes import same_class
from ..decoding.threshold_state import RecordState
from ..formats import tensors_behind
from ..interrupts import uninterrupted
from ..kernels.activations import ACTIVATIONS, activation_name
from ..methods.thresholds import PASS_ALL
from ..ops import gpu_rows, library
from ..ops.turn import Turned, turn
from ..ops.turn import why_not as why_not_turned
from ..weights.experts import Experts
from ..weights.groups import InputGroup
from ..weights.layout import FFN, Projection


def why_not(
    record: FFN | Experts | InputGroup, plain_types: Sequence[type[nn.Module] | str], triton: bool = False
) -> str | None:
    """Why a record's weights cannot be read by rows, or None if they can; one that is not loaded is judged as on a CPU.

    Parameters
    ----------
    plain_types : sequence of type or str
        Classes of modules that are ``x @ W.T + b``, as :class:`pop_mm.weights.layout.Projection` takes them.
    triton : bool
        Whether by the Triton kernels, where those run, instead of compiled ones on a CPU.
    """
    if isinstance(record, Experts):
        reason = record.why_not_plain()
        if reason is None and triton and not record.down.is_meta and whole_activation(record) is None:
            reason = "the Triton kernels of chosen rows know experts that are act(gate) * up, gate first, and no others"
        module: Any = record.module
        if reason is None and module._is_expert_parallel:
            reason = f"the experts of {record.name} are on several devices"
    else:
        projections = _projections(record, plain_types)
        reason = next((why for p in projections if (why := p.why_not_moved())), None)
    if reason is not None:
        return reason
    parameters = [p for module in record.modules for p in module.parameters(False)]
    tensors = [tensor for p in parameters for tensor in tensors_behind(p)]
    if len({p.device for p in tensors}) > 1 or (not triton and tensors[0].device.type not in ("cpu", "meta")):
        return f"the weights of {record.name} are on {', '.join(sorted({str(p.device) for p in tensors}))}"
    stored = {p.dtype for p in map(matrix_of, parameters) if p.dim() > 1}
    if len({p.dtype for p in parameters}) > 1 or len(stored) > 1:
        return f"the weights of {record.name} have several dtypes"
    of = gpu_rows if triton else library
    if (reason := of.why_not_dtypes(parameters[0].dtype, stored.pop())) is not None:
        return f"there are no {'Triton' if triton else 'compiled'} kernels: {reason}"
    for weight in (p for p in map(matrix_of, parameters) if p.dim() > 1 and p.device.type != "meta"):
        if not weight.is_contiguous() and (reason := why_not_turned(weight)):
            return f"a weight of {record.name} cannot be turned: {reason}"
    turning = [p for p in _turning(record) if p.device.type != "meta"]
    reason = next((why for p in turning if (why := why_not_turned(p))), None)
    return None if reason is None else f"a weight of {record.name} cannot be turned: {reason}"


@torch.no_grad()
def whole_activation(record: Experts) -> str | None:
    """The activation, if experts are ``act(gate) * up`` or ``act(up)``, gate first, and nothing else; None otherwise."""
    module: Any = record.module
    name = activation_name(getattr(module, "act_fn", None))
    if name is None or getattr(module, "has_post_expert_norm", False):
        return None
    if not module.has_gate:
        return name
    if not module.is_concatenated:
        return None
    x = torch.randn(2, 2 * record.size, generator=torch.Generator().manual_seed(0)).mul_(4)
    x = x.to(record.down.device, record.down.dtype)
    gate, up = x.chunk(2, -1)
    try:
        found = module._apply_gate(x)
    except Exception:  # whatever it wants, it is asked as it stands
        return None
    expected = ACTIVATIONS[name](gate) * up
    return name if found.shape == expected.shape and torch.allclose(found, expected, rtol=0.01, atol=0.01) else None


def _projections(record: FFN | InputGroup, plain_types: Sequence[type[nn.Module] | str]) -> Sequence[Projection]:
    if isinstance(record, FFN):
        return record.projections
    return [
        Projection(f"a module of {record.name}", m, "out", 1, is_transposed(m), tuple(plain_types))
        for m in record.modules
    ]


def is_transposed(module: nn.Module) -> bool:
    """Whether a module's class stores its weight input-major."""
    return same_class(type(module), "transformers.pytorch_utils:Conv1D")


def matrix_of(parameter: Tensor) -> Tensor:
    """The tensor behind a weight that holds its entries; of biases and norms, themselves."""
    return tensors_behind(parameter)[0]


def _turning(record: FFN | Experts | InputGroup) -> list[Tensor]:
    """The matrices of weights that are not stored input-major by their class."""
    if isinstance(record, Experts):
        module: Any = record.module
        return [] if module.is_transposed else [getattr(module, record.input_name), module.down_proj]
    if isinstance(record, FFN):
        pairs = [(p.module, p.transposed) for p in record.projections]
    else:
        pairs = [(module, is_transposed(module)) for module in record.modules]
    return [matrix_of(module.weight) for module, transposed in pairs if not transposed]  # type: ignore[arg-type]


class RowsRecord:
    """One record: its weights while they are turned, its thresholds at fixed addresses, and counts of what was kept.

    Parameters
    ----------
    record : FFN, Experts or InputGroup
    kept : Tensor
        ``[2]``, int64, zeros, where the record is: entries of x and h that were kept.

    Attributes
    ----------
    x, h : Tensor
        ``[1]`` and ``[E]``, float32: the resident prompt's thresholds.
    vectors : list of int
        How many vectors those were among, of x and of h.
    makers : list of callable
        Make kernels on the turned weights, once they are; called with False they drop them.
    """

    def __init__(self, record: Any, kept: Tensor) -> None:
        experts = record.count if isinstance(record, Experts) else 1
        self.record = record
        self.x = torch.full((1,), PASS_ALL, dtype=torch.float32, device=kept.device)
        self.h = torch.full((experts,), PASS_ALL, dtype=torch.float32, device=kept.device)
        self.kept = kept
        self.vectors = [0, 0]
        self.sizes = (record.size if isinstance(record, InputGroup) else record.hidden_size, record.size)
        self.makers: list[Callable[[bool], None]] = []
        self.ready = False
        self._turned: list[tuple[Turned, int]] = []

    @property
    def whole_bytes(self) -> int:
        """Of the weights that a session stores in another order."""
        return sum(parameter.nbytes for parameter in _turning(self.record))

    @property
    def turned(self) -> list[Tensor]:
        """The matrices that are stored in another order now."""
        return [turned.parameter for turned, _ in self._turned]

    @property
    def turned_bytes(self) -> int:
        """Of :attr:`turned`."""
        return sum(parameter.nbytes for parameter in self.turned)

    @uninterrupted()
    def turn(self) -> None:
        """Store the weights input-major and make the kernels. Where that fails half-way, the next call goes on."""
        for parameter in _turning(self.record):
            if (turned := turn(parameter)) is not None:
                self._turned.append((turned, parameter.data_ptr()))
        for make in self.makers:
            make(True)
        self.ready = True

    @uninterrupted()
    def back(self) -> list[Tensor]:
        """Store the weights as they were, but for those whose data somebody has replaced; the matrices that have moved."""
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

    def load(self, state: RecordState, factor: Tensor | None) -> None:
        """Take the thresholds of a prompt of one sequence, times a factor (float32) if there is one."""
        for which, inputs in state.inputs.items():
            assert inputs.threshold is not None
            bound = inputs.threshold[0] if factor is None else inputs.threshold[0] * factor
            (self.x if which == "x" else self.h).fill_(float(bound))

    def flush(self, state: RecordState) -> None:
        """Hand the counts to a prompt."""
        for number, (which, kept) in enumerate(zip("xh", self.kept.tolist(), strict=True)):
            if self.vectors[number]:
                state.inputs[which].log(kept, self.vectors[number] * self.sizes[number])
        self.kept.zero_()
        self.vectors[:] = 0, 0


__all__ = ["RowsRecord", "is_transposed", "matrix_of", "whole_activation", "why_not"]
