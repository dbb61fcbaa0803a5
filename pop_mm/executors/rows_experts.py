"""Routed experts of a layer by chosen rows, for one token."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..kernels import View
from ..ops.gpu_rows import GPURowsFFN
from ..ops.input_major import helps, product
from ..ops.reference import FFNWeights
from ..ops.rows import RowsFFN, RowsLinear
from .experts import MaskedExperts
from .rows_linears import detached
from .rows_record import whole_activation

if TYPE_CHECKING:
    from .rows import RowsExecutor
    from .rows_record import RowsRecord


class RowsExperts(MaskedExperts):
    """A token's experts in one call, or in two with what the module does between its projections; masked for all else."""

    def __init__(self, executor: RowsExecutor, index: int, mine: RowsRecord) -> None:
        super().__init__(executor.engine, index, executor.tracker)
        self._mine = mine
        self._room = None if executor.triton else executor.room
        self._norms = executor.engine.channel_weights()[index].contiguous()
        self._name = whole_activation(self._record)
        self._whole: RowsFFN | GPURowsFFN | None = None
        self._inward: RowsLinear | None = None
        self._outward: RowsLinear | None = None
        mine.makers.append(self._make)

    def _make(self, wanted: bool) -> None:
        self._whole = self._inward = self._outward = None
        if not wanted:
            return
        record = self._record
        views = record.all_views(record.size)
        (inward,), down = map(detached, views.inputs), detached(views.down)
        if self._name is None:
            self._inward, self._outward = (RowsLinear(_apart(view), self._room) for view in (inward, down))
            return
        gate = _part(inward, 0, record.size) if record.module.has_gate else None
        up = inward if gate is None else _part(inward, record.size, 2 * record.size)
        weights = FFNWeights(gate, up, down, self._name, self._norms)
        self._whole = GPURowsFFN(weights) if self._room is None else RowsFFN(weights, self._room)

    def _product(self, hidden: Tensor) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
        turned = self._whole is not None or self._inward is not None
        return product if turned and helps(hidden, self._record.down) else super()._product(hidden)

    @torch.compiler.disable
    def __call__(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """``[T, H]``, ``[T, k]``, ``[T, k]`` to ``[T, H]``: every forward of the experts."""
        kernel = self._whole or self._inward
        if kernel is None or not self.forward.fast or self._is_hooked or not kernel.takes(hidden):
            return super().__call__(hidden, ids, weights)
        mine, chosen = self._mine, ids[0]
        mine.vectors[0] += 1
        mine.vectors[1] += len(chosen)
        if self._whole is not None:
            return self._whole.experts(hidden, chosen, weights[0], mine.x, mine.h, mine.kept)
        assert self._inward is not None and self._outward is not None
        numbers, module = chosen.tolist(), self._module
        wide = torch.stack(self._inward(hidden, mine.x, None, mine.kept[:1], numbers))
        h = self._activate(wide)
        bounds = mine.h[:1].expand(len(numbers)).contiguous()
        out = torch.stack(self._outward(h, bounds, self._norms[chosen], mine.kept[1:], numbers))
        if getattr(module, "has_post_expert_norm", False):
            out = module.post_expert_norm(out)
        return (out * weights[0].unsqueeze(1)).sum(0, keepdim=True).to(hidden.dtype)


def _part(view: View, start: int, end: int) -> View:
    weight, bias = view
    return weight[..., start:end], None if bias is None else bias[..., start:end]


def _apart(view: View) -> list[View]:
    """The matrices of a stack, each with its bias."""
    weight, bias = view
    return [(one, None if bias is None else bias[number]) for number, one in enumerate(weight)]


__all__ = ["RowsExperts"]
