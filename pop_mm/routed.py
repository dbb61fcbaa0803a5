"""POP for routed experts: every expert has its own partition, from the prompt's tokens that the router sent to it.

A *slot* is one (token, expert) pair. Statistics and partitions are kept by *unit*: one for each expert, or, with
``batch="per_sequence"``, one for each row and expert. An expert that the prompt hardly reached stays dense until it has
seen enough tokens. Knows neither how experts are stored nor how they are computed.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from .config import PopConfig
from .errors import PhaseError
from .experts import Experts
from .modality import MODALITIES, weighted_sum
from .partition import Partition, Sizes, dropped_candidates, partition
from .phase import Forward, Phase
from .scoring import Scorer

_BLOCK = 1 << 22  # activations that are squared at once
_LESSONS = 32  # that are learned again at most, to unlearn others


@dataclass(frozen=True)
class Slots:
    """Which token and expert each row of a batch of expert activations belongs to.

    Attributes
    ----------
    expert, row : Tensor
        ``[N]``: the expert's number and the row of the batch.
    column : Tensor
        ``[N]``: column of the forward's input.
    weight : Tensor
        ``[N]``: the router's weight.
    valid : Tensor
        ``[N]``, boolean: false for padding, rows that have finished, and experts that another device holds.
    modality : Tensor
        ``[N]``: index of the token's modality.
    """

    expert: Tensor
    row: Tensor
    column: Tensor
    weight: Tensor
    valid: Tensor
    modality: Tensor

    @classmethod
    def of(cls, forward: Forward, ids: Tensor, weights: Tensor, order: Tensor | None, experts: int) -> Slots:
        """Slots of one call of the experts.

        Parameters
        ----------
        ids, weights : Tensor
            ``[B * q, k]``, the router's choice.
        order : Tensor or None
            ``[N]``: the flat (token, choice) number of each slot; None if in that very order.
        """
        order = torch.arange(ids.numel(), device=ids.device) if order is None else order
        expert, token = ids.reshape(-1)[order], order // ids.shape[-1]
        valid = expert < experts  # under expert parallelism a number past the last one marks another device's expert
        if forward.valid is not None:
            valid = valid & forward.valid.to(ids.device).reshape(-1)[token]
        column = token % forward.length
        modality = torch.zeros_like(expert)
        if forward.positions is not None:
            modality = forward.positions.modality.to(ids.device).reshape(-1)[token].long()
        row, weight = token // forward.length, weights.reshape(-1)[order]
        return cls(expert.clamp(max=experts - 1), row, column, weight, valid, modality)

    def __getitem__(self, index: Tensor) -> Slots:
        """Some of the slots."""
        return Slots(*(getattr(self, field.name)[index] for field in fields(self)))


class ExpertsState:
    """What one prompt knows about the experts of one layer.

    Attributes
    ----------
    energies : Tensor
        Sum of squared activations of each channel over the unit's tokens of each modality, ``[M, U, D]``.
    seen, prompt_tokens : Tensor
        ``[U]``: tokens whose modality counts, and all of the prompt.
    partition : Partition or None
        Of every unit; means something where ``ready``.
    candidate_weight : Tensor or None
        The scorer's weight of each candidate, ``[U, |C|]``.
    ready, late : Tensor or None
        ``[U]``, boolean: units that have their partition, and those that got it while decoding.
    decode_tokens, dense_tokens : list of int
        By expert: tokens that it saw while decoding, and those that it ran dense for.
    lessons : list of Lesson
        The latest decode steps that units without a partition have learned from, in order.
    """

    @torch.inference_mode(False)  # buffers that may be written in and out of inference mode
    def __init__(self, experts: Experts, sizes: Sizes, rows: int, modalities: int) -> None:
        dtype = torch.promote_types(experts.float_dtype, torch.float32)
        count, device = experts.count, experts.device if experts.device.type != "meta" else torch.device("cpu")
        self.sizes = sizes
        self.experts = count
        self.energies = torch.zeros(modalities, rows * count, sizes.channels, dtype=dtype, device=device)
        self.seen = torch.zeros(rows * count, dtype=torch.int64, device=device)
        self.prompt_tokens = self.seen.clone()
        self.partition: Partition | None = None
        self.candidate_weight: Tensor | None = None
        self.ready: Tensor | None = None
        self.late: Tensor | None = None
        self.decode_tokens = [0] * count
        self.dense_tokens = [0] * count
        self.lessons: list[Lesson] = []
        self._lost = 0  # tokens of the cache up to which lessons are no longer kept
        self._all_ready = False

    def energy(self, weights: Mapping[str, float]) -> Tensor:
        """``[U, D]``: all modalities together, each times its weight."""
        total = weighted_sum(dict(enumerate(self.energies)), weights)
        assert total is not None
        return total

    @torch.inference_mode(False)
    def copy(self) -> ExpertsState:
        """An independent copy."""
        twin = copy.copy(self)
        for name in ("energies", "seen", "prompt_tokens"):
            setattr(twin, name, getattr(self, name).clone())
        twin.decode_tokens, twin.dense_tokens = list(self.decode_tokens), list(self.dense_tokens)
        twin.lessons = list(self.lessons)
        return twin

    def restore(self, before: ExpertsState) -> None:
        """Know what was known before a prefill that was cropped off; ``before`` is given away. Counts of steps go on."""
        self.unlearn(before)
        self.prompt_tokens, self.lessons, self._lost = before.prompt_tokens, before.lessons, before._lost

    def unlearn(self, before: ExpertsState) -> None:
        """Know of the units what was known before some decode steps; ``before`` is given away."""
        for name in ("energies", "seen", "partition", "candidate_weight", "ready", "late"):
            setattr(self, name, getattr(before, name))
        self._all_ready = False

    def remember(self, forward: Forward, h: Tensor, slots: Slots, step: Tensor) -> None:
        """Before units without a partition learn from decode steps: keep what it takes to unlearn them.

        Lessons are unlearned by going back to what was known before one, and learning again what is still in the cache. So
        every 32nd lesson of single steps, and every forward of several, comes with what was known before; the latest two of
        these are kept, and the lessons since.
        """
        if forward.past is None:
            return
        known = [number for number, lesson in enumerate(self.lessons) if lesson.before is not None]
        before = None
        if not known or forward.length > 1 or len(self.lessons) - known[-1] >= _LESSONS:
            before = self.copy()
            before.lessons = []
            if len(known) > 1:
                self._lost = self.lessons[known[1] - 1].end
                del self.lessons[: known[1]]
        place = forward.past + slots.column
        self.lessons.append(Lesson(before, h, slots, step, place, forward.past + forward.length))

    @property
    def taught_until(self) -> int:
        """Tokens that the cache held after the latest lesson; 0 before the first."""
        return self.lessons[-1].end if self.lessons else self._lost

    def check_crop(self, length: int) -> None:
        """Raise :class:`PhaseError` if a cache of ``length`` tokens has lost lessons that are no longer kept."""
        if length < self._lost:
            raise PhaseError(
                f"The cache was cropped to {length} tokens, but what experts without a partition learned from its decode steps "
                f"can only be forgotten from token {self._lost} on. Copy the cache before these steps and call "
                "session.adopt(copy, original), or start a new cache."
            )

    def count(self, experts: Tensor, tokens: list[int]) -> None:
        """Add one token for each of ``experts``; numbers past the last one are another device's."""
        for expert, more in Counter(experts.reshape(-1).tolist()).items():
            if expert < self.experts:
                tokens[expert] += more

    def invalidate(self) -> None:
        """The partitions so far no longer hold."""
        self.partition = None
        self.ready = None
        self._all_ready = False
        self.lessons, self._lost = [], 0

    @torch.inference_mode(False)
    def select_rows(self, rows: Tensor) -> None:
        """Row b is row ``rows[b]`` of before."""

        def moved(tensor: Tensor) -> Tensor:
            return tensor.unflatten(0, (-1, self.experts))[rows.to(tensor.device)].flatten(0, 1)

        self.energies = torch.stack([moved(energy) for energy in self.energies])
        self.seen, self.prompt_tokens = moved(self.seen), moved(self.prompt_tokens)
        if self.partition is not None and self.candidate_weight is not None:
            part = self.partition
            self.partition = Partition(moved(part.retained), moved(part.candidates), moved(part.pruned), part.sizes)
            self.candidate_weight = moved(self.candidate_weight)
        if self.ready is not None and self.late is not None:
            self.ready, self.late = moved(self.ready), moved(self.late)
        self.lessons, self._lost = [], self.taught_until

    @property
    def all_ready(self) -> bool:
        """Whether every unit has its partition; the answer is kept once it is yes."""
        if not self._all_ready and self.ready is not None:
            self._all_ready = bool(self.ready.all())
        return self._all_ready


@dataclass(frozen=True)
class Lesson:
    """What one forward of decode steps taught about units without a partition, in case its tokens are cropped off the cache.

    Attributes
    ----------
    before : ExpertsState or None
        What was known before it; None if the lessons before it tell.
    h : Tensor
        ``[N, D]``, activations in original channel order.
    slots : Slots
        Theirs.
    step : Tensor
        ``[N]``: number of the step within the forward.
    place : Tensor
        ``[N]``: number of the token in the cache.
    end : int
        Tokens in the cache after the forward.
    """

    before: ExpertsState | None
    h: Tensor
    slots: Slots
    step: Tensor
    place: Tensor
    end: int

    def up_to(self, length: int) -> Lesson:
        """The same from the tokens that a cache of ``length`` still holds."""
        kept = (self.place < length).nonzero().squeeze(1)
        place, end = self.place[kept], min(self.end, length)
        return Lesson(self.before, self.h[kept], self.slots[kept], self.step[kept], place, end)


class RoutedExperts:
    """The algorithm for the experts of one layer. It is made while their channels are in the original order.

    Parameters
    ----------
    experts : Experts
    sizes : Sizes
    config : PopConfig
    weight : Tensor
        The scorer's weight of each channel, ``[E, D]``.
    scorer : Scorer
    """

    def __init__(self, experts: Experts, sizes: Sizes, config: PopConfig, weight: Tensor, scorer: Scorer) -> None:
        self.experts = experts
        self.sizes = sizes
        self.config = config
        self.weight = weight
        self.scorer = scorer
        self.weight_score: Tensor | None = None  # of units that have seen too few tokens; None lets them wait
        if scorer.fixed:
            self.weight_score = weight
        elif config.unseen == "weights":
            self.weight_score = weight * experts.input_norms().to(weight.device)

    def _unit(self, slots: Slots) -> Tensor:
        if self.config.batch == "shared":
            return slots.expert
        return slots.row * self.experts.count + slots.expert

    # prefill --------------------------------------------------------------------------------------------------------

    def observe(self, state: ExpertsState, h: Tensor, slots: Slots, positions: Tensor | None) -> None:
        """Add the squared activations of the prompt's tokens to their experts' statistics.

        Parameters
        ----------
        h : Tensor
            ``[N, D]``, inputs of the down projections.
        positions : Tensor or None
            ``[E, D]``: where each expert's original channels are in ``h``; None if in their own places.
        """
        self._add(state, h, slots, positions)
        state.prompt_tokens.index_add_(0, self._unit(slots), slots.valid.long())

    def _add(self, state: ExpertsState, h: Tensor, slots: Slots, positions: Tensor | None) -> None:
        h, unit = h.detach(), self._unit(slots)
        energies = state.energies.flatten(0, 1)
        place = unit + slots.modality * state.energies.shape[1]
        for part in torch.arange(len(h), device=h.device).split(max(1, _BLOCK // self.sizes.channels)):
            values = _in_original_order(h[part], slots.expert[part], positions)
            values = self.scorer.prompt_activations(values.to(energies.dtype))
            squared = self._weighted(values, slots.weight[part]).square()
            squared.masked_fill_(~slots.valid[part].unsqueeze(1), 0)
            energies.index_add_(0, place[part], squared)
        counts = slots.valid
        if self.config.modality_weights:
            weights = [self.config.modality_weights.get(name, 1.0) for name in MODALITIES]
            counts = counts & (torch.tensor(weights, device=unit.device)[slots.modality] > 0)
        state.seen.index_add_(0, unit, counts.long())

    def _weighted(self, values: Tensor, weight: Tensor) -> Tensor:
        """Activations as the score takes them."""
        if self.config.expert_score == "routed":
            return values * weight.detach().to(values.dtype).unsqueeze(1)
        return values

    def partition(self, state: ExpertsState) -> Partition:
        """Make (or return) the partitions of all units from the statistics so far."""
        if state.partition is None:
            state.partition = partition(self.scores(state, self.config.modality_weights), self.sizes)
            state.candidate_weight = self._per_unit(self.weight, state).gather(1, state.partition.candidates)
            enough = self._enough(state)
            state.ready = torch.ones_like(enough) if self.weight_score is not None else enough
            state.late = torch.zeros_like(enough)
        return state.partition

    def scores(self, state: ExpertsState, modality_weights: Mapping[str, float]) -> Tensor:
        """``[U, D]``: of units that have seen too few tokens, by their weights if those are to stand in."""
        scores = self._per_unit(self.weight, state) * state.energy(modality_weights).sqrt()
        if self.weight_score is None:
            return scores
        return scores.where(self._enough(state).unsqueeze(1), self._per_unit(self.weight_score, state))

    def _enough(self, state: ExpertsState) -> Tensor:
        return state.seen >= self.config.min_tokens

    def _per_unit(self, by_expert: Tensor, state: ExpertsState) -> Tensor:
        """``[U, D]`` from ``[E, D]``."""
        return by_expert.to(state.energies.device).repeat(len(state.seen) // self.experts.count, 1)

    # decode ---------------------------------------------------------------------------------------------------------

    def apply(self, forward: Forward, state: ExpertsState, h: Tensor, slots: Slots, positions: Tensor | None) -> Tensor:
        """The reference path: observe, partition and mask the inputs of the down projections, as the phase asks.

        Parameters
        ----------
        h : Tensor
            ``[N, D]``, all slots of this call.
        positions : Tensor or None
            As for :meth:`observe`.

        Returns
        -------
        Tensor
            Like ``h``, zero on the channels that are left out.
        """
        if forward.phase is Phase.DECODE:
            return self._decode(forward, state, h, slots, slots.column, positions)
        prompt: Tensor | None = None
        if forward.phase is Phase.MIXED:
            start = forward.decode_from
            step = slots.column - (start if isinstance(start, int) else start.to(h.device)[slots.row])
            prompt, decode = (step < 0).nonzero().squeeze(1), (step >= 0).nonzero().squeeze(1)
        mine = slots if prompt is None else slots[prompt]
        self.observe(state, h if prompt is None else h[prompt], mine, positions)
        if prompt is None and self.config.prefill == "dense":
            return h
        self.partition(state)
        result = h.clone()
        if self.config.prefill == "partition":
            allowed = self._allowed(state, mine, positions)
            if prompt is None:
                return h.where(allowed, 0)
            result[prompt] = h[prompt].where(allowed, 0)
        if prompt is not None and len(decode):
            result[decode] = self._decode(forward, state, h[decode], slots[decode], step[decode], positions)
        return result

    def _allowed(self, state: ExpertsState, slots: Slots, positions: Tensor | None) -> Tensor:
        """``[N, D]`` boolean: R and C of each slot's unit, at their places in ``h``; everything where there is none."""
        assert state.partition is not None and state.ready is not None
        unit = self._unit(slots)
        allowed = _without(state.partition.pruned[unit], self.sizes.channels, slots, positions)
        return allowed | ~state.ready[unit].unsqueeze(1)

    def _decode(
        self,
        forward: Forward,
        state: ExpertsState,
        h: Tensor,
        slots: Slots,
        step: Tensor,
        positions: Tensor | None,
    ) -> Tensor:
        """Decode steps; ``step`` (``[N]``) numbers them. What is left out of ``h`` is zero."""
        waiting = None if state.all_ready else self._learn(forward, state, h, slots, step, positions)
        assert state.partition is not None and state.candidate_weight is not None
        unit = self._unit(slots)
        left_out = state.partition.pruned[unit]
        if self.sizes.candidates:
            chosen = state.partition.candidates[unit]
            places = _places(chosen, slots, positions)
            dropped = self.choose(forward, h.gather(1, places), state.candidate_weight[unit], slots, step)
            left_out = torch.cat([left_out, chosen.gather(1, dropped)], 1)
        active = _without(left_out, self.sizes.channels, slots, positions)
        state.count(slots.expert[slots.valid], state.decode_tokens)
        if waiting is not None:
            active = active | waiting.unsqueeze(1)
            state.count(slots.expert[slots.valid & waiting], state.dense_tokens)
        return h.where(active, 0)

    def choose(self, forward: Forward, candidates: Tensor, weight: Tensor, slots: Slots, step: Tensor) -> Tensor:
        """Which candidates each slot leaves out: ``[N, n]``, indices into its candidates (paper 3.3).

        With ``batch="shared"`` the tokens that one step sends to one expert share their choice.

        Parameters
        ----------
        candidates, weight : Tensor
            ``[N, |C|]``: activations and the scorer's weights.
        """
        values = self._weighted(candidates.detach().to(weight.dtype), slots.weight)
        if forward.rows == 1 or self.config.batch == "per_sequence":
            return dropped_candidates(values.abs() * weight, self.sizes)
        together, group = torch.unique(slots.expert * (forward.length + 1) + step, return_inverse=True)
        squared = values.square().masked_fill_(~slots.valid.unsqueeze(1), 0)
        sums = squared.new_zeros(len(together), squared.shape[1]).index_add_(0, group, squared)
        return dropped_candidates(sums.sqrt_()[group].mul_(weight), self.sizes)

    # experts that the prompt did not reach --------------------------------------------------------------------------

    def _learn(
        self,
        forward: Forward,
        state: ExpertsState,
        h: Tensor,
        slots: Slots,
        step: Tensor,
        positions: Tensor | None,
    ) -> Tensor | None:
        """Let experts without a partition see these tokens, step by step, and partition them once it is enough.

        Returns
        -------
        Tensor or None
            ``[N]``, boolean: slots whose expert had no partition yet at its step, and runs dense.
        """
        assert state.ready is not None
        new = (~state.ready[self._unit(slots)]).nonzero().squeeze(1)
        if not len(new):
            return None
        taught, mine = _in_original_order(h[new], slots.expert[new], positions), slots[new]
        state.remember(forward, taught, mine, step[new])
        waiting = torch.zeros_like(slots.valid)
        waiting[new] = self._teach(state, taught, mine, step[new])
        return waiting

    def _teach(self, state: ExpertsState, h: Tensor, slots: Slots, step: Tensor) -> Tensor:
        """Add tokens to the statistics, step by step; ``h`` is in original order. Which slots had no partition, ``[N]``."""
        assert state.ready is not None and state.late is not None and state.partition is not None
        unit = self._unit(slots)
        waited = torch.zeros_like(slots.valid)
        for now in step.unique(sorted=True):
            here = ((step == now) & ~state.ready[unit]).nonzero().squeeze(1)
            waited[here] = True
            self._add(state, h[here], slots[here], None)
            done = (~state.ready & self._enough(state)).nonzero().squeeze(1)
            if len(done):
                weight = self.weight.to(h.device)[done % self.experts.count]
                fresh = partition(weight * state.energy(self.config.modality_weights)[done].sqrt(), self.sizes)
                old = state.partition
                state.partition = Partition(
                    old.retained.index_copy(0, done, fresh.retained),
                    old.candidates.index_copy(0, done, fresh.candidates),
                    old.pruned.index_copy(0, done, fresh.pruned),
                    self.sizes,
                )
                assert state.candidate_weight is not None
                state.candidate_weight = state.candidate_weight.index_copy(0, done, weight.gather(1, fresh.candidates))
                state.ready, state.late = state.ready.index_fill(0, done, True), state.late.index_fill(0, done, True)
        return waited

    def settle(self, state: ExpertsState, length: int) -> bool:
        """Before the next forward: unlearn the steps that a cache of ``length`` tokens no longer holds.

        Returns
        -------
        bool
            Whether a unit has lost its partition.
        """
        lessons, ready = state.lessons, state.ready
        if not lessons or length >= lessons[-1].end:
            return False
        first = next(number for number, lesson in enumerate(lessons) if lesson.end > length)
        first = max(number for number, lesson in enumerate(lessons[: first + 1]) if lesson.before is not None)
        again = [lesson.up_to(length) for lesson in lessons[first:]]
        assert again[0].before is not None and ready is not None
        state.unlearn(again[0].before.copy())  # a copy of the cache may have to unlearn the same steps
        state.lessons = lessons[:first]
        for lesson in again:
            if len(lesson.h):
                state.lessons.append(lesson)
                self._teach(state, lesson.h, lesson.slots, lesson.step)
        assert state.ready is not None
        return bool((ready & ~state.ready).any())


def _without(left_out: Tensor, channels: int, slots: Slots, positions: Tensor | None) -> Tensor:
    """``[N, D]`` boolean, false on the channels ``left_out`` (``[N, n]``, original numbers) at their places."""
    active = torch.ones(len(left_out), channels, dtype=torch.bool, device=left_out.device)
    return active.scatter_(1, _places(left_out, slots, positions), False)


def _places(channels: Tensor, slots: Slots, positions: Tensor | None) -> Tensor:
    """``[N, n]``: where original channels of each slot's expert are in ``h``."""
    return channels if positions is None else positions[slots.expert].gather(1, channels)


def _in_original_order(h: Tensor, expert: Tensor, positions: Tensor | None) -> Tensor:
    """``[N, D]``: ``h`` with every channel in its own place."""
    return h if positions is None else h.gather(1, positions[expert])
