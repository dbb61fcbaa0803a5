"""Linear modules that read the chosen rows of their weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from ..formats import stored
from ..kernels import View
from ..methods.thresholds import PASS_ALL
from ..ops import input_major
from ..ops.gpu_rows import GPURowsLinear
from ..ops.rows import Room, RowsLinear
from .rows_record import RowsRecord, is_transposed

if TYPE_CHECKING:
    from .rows import RowsExecutor

_FEW = 4  # tokens that are faster one by one, by the kernel of one


class RowsLinears:
    """Linear modules of one input: the first that is called computes all, the others take their part.

    Attributes
    ----------
    modules : sequence of nn.Module
    kernel : RowsLinear, GPURowsLinear or None
        None while the weights are not turned.
    bound, kept : Tensor
        ``[1]`` each: the threshold, and how many entries were kept.
    forwards : list of callable
        What stands in the place of the modules' forwards.
    """

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
        self.bound = mine.x if norms is None else mine.h
        self.kept = mine.kept[self._number : self._number + 1]
        self._hooks = [module._forward_pre_hooks for module in modules]
        self.kernel: RowsLinear | GPURowsLinear | None = None
        self.forwards = [self._forward_of(number) for number in range(len(modules))]
        self._step = -1
        self._x: Tensor | None = None
        self._version = 0
        self._parts: list[Tensor | None] = [None] * len(modules)
        self._wholes: list[_Whole] = []  # of each module, where torch's own product would be slow
        mine.makers.append(self._make)

    def _make(self, wanted: bool) -> None:
        self.kernel = self._x = None
        self._wholes = []
        if wanted:
            views, scales, dtype = input_major_views(self.modules)
            executor = self._executor
            if executor.triton:
                self.kernel = GPURowsLinear(views, dtype, scales)
                return
            self.kernel = RowsLinear(views, executor.room, dtype, scales)
            if input_major.is_slow(dtype):
                factors = [None] * len(views) if scales is None else scales
                pairs = zip(views, factors, strict=True)
                self._wholes = [_Whole(view, scale, executor.room, dtype) for view, scale in pairs]

    def alone(self) -> bool:
        """Whether nobody else looks at what the modules are given: then a step need not mask it."""
        return sum(map(len, self._hooks)) == len(self._hooks)

    def _forward_of(self, number: int) -> Callable[[Tensor], Tensor]:
        module, tracker, executor = self.modules[number], self._executor.tracker, self._executor
        own_forward, parameters = type(module).forward, cast("dict[str, Tensor]", module._parameters)
        which = "x" if self._norms is None else "h"

        def whole(input: Tensor) -> Tensor:
            if self._wholes and self._wholes[number].takes(input, parameters["weight"]):
                return self._wholes[number](input)
            return own_forward(module, input)

        def forward(input: Tensor) -> Tensor:  # nn.Linear's name for it
            current = tracker.current
            if current is None or not current.fast or not self.alone():
                return whole(input)
            kernel = self.kernel
            if kernel is None or not kernel.takes(input):
                return whole(executor.engine.mask(self._index, which, current, input))
            part = self._parts[number]
            if input is not self._x or part is None or self._version != _version(input):
                part = self._compute(kernel, input)[number]
            self._parts[number] = None
            return part.view(*input.shape[:-1], -1)

        return forward

    def together(self, x: Tensor) -> Sequence[Tensor] | None:
        """What every module makes of ``x`` in a fast step in which nobody else looks, ``[out]`` each; None if it cannot."""
        kernel = self.kernel
        return self._run(kernel, x) if kernel is not None and kernel.takes(x) else None

    def _compute(self, kernel: RowsLinear | GPURowsLinear, x: Tensor) -> Sequence[Tensor]:
        parts = self._run(kernel, x)
        if len(parts) > 1:
            self._x, self._version, self._parts = x, _version(x), list(parts)
        return parts

    @property
    def counts(self) -> bool:
        """Whether the next call is the first one of this step: the others are not counted."""
        return self._step != self._executor.step

    def count(self) -> None:
        """One token is about to be computed."""
        self._step = self._executor.step
        self._mine.vectors[self._number] += 1

    def _run(self, kernel: RowsLinear | GPURowsLinear, x: Tensor) -> Sequence[Tensor]:
        kept = None
        if self.counts:
            kept = self.kept
            self.count()
        return kernel(x, self.bound, self._norms, kept)


class _Whole:
    """A linear module with all rows of its turned weight."""

    def __init__(self, view: View, scale: Tensor | None, room: Room, dtype: torch.dtype) -> None:
        self._view, self._scale = view, scale
        self._one = RowsLinear([view], room, dtype, None if scale is None else [scale])
        self._bound = torch.full((1,), PASS_ALL, device="cpu")

    def takes(self, x: Tensor, weight: Tensor) -> bool:
        return x.shape[-1] == self._one.columns and input_major.helps(x, weight)

    def __call__(self, x: Tensor) -> Tensor:
        if x.numel() > _FEW * self._one.columns:
            return input_major.product(x, *self._view, self._scale)
        rows = x.reshape(-1, self._one.columns)
        out = torch.stack([self._one(row, self._bound)[0] for row in rows])
        return out.view(*x.shape[:-1], -1)


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def input_major_views(modules: Sequence[nn.Module]) -> tuple[list[View], list[Tensor] | None, torch.dtype]:
    """Weights as they are stored, ``[in, out]``, with biases; what scales their outputs, ``[out]``, if it is; and the dtype."""
    views, scales = [], []
    for module in modules:
        weight: Any = module.weight
        found = stored(weight)
        assert found is not None, "why_not() was not asked"
        matrix = found.matrix if is_transposed(module) else found.matrix.t()
        views.append(detached((matrix, module._parameters.get("bias"))))
        scales += [] if found.scale is None else [found.scale.view(-1)]
    return views, scales or None, weight.dtype


def blocks(view: View, count: int) -> list[View]:
    """A view's outputs in so many parts: gate and up where they are fused."""
    if count == 1:
        return [view]
    weight, bias = view
    biases = [None] * count if bias is None else bias.chunk(count)
    return list(zip(weight.chunk(count, 1), biases, strict=True))


def detached(view: View) -> View:
    """Without gradients."""
    weight, bias = view
    return weight.detach(), None if bias is None else bias.detach()


__all__ = ["RowsLinears", "blocks", "detached", "input_major_views"]
