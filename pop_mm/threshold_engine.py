"""Thresholds for one model: what a prompt's state holds of each input, and the masking of the inputs. Knows no module.

A *record* is an FFN, the routed experts of a layer, or a group of attention modules. Each has an input ``x``; FFNs and
experts have ``h`` in front of the down projection too. Every sequence has thresholds of its own.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .config import PopConfig
from .engine import Engine
from .errors import NonFiniteError, SessionError
from .events import Events, tells
from .experts import Experts
from .groups import InputGroup
from .layout import FFN
from .methods.thresholds import PASS_ALL, histogram, kept, magnitudes, not_finite, threshold
from .modality import added
from .ops.histogram import BINS
from .phase import Forward, Phase
from .state import PromptState
from .step import Step

Record = FFN | Experts | InputGroup
_SPREAD = "spread"  # in the place of a kind: inputs of which each process has a part
_HISTOGRAMS = 512  # of so many rows thresholds are decided at once: 16 MB


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
    events : Events, optional
        Of the session.
    """

    def __init__(
        self,
        records: Sequence[Any],
        shares: Sequence[Mapping[str, float]],
        config: PopConfig,
        modalities: int = 1,
        events: Events | None = None,
    ) -> None:
        super().__init__(records, config, modalities, events)
        self.shares = shares
        self._first: weakref.WeakKeyDictionary[Forward, Tensor] = weakref.WeakKeyDictionary()
        # of a step, by modality, [B, N]: which tokens count for which sequence
        self._counted: weakref.WeakKeyDictionary[Step, list[tuple[int, Tensor]]] = weakref.WeakKeyDictionary()

    @property
    def per_sequence(self) -> bool:
        """Always: every row has its own thresholds."""
        return True

    def new_state(self, rows: int, cache: Any) -> PromptState:
        """State of a new prompt of ``rows`` sequences."""
        states: list[Any] = [RecordState(record) for record in self.ffns]
        return PromptState(states, rows, cache)

    def _read(self, index: int) -> Tensor:
        """Norms of the down projection's columns, ``[E, D]`` (one expert in a dense FFN), float32; nothing of attention.

        Those of the columns that this process has.
        """
        record: Any = self.ffns[index]
        if "h" not in record.by_input:
            return torch.empty(0)
        norms: Tensor = record.down_column_norms().to(torch.float32).view(-1, record.size)
        return norms if record.shard is None else record.shard.own(norms).contiguous()

    def state(self, index: int, forward: Forward) -> RecordState:
        """What the forward's prompt knows about record number ``index``."""
        found = forward.state.ffns[index]
        assert isinstance(found, RecordState)
        return found

    # prefill --------------------------------------------------------------------------------------------------------

    @tells("statistics")
    def _observe(
        self, state: InputState, forward: Forward, step: Step, row: Tensor, values: Tensor, weight: Tensor | None
    ) -> None:
        """Count the magnitudes ``[N, n]`` of the prompt's tokens; ``row`` (``[N]``) is the sequence of each.

        A sequence's first token does not count: attention makes it a sink of large activations that no later token has, which
        would lower the thresholds of short prompts.
        """
        state.width = values.shape[-1]
        for modality, tokens in self._counted_tokens(forward, step, row):
            state.counts = added(state.counts, modality, histogram(values, tokens, weight))

    def _counted_tokens(self, forward: Forward, step: Step, row: Tensor) -> list[tuple[int, Tensor]]:
        """By modality, ``[B, N]``, boolean: the tokens that count for each sequence. Made once for all inputs of a step."""
        known = self._counted.get(step)
        if known is None:
            later = ~self._first_tokens(forward, row.device)[row, step.column]
            mine = (row == torch.arange(step.rows, device=row.device).unsqueeze(1)) & later
            known = [(modality, mine if mask is None else mine & mask) for modality, mask in step.by_modality]
            self._counted[step] = known
        return known

    def _first_tokens(self, forward: Forward, device: torch.device) -> Tensor:
        """``[B, q]``, boolean: the first token of each sequence, in the forward that begins it. Made once for all records."""
        known = self._first.get(forward)
        if known is None:
            counted = self.step(forward, device).counted
            mask = torch.ones(forward.rows, forward.length, dtype=torch.bool, device=device)
            mask = mask if counted is None else counted.view(mask.shape)
            total = forward.state.tokens.to(device)
            begins = mask.sum(-1) == total
            known = self._first[forward] = mask & (mask.cumsum(-1) == 1) & begins.unsqueeze(1)
        return known.to(device)

    def check_finite(self, state: PromptState) -> None:
        """Raise :class:`NonFiniteError` if the prompt's magnitudes are not finite; one look for all records."""
        inputs = [(i, which, own) for i, r in enumerate(_records(state)) for which, own in r.inputs.items()]
        found = [(n, not_finite(counts)) for n, (*_, own) in enumerate(inputs) for counts in own.counts.values()]
        if not found and self.processes is None:
            return
        device = found[0][1].device if found else self.ffns[0].device
        bad = torch.zeros(len(inputs), dtype=torch.int64, device=device)
        if found:
            numbers = torch.tensor([number for number, _ in found], device=bad.device)
            bad.index_add_(0, numbers, torch.stack([counts.to(bad.device) for _, counts in found]).sum((1, 2)))
        first = self._first_bad(bad)
        if first is not None:
            index, which, _ = inputs[first]
            what = "input" if which == "x" else "activations"
            raise NonFiniteError(
                f"The {what} of {self.ffns[index].name} are NaN or infinite in the prompt, so there are no thresholds for "
                "them. Check the weights and inputs, or run the model in bfloat16 or float32 if it overflows in float16."
            )

    # decode ---------------------------------------------------------------------------------------------------------

    @tells("partition")
    def partition_all(self, state: PromptState) -> None:
        """Set every threshold that is missing; before the first decode step."""
        self.check_prompt(state)
        self._decide(state, [(i, which) for i, record in enumerate(_records(state)) for which in record.inputs])

    def _decide(self, state: PromptState, wanted: Iterable[tuple[int, str]]) -> None:
        """Set the thresholds of some inputs (number of the record, name) that have none, together where they are alike."""
        alike: dict[Any, list[tuple[InputState, float]]] = {}
        for index, which in wanted:
            inputs = _records(state)[index].inputs[which]
            if inputs.threshold is None and self._is_spread(index, which):
                alike.setdefault(_SPREAD, []).append((inputs, self.shares[index][which]))
            elif inputs.threshold is None and inputs.counts:
                kind = tuple((modality, counts.device) for modality, counts in inputs.counts.items())
                alike.setdefault(kind, []).append((inputs, self.shares[index][which]))
            elif inputs.threshold is None:  # a layer that the prompt did not run decodes dense
                inputs.threshold = torch.full((state.rows,), PASS_ALL)
        at_once = max(1, _HISTOGRAMS // state.rows)
        for kind, same in alike.items():
            for some in (same[start : start + at_once] for start in range(0, len(same), at_once)):
                of = self._counts_of_all if kind == _SPREAD else _counts
                counts = of(state, [inputs for inputs, _ in some])
                found = threshold(counts, state.tokens_of, [share for _, share in some])
                for (inputs, _), own in zip(some, found.unbind(), strict=True):
                    inputs.threshold = own

    def _is_spread(self, index: int, which: str) -> bool:
        """Whether each process has a part of this input: h of its channels or experts, o's of its heads."""
        record = self.ffns[index]
        return record.shard is not None and (which == "h" or isinstance(record, InputGroup))

    def spread_experts(self) -> str | None:
        """Name of experts of which each process has some (expert parallelism), if there are any."""
        experts = (r for r in self.ffns if isinstance(r, Experts) and r.shard is not None)
        return next((r.name for r in experts if r.module._is_expert_parallel), None)

    def _counts_of_all(self, state: PromptState, inputs: Sequence[InputState]) -> dict[int, Tensor]:
        """``[K, B, BINS]`` by modality: counts of all processes. One of them may have seen nothing, with experts elsewhere."""
        assert self.processes is not None
        none = torch.zeros(state.rows, BINS, dtype=torch.int64, device=self.ffns[0].device)
        own = {m: torch.stack([i.counts.get(m, none) for i in inputs]) for m in sorted(state.tokens_of)}
        return {m: self.processes.sum(counts) for m, counts in own.items()}

    masks = ("h", "x")

    def mask(self, index: int, which: str, forward: Forward, values: Tensor, positions: Tensor | None = None) -> Tensor:
        """As :meth:`Engine.mask`; entries stand in their own places, so ``positions`` are None."""
        first = self.state(index, forward).inputs[which].first_in(forward)
        if forward.phase is Phase.PREFILL and not first:
            return values
        step = self.step(forward, values.device)
        if values.shape[:-1].numel() != forward.rows * forward.length:
            raise SessionError(
                f"{self.ffns[index].name} was given an input of shape {tuple(values.shape)} in a forward of {len(step)} "
                "tokens, so it is unknown which token an entry belongs to. Its adapter should not name it among the inputs."
            )
        weight = self.channel_weights()[index][0].to(values.device) if which == "h" else None
        flat = values.reshape(-1, values.shape[-1])
        found = self._mask(index, which, first, forward, step, step.unit, flat, weight)
        return values if forward.phase is Phase.PREFILL else found.view(values.shape)

    def apply(self, index: int, forward: Forward, step: Step, h: Tensor, positions: Tensor | None) -> Tensor:
        """:meth:`mask` for the inputs of a layer's down projections of routed experts, ``[N, D]``; one threshold serves all."""
        assert step.expert is not None and positions is None
        row = step.unit.div(self.ffns[index].experts or 1, rounding_mode="floor")
        weight = self.channel_weights()[index].to(h.device)[step.expert]
        first = self.state(index, forward).inputs["h"].first_in(forward)
        return self._mask(index, "h", first, forward, step, row, h, weight)

    def _mask(
        self,
        index: int,
        which: str,
        first: bool,
        forward: Forward,
        step: Step,
        row: Tensor,
        values: Tensor,
        weight: Tensor | None,
    ) -> Tensor:
        """``[N, n]``: the entries that pass; of the prompt, all. What was ``first`` in this forward is counted."""
        state = self.state(index, forward).inputs[which]
        if first and step.phase is not Phase.DECODE:
            self._observe(state, forward, step, row, values, weight)
        if step.phase is Phase.PREFILL:
            return values
        scores = magnitudes(values, weight)
        if state.threshold is None:
            self._decide(forward.state, [(index, which)])
        assert state.threshold is not None
        keep = kept(scores, state.threshold.to(values.device).expand(step.rows)[row].unsqueeze(1))
        decode = step.number >= 0
        if first:
            counted = decode if step.valid is None else decode & step.valid
            state.log((keep & counted.unsqueeze(1)).sum(), counted.sum() * keep.shape[1])
        return values.where(keep | ~decode.unsqueeze(1), 0)


def _counts(state: PromptState, inputs: Sequence[InputState]) -> dict[int, Tensor]:
    """``[K, B, BINS]`` by modality, of inputs that have the same ones."""
    return {m: torch.stack([own.counts[m] for own in inputs]) for m in inputs[0].counts}


def _records(state: PromptState) -> Sequence[RecordState]:
    found: Sequence[Any] = state.ffns
    return found


__all__ = ["InputState", "Record", "RecordState", "ThresholdEngine"]
