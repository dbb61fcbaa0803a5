"""The fast backend for ``batch="per_sequence"`` on a GPU: each row reads its own channels, and nothing is reordered.

Rows of gate and up lie together in memory; columns of down do once it is stored column by column, which it is within a
session, in the same Parameter. Prefill, and any step that the kernels do not take, runs as the masked backend does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..decoding.channel_engine import ChannelEngine
from ..kernels.gpu import MAX_ROWS, GatheredStep, fits
from ..partition import Partition
from ..patching import Patches
from ..tracking.phase import Forward, PhaseTracker
from ..weights.layout import FFN, Projection
from .base import current_forward, dense_ffn, hooks_on_parts
from .direct import direct_forward_fits


class GatheredExecutor:
    """Replaces the forwards of an FFN's holder (decode steps) and of its down projection (the reference path)."""

    name = "gathered"

    def __init__(self, engine: ChannelEngine, tracker: PhaseTracker) -> None:
        self._engine = engine
        self._tracker = tracker
        self._steps: dict[int, _ResidentStep] = {}
        self._patches = Patches()

    def attach(self, index: int) -> None:
        """Take over FFN number ``index`` of the engine, one that :func:`gathered_fits`."""
        ffn = dense_ffn(self._engine, index)
        holder = ffn.holder
        assert holder is not None
        if _store_by_column(ffn.down):
            self._patches.undo_by(_store_by_row, ffn.down)
        self._steps[index] = _ResidentStep(self._engine, index)
        for module, forward in (
            (ffn.down.module, self._down_forward(index)),
            (holder, self._holder_forward(index)),
        ):
            self._patches.forward(module, forward)

    def detach(self) -> None:
        """Restore the modules' own forwards, and down's weights to where they were stored row by row."""
        self._patches.undo()
        self._steps.clear()

    def begin(self, forward: Forward) -> None:
        """Before a decode step: say whether the kernels may compute it, and give them each row's channels."""
        forward.fast = forward.length == 1 and forward.rows <= MAX_ROWS and not torch.is_grad_enabled()
        if forward.fast:
            for step in self._steps.values():
                step.follow(forward)

    def _down_forward(self, index: int) -> Callable[[Tensor], Tensor]:
        ffn, engine, tracker = dense_ffn(self._engine, index), self._engine, self._tracker
        module, own_forward = ffn.down.module, type(ffn.down.module).forward

        def forward(h: Tensor) -> Tensor:
            return own_forward(module, engine.mask(index, "h", current_forward(tracker, ffn), h))

        return forward

    def _holder_forward(self, index: int) -> Callable[..., Tensor]:
        """Hooks on the projections are respected: then the module's own forward runs, on all channels."""
        ffn, tracker, resident = dense_ffn(self._engine, index), self._tracker, self._steps[index]
        holder = ffn.holder
        assert holder is not None
        own_forward = type(holder).forward
        hooks = hooks_on_parts(ffn)

        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            current = tracker.current
            rows = x.reshape(-1, x.shape[-1])
            if current is None or not current.fast or any(hooks) or not resident.takes(rows, current):
                return own_forward(holder, x, *args, **kwargs)
            return resident.compute(rows, current).view(x.shape)

        return forward


class _ResidentStep:
    """The kernels' step of one FFN, which follows the weights and the prompt."""

    def __init__(self, engine: ChannelEngine, index: int) -> None:
        self._index = index
        self._ffn, self._sizes = dense_ffn(engine, index), engine.sizes[index]
        self._parameters: list[Any] = [module._parameters for module in self._ffn.modules]
        self._read()

    def _read(self) -> None:
        self._step = GatheredStep(self._ffn, self._sizes) if fits(self._ffn) else None
        self._addresses = self._addresses_now()
        self._loaded: Partition | None = None

    def _addresses_now(self) -> list[int]:
        return [parameters["weight"].data_ptr() for parameters in self._parameters]

    def follow(self, forward: Forward) -> None:
        """Before a decode step."""
        if self._addresses_now() != self._addresses:
            self._read()
        state = forward.state.ffns[self._index]
        if state.partition is not self._loaded and self._step is not None:
            self._step.load(state.partition.front(), state.candidate_weight)
            self._loaded = state.partition

    def takes(self, rows: Tensor, current: Forward) -> bool:
        """Whether the kernels can compute these tokens, ``[B, H]``."""
        return self._step is not None and len(rows) == current.rows and self._step.takes(rows)

    def compute(self, rows: Tensor, current: Forward) -> Tensor:
        """The FFN of one token a row, ``[B, H]``; its choice goes into the prompt's log."""
        assert self._step is not None
        out = self._step(rows)
        if self._sizes.candidates:
            current.state.ffns[self._index].steps.add(self._step.dropped(len(rows)).unsqueeze(1))
        return out


def gathered_fits(ffn: FFN) -> bool:
    """Whether this backend can serve an FFN with plain weights; on the meta device, as far as its structure tells."""
    if ffn.holder is None or not fits(ffn):
        return False
    return ffn.device.type == "meta" or direct_forward_fits(ffn)


@torch.inference_mode(False)
def _store_by_column(down: Projection) -> bool:
    """Let the columns of a weight that is stored row by row lie together in memory; whether anything was done."""
    if not down.linear_weight().is_contiguous():
        return False
    down.weight.data = down.weight.data.t().contiguous().t()
    return True


@torch.inference_mode(False)
def _store_by_row(down: Projection) -> None:
    """Undo :func:`_store_by_column`, with the strides of before; harmless to a weight that was put in its place."""
    down.weight.data = down.weight.data.contiguous()
