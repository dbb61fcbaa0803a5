"""A dense FFN by chosen rows in one call."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..kernels.activations import activation_name
from ..ops.gpu_rows import GPURowsFFN
from ..ops.reference import FFNWeights
from ..ops.rows import RowsFFN
from ..weights.layout import FFN
from .base import hooks_of, hooks_on_parts
from .direct import direct_forward_fits
from .rows_linears import blocks, input_major_views
from .rows_record import RowsRecord

if TYPE_CHECKING:
    from .rows import RowsExecutor


def is_one_call(ffn: FFN) -> bool:
    """Whether the holder's forward is what the kernel computes."""
    return activation_name(ffn.activation) is not None and direct_forward_fits(ffn)


class RowsHolder:
    """The module that holds an FFN. Hooks on its projections are respected: then those run one by one.

    Parameters
    ----------
    executor : RowsExecutor
    index : int
        Number of the record.
    mine : RowsRecord
    ffn : FFN
        For which :func:`is_one_call`.

    Attributes
    ----------
    kernel : RowsFFN, GPURowsFFN or None
        None while the weights are not turned.
    """

    def __init__(self, executor: RowsExecutor, index: int, mine: RowsRecord, ffn: FFN) -> None:
        assert ffn.holder is not None
        self.kernel: RowsFFN | GPURowsFFN | None = None
        self.mine = mine
        self._ffn, self._module = ffn, ffn.holder
        self._tracker, self._room, self._triton = executor.tracker, executor.room, executor.triton
        self._norms = executor.engine.channel_weights()[index].to(torch.float32).contiguous()
        self._own_forward = type(ffn.holder).forward
        self._hooks, self._ours = hooks_on_parts(ffn), len(ffn.projections)
        self._outer = hooks_of([ffn.holder])
        mine.makers.append(self._make)

    def _make(self, wanted: bool) -> None:
        self.kernel = None
        if not wanted:
            return
        projections = self._ffn.projections
        whole, factors, dtype = input_major_views([p.module for p in projections])
        pairs = zip(whole, projections, strict=True)
        views = [part for view, p in pairs for part in blocks(view, p.blocks)]
        scales = None
        if factors is not None:
            scales = [part for scale, p in zip(factors, projections, strict=True) for part in scale.chunk(p.blocks)]
        gate, name = views[0] if len(views) == 3 else None, activation_name(self._ffn.activation)
        assert name is not None
        weights = FFNWeights.alone(gate, views[-2], views[-1], name, self._norms[0], scales)
        self.kernel = GPURowsFFN(weights, dtype) if self._triton else RowsFFN(weights, self._room, dtype)

    def alone(self) -> bool:
        """Whether nobody else looks at what its parts are given, or compute."""
        return sum(map(len, self._hooks)) == self._ours

    def nobody_looks(self) -> bool:
        """The same of the module itself too."""
        return self.alone() and not any(self._outer)

    def count(self) -> None:
        """One token is about to be computed."""
        self.mine.vectors[0] += 1
        self.mine.vectors[1] += 1

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """In the place of the module's forward."""
        current, kernel = self._tracker.current, self.kernel
        if (
            current is None
            or not current.fast
            or kernel is None
            or args
            or kwargs
            or not self.alone()
            or not kernel.takes(x)
        ):
            out: Tensor = self._own_forward(self._module, x, *args, **kwargs)
            return out
        self.count()
        return kernel(x, self.mine.x, self.mine.h, self.mine.kept)


__all__ = ["RowsHolder", "is_one_call"]
