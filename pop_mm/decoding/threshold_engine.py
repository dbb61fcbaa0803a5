"""Thresholds for one model: what a prompt's state holds of each input, and the masking of the inputs. Knows no module.

A *record* is an FFN, the routed experts of a layer, or a group of attention modules. Each has an input ``x``; FFNs and
experts have ``h`` in front of the down projection too. Every sequence has thresholds of its own.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import NonFiniteError, SessionError
from ..events import Events, tells
from ..methods.thresholds import PASS_ALL, histogram, kept, magnitudes, not_finite, threshold
from ..modality import added
from ..ops.histogram import BINS
from ..settings.config import PopConfig
from ..tracking.phase import Forward, Phase
from ..tracking.step import Step
from ..weights.experts import Experts
from ..weights.groups import InputGroup
from .correction import Correction
from .engine import Engine
from .state import PromptState
from .threshold_state import InputState, Record, RecordState, ThresholdState

_SPREAD = "spread"  # in the place of a kind: inputs of which each process has a part
_HISTOGRAMS = 512  # of so many rows thresholds are decided at once: 16 MB


@dataclass(eq=False)
class Answer:
    """The answer's tokens in one forward.

    Attributes
    ----------
    columns : int
        Columns of prompt before them.
    factors : Tensor or None
        ``[B, q]``, float32: of each token's thresholds; None if all are 1.
    read : Tensor
        ``[B * q, 2]``, float64: weights that each token has read so far, and of how many.
    """

    columns: int
    factors: Tensor | None
    read: Tensor


class ThresholdEngine(Engine):
    """The method, over the records of one model.

    Parameters
    ----------
    records : sequence of FFN, Experts or InputGroup
    shares : sequence of mapping
        Of each record, input -> share of its entries that is kept.
    weights : sequence of mapping
        Of each record, input -> weights behind it that a token reads, if all of its entries are kept.
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
        weights: Sequence[Mapping[str, int]],
        config: PopConfig,
        modalities: int = 1,
        events: Events | None = None,
    ) -> None:
        super().__init__(records, config, modalities, events)
        self.shares = shares
        mine = [{} if record.role == "lm_head" else own for record, own in zip(records, weights, strict=True)]
        self.costs = [_costs(record, own) for record, own in zip(records, mine, strict=True)]
        meant = sum(own[which] * share[which] for own, share in zip(mine, shares, strict=True) for which in own)
        self._intended = meant / max(1, sum(sum(own.values()) for own in mine))
        self._answers: weakref.WeakKeyDictionary[Forward, Answer] = weakref.WeakKeyDictionary()
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
        return ThresholdState(states, rows, cache, Correction(self._intended))

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

    def begin_answer(self, forward: Forward) -> None:
        """Before a forward that holds tokens of the answer: correct their thresholds, where the cache says which they are.

        Not where the model is spread over processes, of which each knows what it has read itself.
        """
        columns, state = forward.prompt_length, forward.state
        if forward.past is None or isinstance(forward.decode_from, Tensor) or forward.draft:
            return
        if self.processes is not None:
            return
        factors = state.correction.begin(forward.past + columns, forward.length - columns)
        if factors is not None:
            factors = torch.nn.functional.pad(factors, (columns, 0), value=1).expand(forward.rows, -1)
        read = torch.zeros(forward.rows * forward.length, 2, dtype=torch.float64)
        self._answers[forward] = Answer(columns, factors, read)

    def answer(self, forward: Forward) -> Answer | None:
        """What is known of the answer's tokens in a forward; None if nothing is corrected by them."""
        return self._answers.get(forward)

    def end_answer(self, forward: Forward) -> None:
        """After that forward: note what its tokens read."""
        answer = self._answers.pop(forward, None)
        if answer is not None:
            forward.state.correction.end(answer.read.view(forward.rows, forward.length, 2)[:, answer.columns :])

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
        bound = state.threshold.to(values.device).expand(step.rows)[row]
        cost, answer = self.costs[index].get(which), self._answers.get(forward)
        if answer is not None and answer.factors is not None and cost is not None:
            bound = bound * answer.factors.to(values.device)[row, step.column]
        keep = kept(scores, bound.unsqueeze(1))
        decode = step.number >= 0
        if first:
            counted = decode if step.valid is None else decode & step.valid
            passed, entries = keep.sum(1) * counted, counted * keep.shape[1]
            state.log(passed.sum(), entries.sum())
            if answer is not None and cost is not None:
                read = cost * torch.stack([passed, entries], 1).double()
                answer.read = answer.read.to(read.device).index_add(0, row * step.length + step.column, read)
        return values.where(keep | ~decode.unsqueeze(1), 0)


def _counts(state: PromptState, inputs: Sequence[InputState]) -> dict[int, Tensor]:
    """``[K, B, BINS]`` by modality, of inputs that have the same ones."""
    return {m: torch.stack([own.counts[m] for own in inputs]) for m in inputs[0].counts}


def _costs(record: Record, weights: Mapping[str, int]) -> dict[str, float]:
    """Input -> weights that a token reads for each entry of it."""
    if isinstance(record, InputGroup):
        entries = {"x": record.size}
    else:
        entries = {"x": record.hidden_size, "h": record.size * (record.top_k if isinstance(record, Experts) else 1)}
    return {which: count / entries[which] for which, count in weights.items()}


def _records(state: PromptState) -> Sequence[RecordState]:
    found: Sequence[Any] = state.ffns
    return found


__all__ = ["Answer", "ThresholdEngine"]
