"""What thresholds know about one prompt: of each input counts of magnitudes, its threshold, and what was kept of it."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ..tracking.phase import Forward
from ..weights.experts import Experts
from ..weights.groups import InputGroup
from ..weights.layout import FFN
from .correction import Correction
from .state import PromptState

Record = FFN | Experts | InputGroup


class InputState:
    """What one prompt knows about one input.

    Attributes
    ----------
    counts : mapping of int to Tensor
        Modality -> ``[B, BINS]``: magnitudes of the prompt's entries, in bins. Never changed in place, so copies share them.
    width : int
        Entries of a token's input.
    threshold : Tensor or None
        ``[B]``, float32; None before the first decode step.
    kept : Tensor or float
        Entries that the decode steps kept.
    entries : Tensor or float
        Entries that they had.
    """

    def __init__(self) -> None:
        self.counts: Mapping[int, Tensor] = {}
        self.width = 0
        self.threshold: Tensor | None = None
        self.kept: Tensor | float = 0.0
        self.entries: Tensor | float = 0.0
        self._seen_in: weakref.ref[Forward] | None = None

    def first_in(self, forward: Forward) -> bool:
        """Whether this input is seen for the first time in a forward: modules of a group are given the same one."""
        if self._seen_in is not None and self._seen_in() is forward:
            return False
        self._seen_in = weakref.ref(forward)
        return True

    def log(self, kept: Tensor, entries: Tensor | float) -> None:
        """Count what decode steps kept of what they had."""
        self.kept, self.entries = self.kept + kept, self.entries + entries

    def select_rows(self, rows: Tensor) -> None:
        """Row b is row ``rows[b]`` of before."""
        self.counts = {modality: counts[rows.to(counts.device)] for modality, counts in self.counts.items()}
        if self.threshold is not None:
            self.threshold = self.threshold[rows.to(self.threshold.device)]


class RecordState:
    """What one prompt knows about one record: an :class:`InputState` for x and, where there is one, h."""

    def __init__(self, record: Record) -> None:
        self.inputs = {which: InputState() for which in record.by_input}

    @property
    def partition(self) -> object | None:
        """Something if the thresholds are known (the name that POP's states have for it)."""
        known = [state.threshold for state in self.inputs.values()]
        return None if any(found is None for found in known) else known

    def copy(self) -> RecordState:
        """An independent copy. Tensors are never changed in place, so it shares them."""
        twin = copy.copy(self)
        twin.inputs = {name: copy.copy(state) for name, state in self.inputs.items()}
        return twin

    snapshot = copy

    def restore(self, before: RecordState) -> None:
        """Know what was known before a prefill that was cropped off. Counts of decode steps go on."""
        for name, state in self.inputs.items():
            state.counts, state.threshold = before.inputs[name].counts, before.inputs[name].threshold

    def invalidate(self) -> None:
        """More of the prompt comes: the thresholds so far no longer hold."""
        for state in self.inputs.values():
            state.threshold = None

    def select_rows(self, rows: Tensor) -> None:
        """Row b is row ``rows[b]`` of before."""
        for state in self.inputs.values():
            state.select_rows(rows)


class ThresholdState(PromptState):
    """What is known about one prompt, and the correction of its thresholds."""

    def __init__(self, ffns: Sequence[Any], rows: int, cache: Any, correction: Correction) -> None:
        super().__init__(ffns, rows, cache)
        self.correction = correction

    def copy(self, cache: Any) -> PromptState:
        """The same knowledge for a copy of the cache."""
        twin = super().copy(cache)
        assert isinstance(twin, ThresholdState)
        twin.correction = self.correction.copy()
        return twin

    def restore(self, chunk: Any, before: PromptState) -> None:
        """Know what was known before a prefill forward that was cropped off the cache."""
        super().restore(chunk, before)
        self.correction.restart()

    def invalidate(self) -> None:
        """More of the prompt comes: the thresholds so far no longer hold."""
        super().invalidate()
        self.correction.restart()

    def select_rows(self, rows: Tensor) -> None:
        """Row b is row ``rows[b]`` of before."""
        super().select_rows(rows)
        self.correction.select_rows(rows)


__all__ = ["InputState", "Record", "RecordState", "ThresholdState"]
