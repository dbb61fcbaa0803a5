"""Which candidates the decode steps kept, boiled down to a few numbers as it goes."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from .partition import Sizes

_FOLD_EVERY = 32  # steps kept as they are before they are folded into sums, so that a step costs one list append


class StepLog:
    """Collects the choice of every step, reduced to how many channels were active and how many stayed active.

    Parameters
    ----------
    sizes : Sizes
    """

    def __init__(self, sizes: Sizes) -> None:
        self._sizes = sizes
        self._pending: list[Tensor] = []
        self._ranks: Tensor | None = None  # of the pending steps
        self._last: Tensor | None = None  # [B or 1, |C|]: candidates kept by the last folded step
        self._stayed: Tensor | None = None
        self._active: Tensor | None = None
        self._transitions = 0
        self.steps = 0

    def copy(self) -> StepLog:
        """An independent copy."""
        twin = copy.copy(self)
        twin._pending = list(self._pending)
        return twin

    def add(self, dropped: Tensor, ranks: Tensor | None = None) -> None:
        """Record steps: ``[q, n]`` (shared) or ``[B, q, n]``, the candidates left out by each.

        ``ranks`` (``[|C|]``) says which candidate each index stands for, if the backend keeps them in another order.
        """
        if ranks is not self._ranks:
            self._fold()
            self._ranks = ranks
        self._pending.append(dropped)
        if len(self._pending) >= _FOLD_EVERY:
            self._fold()

    def reorder(self, parents: Tensor) -> None:
        """Row b continues row ``parents[b]``."""
        self._fold()
        if self._last is not None and len(self._last) == len(parents):
            self._last = self._last[parents.to(self._last.device)]

    def _fold(self) -> None:
        if not self._pending:
            return
        dropped = torch.cat([d.unsqueeze(0) if d.dim() == 2 else d for d in self._pending], 1)
        self._pending = []
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
