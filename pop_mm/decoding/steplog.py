"""Which candidates the decode steps kept, boiled down to a few numbers as it goes."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from ..partition import Sizes

_FOLD_EVERY = 32  # steps kept as they are before they are folded into sums


class StepLog:
    """Collects the choice of every step, reduced to how many channels were active and how many stayed active.

    Parameters
    ----------
    sizes : Sizes
    """

    def __init__(self, sizes: Sizes) -> None:
        self._sizes = sizes
        self._recent: Tensor | None = None  # [B or 1, 32, n]: the steps that are not folded yet
        self._slots: tuple[Tensor, ...] = ()
        self._start, self._bytes = 0, 8 * sizes.candidates_dropped  # where they are, and the size of one
        self._count = 0
        self._ranks: Tensor | None = None  # of the recent steps
        self._last: Tensor | None = None  # [B or 1, |C|]: candidates kept by the last folded step
        self._stayed: Tensor | None = None
        self._active: Tensor | None = None
        self._transitions = 0
        self.steps = 0

    def copy(self) -> StepLog:
        """An independent copy."""
        self._fold()
        twin = copy.copy(self)
        twin._recent, twin._slots = None, ()
        return twin

    def slot(self, ranks: Tensor | None, device: torch.device) -> Tensor:
        """``[1, n]`` to write one step of one sequence into, as :meth:`add` takes it; good until 32 steps later."""
        self.address(ranks, device)
        return self._slots[self._count - 1]

    def address(self, ranks: Tensor | None, device: torch.device) -> int:
        """That of :meth:`slot`: looking at a tensor costs more than a small choice."""
        count = self._count
        if count == _FOLD_EVERY or ranks is not self._ranks or not self._slots:
            self._fold()
            self._ranks, count = ranks, 0
            if not self._slots:
                self._recent = self._buffer(1, device)
                self._slots, self._start = self._recent.unbind(1), self._recent.data_ptr()
        self._count = count + 1
        return self._start + count * self._bytes

    def add(self, dropped: Tensor, ranks: Tensor | None = None) -> None:
        """Record steps: ``[q, n]`` (shared) or ``[B, q, n]``, the candidates left out by each.

        ``ranks`` (``[|C|]``) says which candidate each index stands for, if the backend keeps them in another order.
        """
        dropped = dropped.unsqueeze(0) if dropped.dim() == 2 else dropped
        rows, steps, _ = dropped.shape
        if ranks is not self._ranks or self._count + steps > _FOLD_EVERY:
            self._fold()
            self._ranks = ranks
        if steps > _FOLD_EVERY:
            self._fold_steps(dropped)
            return
        if self._recent is None or len(self._recent) != rows:
            self._fold()
            self._recent, self._slots = self._buffer(rows, dropped.device), ()
        self._recent[:, self._count : self._count + steps] = dropped
        self._count += steps

    def select_rows(self, rows: Tensor) -> None:
        """Row b continues row ``rows[b]``."""
        self._fold()
        if self._last is not None and len(self._last) > 1:
            self._last = self._last[rows.to(self._last.device)]

    @torch.inference_mode(False)
    def _buffer(self, rows: int, device: torch.device) -> Tensor:
        return torch.empty(rows, _FOLD_EVERY, self._sizes.candidates_dropped, dtype=torch.int64, device=device)

    def _fold(self) -> None:
        if self._count:
            assert self._recent is not None
            self._fold_steps(self._recent[:, : self._count])
            self._count = 0

    def _fold_steps(self, dropped: Tensor) -> None:
        if self._ranks is not None:
            dropped = self._ranks[dropped]
        shape = (*dropped.shape[:2], self._sizes.candidates)
        kept = torch.ones(shape, dtype=torch.bool, device=dropped.device).scatter_(-1, dropped, False)
        active = kept.sum(-1).double().mean(0).sum() + self._sizes.retained * kept.shape[1]
        self._active = active if self._active is None else self._active + active
        self.steps += kept.shape[1]
        if self._last is not None and len(self._last) == len(kept):
            kept = torch.cat([self._last.unsqueeze(1), kept], 1)
        stayed = (kept[:, 1:] & kept[:, :-1]).sum(-1).double().mean(0).sum()
        self._stayed = stayed if self._stayed is None else self._stayed + stayed
        self._transitions += kept.shape[1] - 1
        self._last = kept[:, -1]

    def mean_active(self) -> float | None:
        """Mean number of active channels of a step, or None before the first step."""
        self._fold()
        return float(self._active) / self.steps if self._active is not None else None

    def stability(self) -> float | None:
        """Mean share of a step's kept candidates that the next step keeps too, or None before the second step."""
        self._fold()
        if self._stayed is None or not self._transitions or not self._sizes.candidates_kept:
            return None
        return float(self._stayed) / self._transitions / self._sizes.candidates_kept
