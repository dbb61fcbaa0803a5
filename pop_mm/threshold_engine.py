"""Thresholds for one model: what a prompt's state holds of each input, and the masking of the inputs. Knows no module.

A *record* is an FFN, the routed experts of a layer, or a group of attention modules. Each has an input ``x``; FFNs and
experts have ``h`` in front of the down projection too. Every sequence has thresholds of its own.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .config import PopConfig
from .engine import Engine, PromptState
from .errors import NonFiniteError, SessionError
from .experts import Experts
from .groups import InputGroup
from .layout import FFN
from .methods.thresholds import PASS_ALL, histogram, magnitudes, not_finite, threshold
from .modality import ByModality, added
from .phase import Forward, Phase
from .prompt_positions import decode_positions, prompt_masks
from .routed import Slots

Record = FFN | Experts | InputGroup


class InputState:
    """What one prompt knows about one input.

    Attributes
    ----------
    counts : mapping of int to Tensor
        Modality -> ``[B, BINS]``: magnitudes of the prompt's entries, in bins. Never changed in place, so copies share them.
    threshold : Tensor or None
        ``[B]``, float32; None before the first decode step.
    kept : Tensor or float
        Entries that the decode steps kept.
    entries : Tensor or float
        Entries that they had.
    """

    def __init__(self) -> None:
        self.counts: Mapping[int, Tensor] = {}
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
        self.inputs = {"x": InputState()} if isinstance(record, InputGroup) else {"x": InputState(), "h": InputState()}

    @property
    def partition(self) -> object | None:
        """Something if the thresholds are known (the name that POP's states have for it)."""
        known = [state.threshold for state in self.inputs.values()]
        return None if any(found is None for found in known) else known

    def copy(self) -> RecordState:
        """An independent copy."""
        twin = copy.copy(self)
        twin.inputs = {name: copy.copy(state) for name, state in self.inputs.items()}
        return twin

    def invalidate(self) -> None:
        """More of the prompt comes: the thresholds so far no longer hold."""
        for state in self.inputs.values():
            state.threshold = None

    def select_rows(self, rows: Tensor) -> None:
        """Row b is row ``rows[b]`` of before."""
        for state in self.inputs.values():
            state.select_rows(rows)


class ThresholdEngine(Engine):
    """The method, over the records of one model.

    Parameters
    ----------
    records : sequence of FFN, Experts or InputGroup
    shares : sequence of mapping
        Of each record, input -> share of its entries that is kept.
    config : PopConfig
    modalities : int
        How many the model can have.
    """

    def __init__(
        self, records: Sequence[Any], shares: Sequence[Mapping[str, float]], config: PopConfig, modalities: int = 1
    ) -> None:
        super().__init__(records, [], config, modalities)
        self.shares = shares

    @property
    def per_sequence(self) -> bool:
        """Always: every row has its own thresholds."""
        return True

    def new_state(self, rows: int, cache: Any) -> PromptState:
        """State of a new prompt of ``rows`` sequences."""
        states: list[Any] = [RecordState(record) for record in self.ffns]  # type: ignore[arg-type]
        return PromptState(states, rows, cache)

    def _read(self, index: int) -> Tensor:
        """Norms of the down projection's columns, ``[D]`` or ``[E, D]``, float32; nothing of attention."""
        record: Any = self.ffns[index]
        return torch.empty(0) if isinstance(record, InputGroup) else record.down_column_norms().float()

    def state(self, index: int, forward: Forward) -> RecordState:
        """What the forward's prompt knows about record number ``index``."""
        found = forward.state.ffns[index]
        assert isinstance(found, RecordState)
        return found

    def routed(self, index: int) -> Any:
        """What masks the inputs of the down projections of routed experts."""
        return _Hidden(self, index)

    # prefill --------------------------------------------------------------------------------------------------------

    def _observe(self, state: InputState, forward: Forward, scores: Tensor) -> None:
        """Count the magnitudes ``[B, q, n]`` of the prompt's tokens."""
        rows = torch.arange(forward.rows, device=scores.device).unsqueeze(1).expand(-1, forward.length)
        for modality, mask in self._by_modality(forward, scores.device):
            lines, where = (scores.flatten(0, 1), rows.flatten()) if mask is None else (scores[mask], rows[mask])
            found = histogram(lines, where, forward.rows)
            state.counts = added(state.counts, modality, found)

    @staticmethod
    def _by_modality(forward: Forward, device: torch.device) -> list[ByModality]:
        if device not in forward.by_modality:
            forward.by_modality[device] = prompt_masks(forward, device)
        return forward.by_modality[device]

    def check_finite(self, state: PromptState) -> None:
        """Raise :class:`NonFiniteError` if the prompt's magnitudes are not finite; one look for all records."""
        found = []
        for index, record in enumerate(state.ffns):
            assert isinstance(record, RecordState)
            for which, inputs in record.inputs.items():
                found += [(index, which, not_finite(counts)) for counts in inputs.counts.values()]
        if not found:
            return
        bad = torch.stack([count.to(found[0][2].device) for *_, count in found]).nonzero()
        if len(bad):
            index, which, _ = found[int(bad[0])]
            what = "input" if which == "x" else "activations"
            raise NonFiniteError(
                f"The {what} of {self.ffns[index].name} are NaN or infinite in the prompt, so there are no thresholds for "
                "them. Check the weights and inputs, or run the model in bfloat16 or float32 if it overflows in float16."
            )

    # decode ---------------------------------------------------------------------------------------------------------

    def partition_all(self, state: PromptState) -> None:
        """Set every threshold that is missing; before the first decode step."""
        self.check_prompt(state)
        for index, record in enumerate(state.ffns):
            assert isinstance(record, RecordState)
            for which in record.inputs:
                self._decide(index, which, state)

    def _decide(self, index: int, which: str, state: PromptState) -> Tensor:
        """The thresholds of one input, ``[B]``."""
        record = state.ffns[index]
        assert isinstance(record, RecordState)
        inputs = record.inputs[which]
        if inputs.threshold is None:
            found = threshold(inputs.counts, state.tokens_of, self.shares[index][which])
            if found is None:  # a layer that the prompt did not run decodes dense
                found = torch.full((state.rows,), PASS_ALL)
            inputs.threshold = found
        return inputs.threshold

    def mask(self, index: int, which: str, forward: Forward, values: Tensor) -> Tensor:
        """Observe the prompt's entries of one input, and zero those of decode steps that do not pass.

        Parameters
        ----------
        which : {"x", "h"}
        values : Tensor
            ``[B, q, n]`` or ``[B * q, n]``.

        Returns
        -------
        Tensor
            Like ``values``; the very same where nothing is left out.
        """
        tokens = forward.rows * forward.length
        if values.shape[:-1].numel() != tokens:
            raise SessionError(
                f"{self.ffns[index].name} was given an input of shape {tuple(values.shape)} in a forward of {tokens} tokens, so "
                "it is unknown which token an entry belongs to. Its adapter should not name it among the inputs."
            )
        state = self.state(index, forward).inputs[which]
        weight = self.channel_weights()[index].to(values.device) if which == "h" else None
        flat = values.reshape(forward.rows, forward.length, values.shape[-1])
        first = state.first_in(forward)
        if forward.phase is not Phase.DECODE and first:
            self._observe(state, forward, magnitudes(flat, weight))
        if forward.phase is Phase.PREFILL:
            return values
        found = self._decide(index, which, forward.state).to(values.device).view(-1, 1, 1)
        keep = magnitudes(flat, weight) > found
        decode = decode_positions(forward, values.device) if forward.phase is Phase.MIXED else None
        if first:
            self._log(state, forward, keep, decode)
        if decode is not None:
            keep = keep | ~decode.unsqueeze(-1)
        return flat.where(keep, 0).view(values.shape)

    @staticmethod
    def _log(state: InputState, forward: Forward, keep: Tensor, decode: Tensor | None) -> None:
        """Count what the decode steps ``[B, q]`` (None: all) keep, those of finished rows and padding left out."""
        counted = decode
        if forward.valid is not None:
            valid = forward.valid.to(keep.device)
            counted = valid if decode is None else valid & decode
        if counted is None:
            state.log(keep.sum(), float(keep.numel()))
        else:
            state.log((keep & counted.unsqueeze(-1)).sum(), counted.sum() * keep.shape[-1])


class _Hidden:
    """The inputs of the down projections of a layer's routed experts; one threshold serves all experts."""

    def __init__(self, engine: ThresholdEngine, index: int) -> None:
        self._engine = engine
        self._index = index

    def apply(self, forward: Forward, record: RecordState, h: Tensor, slots: Slots, _: None) -> Tensor:
        """Like :meth:`ThresholdEngine.mask` for ``[N, D]``: one line for each token and expert."""
        engine, state = self._engine, record.inputs["h"]
        scores = magnitudes(h, engine.channel_weights()[self._index].to(h.device)[slots.expert])
        decode = torch.ones_like(slots.valid)
        if forward.phase is Phase.PREFILL:
            decode = ~decode
        elif forward.phase is Phase.MIXED:
            decode = decode_positions(forward, h.device)[slots.row, slots.column]
        if forward.phase is not Phase.DECODE and state.first_in(forward):
            prompt = slots.valid & ~decode
            for modality in slots.modality[prompt].unique().tolist():
                mine = prompt & (slots.modality == modality)
                found = histogram(scores[mine], slots.row[mine], forward.rows)
                state.counts = added(state.counts, modality, found)
        if forward.phase is Phase.PREFILL:
            return h
        found = engine._decide(self._index, "h", forward.state).to(h.device)
        keep = scores > found.expand(forward.rows)[slots.row].unsqueeze(1)
        counted = slots.valid & decode
        state.log((keep & counted.unsqueeze(1)).sum(), counted.sum() * h.shape[1])
        return h.where(keep | ~decode.unsqueeze(1), 0)


__all__ = ["InputState", "Record", "RecordState", "ThresholdEngine"]
