"""POP for one model: statistics in prefill, the partition, the choice at each decode step. Knows no architecture.

State belongs to a prompt (:class:`~pop_mm.state.PromptState`), always in original channel numbers. Where an executor has
reordered channels it passes ``positions``: the position of each original channel.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from . import kernels
from .asking import is_ours, with_progress
from .config import PopConfig
from .errors import NonFiniteError, PhaseError
from .events import Events, tells
from .experts import Experts
from .layout import FFN
from .modality import MODALITIES, added, weighted_sum
from .ops.select import Choose, choose, step_chooser
from .partition import Partition, Sizes, partition
from .phase import Forward, Phase
from .scoring import channel_energy, check_channel_weight, get_scorer
from .state import FFNState, PromptState
from .step import Step

_BLOCK = 1 << 22  # activations that are squared at once


class Engine:
    """The algorithm, over the FFNs of one model.

    Parameters
    ----------
    ffns : sequence of FFN or Experts
        Those that are really pruned.
    sizes : sequence of Sizes
        Of each.
    config : PopConfig
    modalities : int
        How many the model can have: 1 is text alone.
    events : Events, optional
        Of the session.
    """

    def __init__(
        self,
        ffns: Sequence[FFN | Experts],
        sizes: Sequence[Sizes],
        config: PopConfig,
        modalities: int = 1,
        events: Events | None = None,
    ) -> None:
        self.ffns = ffns
        self.sizes = sizes
        self.config = config
        method = None if config.chosen_method == "thresholds" else config.channel_method
        self.scorer = (method.scorer if method is not None else None) or get_scorer(config.scorer)
        self.own_choice = (
            method if method is not None and method.chooses_by_itself else None
        )  # how steps score candidates
        self._weights: list[Tensor] | None = None  # of each FFN [E, D]
        self._stand_ins: dict[int, Tensor | None] = {}
        self._modalities = modalities
        self._waiting = [
            index for index, ffn in enumerate(ffns) if ffn.experts is not None
        ]  # those that decode steps teach
        self.events = Events() if events is None else events

    @property
    def per_sequence(self) -> bool:
        """Whether each row has its own partition and step mask."""
        return self.config.batch == "per_sequence"

    def new_state(self, rows: int, cache: Any) -> PromptState:
        """State of a new prompt of ``rows`` sequences."""
        states = [FFNState(sizes, ffn.experts) for ffn, sizes in zip(self.ffns, self.sizes, strict=True)]
        return PromptState(states, rows, cache)

    def step(self, forward: Forward, device: torch.device) -> Step:
        """The tokens of a forward, made once for all FFNs of a device."""
        if device not in forward.steps:
            forward.steps[device] = Step.of(forward, device, self.per_sequence)
        return forward.steps[device]

    def settle(self, forward: Forward) -> None:
        """Before a forward: forget what the tokens taught that were cropped off the cache since the one before it.

        Raises
        ------
        PhaseError
            What is left of the prompt cannot be told from what was cropped off. Nothing has changed then.
        """
        state: PromptState = forward.state
        if forward.past is not None and not forward.draft:
            state.check_crop(forward.past)
        length = forward.past = forward.past if state.countable else None
        if length is None:
            return
        chunk = None if forward.draft else state.history.cropped(length)
        before = state if chunk is None else state.before(chunk)
        cropped = [index for index in self._waiting if before.ffns[index].lessons.taught_until > length]
        if not forward.draft:
            for index in cropped:
                before.ffns[index].lessons.check_crop(length)
        if chunk is not None:
            state.restore(chunk, before)
        for index in cropped:
            if self._unlearn(index, state, length):
                state.moved = False

    # weights --------------------------------------------------------------------------------------------------------

    def channel_weights(self) -> list[Tensor]:
        """The scorer's weight of each channel of each FFN, ``[E, D]`` (one expert in a dense FFN); computed once."""
        if self._weights is None:
            indices = with_progress(range(len(self.ffns)), len(self.ffns), "Reading column norms")
            self._weights = [self._read(index) for index in indices]
        return self._weights

    def _read(self, index: int) -> Tensor:
        """What the weights of an FFN say about its channels; they must be in the original order."""
        ffn = self.ffns[index]
        weight = self.scorer.channel_weight(ffn)
        if not is_ours(type(self.scorer)):
            check_channel_weight(self.scorer, ffn, weight)
        weight = weight.to(torch.promote_types(weight.dtype, torch.float32))  # a scorer of one's own may be narrower
        weight = weight.view(-1, ffn.size)
        waits = ffn.experts is not None and not self.scorer.fixed
        stand_in: Tensor | None = weight
        if waits:
            by_weights = self.config.unseen == "weights"
            stand_in = weight * ffn.input_norms().to(weight.device) if by_weights else None
        self._stand_ins[index] = stand_in
        return weight

    def _per_unit(self, by_expert: Tensor, state: PromptState) -> Tensor:
        """``[U, D]`` from ``[E, D]``."""
        return by_expert.repeat(state.rows, 1) if self.per_sequence else by_expert

    # prefill --------------------------------------------------------------------------------------------------------

    @tells("statistics")
    def count_tokens(self, forward: Forward) -> None:
        """Add this forward's prompt tokens to the state's count."""
        state: PromptState = forward.state
        for modality, mask in self.step(forward, _where(forward)).by_modality:
            shape = forward.rows, forward.length
            tokens = torch.full((forward.rows,), forward.length) if mask is None else mask.view(shape).sum(-1)
            state.tokens_of = added(state.tokens_of, modality, tokens)

    @tells("statistics")
    def observe(
        self,
        index: int,
        forward: Forward,
        step: Step,
        h: Tensor,
        positions: Tensor | None,
        probes: Tensor | None = None,
    ) -> None:
        """Add the squared activations of the prompt's tokens (of its probe tokens, if there are any); padding never counts.

        Parameters
        ----------
        h : Tensor
            ``[N, D]``, inputs of the down projection; ``[n, D]`` of the tokens that ``probes`` names.
        positions : Tensor or None
            ``[E, D]``: where each original channel is in ``h``; None if in its own place.
        probes : Tensor, optional
            ``[n]``, from :meth:`probe_numbers`.
        """
        ffn, h = forward.state.ffns[index], h.detach()
        if step.expert is not None:
            self._observe_routed(ffn, step, h, positions, in_prompt=True)
            return
        units = forward.rows if self.per_sequence else 1
        h = self.scorer.prompt_activations(h).view(units, -1, h.shape[-1])
        energies: list[Tensor | None] = [None] * self._modalities
        counts: Tensor | int = 0
        for modality, mask in self._observed(forward, step):
            if mask is not None:
                mask = (mask if probes is None else mask[probes]).view(units, -1)
            alone = units == 1  # the compiled library takes matrices
            energy = channel_energy(h[0] if alone else h, mask[0] if alone and mask is not None else mask)
            energies[modality] = energy.view(units, -1)
            counts = counts + (h.shape[1] if mask is None else mask.sum(-1))
        zero = next(energy for energy in energies if energy is not None).new_zeros(()).expand(units, h.shape[-1])
        sums = torch.stack([zero if energy is None else energy for energy in energies])
        seen = torch.zeros(units, dtype=torch.int64, device=h.device) + counts
        ffn.add(sums if positions is None else sums[..., positions[0]], seen, seen)

    def _observe_routed(self, ffn: FFNState, step: Step, h: Tensor, positions: Tensor | None, in_prompt: bool) -> None:
        assert step.weight is not None and ffn.experts is not None
        units = ffn.experts * (step.rows if self.per_sequence else 1)
        valid = step.counted if in_prompt else step.valid
        modality = torch.zeros_like(step.unit) if step.modality is None or not in_prompt else step.modality
        place = step.unit + modality * units
        dtype = torch.promote_types(h.dtype, torch.float32)
        sums = torch.zeros(self._modalities * units, h.shape[1], dtype=dtype, device=h.device)
        for part in torch.arange(len(h), device=h.device).split(max(1, _BLOCK // h.shape[1])):
            values = _in_original_order(h[part], step.expert if step.expert is None else step.expert[part], positions)
            values = self._weighted(self.scorer.prompt_activations(values.to(dtype)), step.weight[part])
            squared = values.square()
            if valid is not None:
                squared.masked_fill_(~valid[part].unsqueeze(1), 0)
            sums.index_add_(0, place[part], squared)
        ones = torch.ones_like(step.unit) if valid is None else valid.long()
        tokens = torch.zeros(units, dtype=torch.int64, device=h.device).index_add_(0, step.unit, ones)
        seen = tokens
        if self.config.modality_weights:
            weights = [self.config.modality_weights.get(name, 1.0) for name in MODALITIES]
            counting = (torch.tensor(weights, device=h.device)[modality] > 0).long()
            seen = torch.zeros_like(tokens).index_add_(0, step.unit, ones * counting)
        ffn.add(sums.view(self._modalities, units, -1), seen, tokens if in_prompt else None)

    def _weighted(self, values: Tensor, weight: Tensor | None) -> Tensor:
        """Activations of experts as the score takes them, ``[N, ...]``."""
        if self.config.expert_score == "routed" and weight is not None:
            return values * weight.detach().to(values.dtype).unsqueeze(1)
        return values

    def _observed(self, forward: Forward, step: Step) -> list[tuple[int, Tensor | None]]:
        """The tokens of this forward that statistics of dense FFNs are made from, by modality."""
        if not self.config.probe_tokens:
            return step.by_modality
        probes = self._probes(forward, step).flatten()
        return [(m, probes if mask is None else mask & probes) for m, mask in step.by_modality]

    def _probes(self, forward: Forward, step: Step) -> Tensor:
        """``[B, q]``: the ``probe_tokens`` of each row's prompt, evenly spaced over those that count, the last one included.

        All of them if there are no more.
        """
        counting = torch.zeros(len(step), dtype=torch.bool, device=step.unit.device)
        for modality, mask in step.by_modality:
            if self.config.modality_weights.get(MODALITIES[modality], 1) > 0:
                counting = counting | (True if mask is None else mask)
        counting = counting.view(forward.rows, forward.length)
        wanted, count = self.config.probe_tokens, counting.sum(-1, keepdim=True).clamp_(min=1)
        number = counting.cumsum(-1)  # from 1
        return counting & (number * wanted // count > (number - 1) * wanted // count)

    def probe_numbers(self, forward: Forward) -> Tensor:
        """``[n]``: the probe tokens of this forward as numbers of its positions, row by row."""
        return self._probes(forward, self.step(forward, _where(forward))).flatten().nonzero().squeeze(1)

    @tells("partition")
    def partition(self, index: int, state: PromptState) -> Partition:
        """Make (or return) the partitions of one FFN's units from the statistics so far, ``[U, ...]``."""
        ffn = state.ffns[index]
        if ffn.partition is None:
            self._keep(index, state, self.rank(index, state, self.config.modality_weights))
        assert ffn.partition is not None
        return ffn.partition

    def _keep(self, index: int, state: PromptState, part: Partition) -> None:
        ffn, weight = state.ffns[index], self._per_unit(self.channel_weights()[index], state)
        ready = self._enough(ffn) if self._stand_ins[index] is None else None
        if ready is None and self._stand_ins[index] is None:  # experts that no token reached
            ready = torch.zeros(len(weight), dtype=torch.bool, device=weight.device)
        ffn.keep(part, weight.to(part.candidates.device).gather(1, part.candidates), ready)

    def _enough(self, ffn: FFNState) -> Tensor | None:
        """``[U]``, boolean: units that have seen enough tokens; None if the prompt did not run the FFN."""
        least = 1 if ffn.experts is None else self.config.min_tokens
        return None if ffn.seen is None else ffn.seen >= least

    def rank(self, index: int, state: PromptState, modality_weights: Mapping[str, float]) -> Partition:
        """The partitions of one FFN's units that these weights of the modalities would make."""
        return partition(self._scores(index, state, modality_weights), self.sizes[index])

    def _scores(self, index: int, state: PromptState, modality_weights: Mapping[str, float]) -> Tensor:
        """``[U, D]``; what stands in for the scores of units that have seen too few tokens is their weights, if anything.

        A dense FFN that the prompt did not run (a cross-attention layer without an image) has nothing else to go by.
        """
        ffn, weight = state.ffns[index], self._per_unit(self.channel_weights()[index], state)
        energy, stand_in = ffn.energy(modality_weights), self._stand_ins[index]
        if energy is None:
            return weight if stand_in is None else self._per_unit(stand_in, state)
        scores = weight.to(energy.device) * energy.sqrt()
        if stand_in is None or ffn.experts is None:
            return scores
        enough = self._enough(ffn)
        assert enough is not None
        return scores.where(enough.unsqueeze(1), self._per_unit(stand_in, state).to(scores.device))

    @tells("partition")
    def partition_all(self, state: PromptState) -> None:
        """Make every partition that is missing; before the first decode step. FFNs that are alike are ranked together."""
        self.check_prompt(state)
        alike: dict[Any, list[tuple[int, Tensor]]] = {}
        for index, ffn in enumerate(state.ffns):
            if ffn.partition is None:
                scores = self._scores(index, state, self.config.modality_weights)
                key = self.sizes[index], scores.shape, scores.device, scores.dtype
                alike.setdefault(key, []).append((index, scores))
        for (sizes, *_), group in alike.items():
            parts = partition(torch.stack([scores for _, scores in group]), sizes)
            for number, (index, _) in enumerate(group):
                self._keep(index, state, parts[number])

    def check_prompt(self, state: PromptState) -> None:
        """Raise :class:`PhaseError` if the prompt (or, per sequence, one of its rows) has no token to go by."""
        weights = self.config.modality_weights
        empty = "is empty: it has no position that is a token (padding does not count). Give at least one token."
        weightless = (
            f"has no token of a modality that counts (modality_weights={dict(weights)}), so there is nothing to rank "
            "channels by. Give such a token, or raise the weight of what the prompt has."
        )
        for counted, complaint in ({}, empty), (weights, weightless):
            tokens = weighted_sum(state.tokens_of, counted)
            assert tokens is not None
            short = tokens == 0 if self.per_sequence else tokens.sum().reshape(1) == 0
            if bool(short.any()):
                which = f"Row {int(short.nonzero()[0])} of the prompt" if self.per_sequence else "The prompt"
                raise PhaseError(f"{which} {complaint}")

    @tells("statistics")
    def check_finite(self, state: PromptState) -> None:
        """Raise :class:`NonFiniteError` if the prompt's statistics are not finite; one look for all FFNs."""
        totals = [(i, ffn.energies.sum()) for i, ffn in enumerate(state.ffns) if ffn.energies is not None]
        if not totals:
            return
        finite = torch.stack([s.to(totals[0][1].device) for _, s in totals]).isfinite()
        if not bool(finite.all()):
            first = self.ffns[totals[int((~finite).nonzero()[0])][0]]
            raise NonFiniteError(
                f"The activations of {first.name} are NaN or infinite in the prompt, so its channels cannot be ranked. "
                "Check the weights and inputs, or run the model in bfloat16 or float32 if it overflows in float16."
            )

    # decode: the reference ------------------------------------------------------------------------------------------

    masks: Sequence[str] = ("h",)  # inputs of a record that may be masked

    def mask(self, index: int, which: str, forward: Forward, values: Tensor, positions: Tensor | None = None) -> Tensor:
        """:meth:`apply` for the input of an FFN's down projection, ``[B, q, D]`` or ``[B * q, D]``; any other is as it was."""
        if which != "h":
            return values
        step = self.step(forward, values.device)
        return self.apply(index, forward, step, values.reshape(-1, values.shape[-1]), positions).view(values.shape)

    def apply(self, index: int, forward: Forward, step: Step, h: Tensor, positions: Tensor | None) -> Tensor:
        """The reference path: observe, partition and mask the inputs of the down projection, as the phase asks.

        Parameters
        ----------
        h : Tensor
            ``[N, D]``, all channels of the step's tokens.
        positions : Tensor or None
            As for :meth:`observe`.

        Returns
        -------
        Tensor
            Like ``h``, zero on the channels that are left out.
        """
        state: PromptState = forward.state
        if forward.phase is Phase.DECODE:
            return h.where(self._active(index, forward, step, h, positions), 0)
        decode = None if forward.phase is Phase.PREFILL else (step.number >= 0).nonzero().squeeze(1)
        if decode is None or step.counted is None or bool(step.counted.any()):
            self.observe(index, forward, step, h, positions)
        if decode is None and self.config.prefill == "dense":
            return h
        self.partition(index, state)
        result = h.clone()
        if self.config.prefill == "partition":
            result = h.where(self._allowed(index, state, step, positions), 0)
        if decode is not None and len(decode):
            tokens = h[decode]
            result[decode] = tokens.where(self._active(index, forward, step[decode], tokens, positions), 0)
        return result

    def _allowed(self, index: int, state: PromptState, step: Step, positions: Tensor | None) -> Tensor:
        """``[N, D]`` boolean: R and C of each token's unit, at their places in ``h``; everything where there is no partition."""
        ffn = state.ffns[index]
        assert ffn.partition is not None and ffn.ready is not None
        allowed = ffn.partition.allowed()
        if not ffn.all_ready:
            allowed = allowed | ~ffn.ready.unsqueeze(1)
        if positions is not None:
            places = positions.repeat(len(allowed) // len(positions), 1)
            allowed = torch.empty_like(allowed).scatter_(1, places, allowed)
        return allowed.expand(len(step), -1) if len(allowed) == 1 else allowed[step.unit]

    def _active(self, index: int, forward: Forward, step: Step, h: Tensor, positions: Tensor | None) -> Tensor:
        """``[N, D]`` boolean: the active channels of decode steps, at their places in ``h``."""
        ffn, sizes = forward.state.ffns[index], self.sizes[index]
        waiting = None if ffn.all_ready else self._learn(index, forward, step, h, positions)
        active = self._allowed(index, forward.state, step, positions)
        if sizes.candidates and len(step):
            assert ffn.partition is not None and ffn.candidate_weight is not None
            alone = len(ffn.candidate_weight) == 1
            chosen = ffn.partition.candidates
            chosen = chosen.expand(len(step), -1) if alone else chosen[step.unit]
            weight = ffn.candidate_weight[0] if alone else ffn.candidate_weight[step.unit]
            places = _places(chosen, step, positions)
            dropped = self.choose(index, forward, step, h.gather(1, places), weight)
            active = active.scatter(1, places.gather(1, dropped), False)
        if step.expert is not None:
            ffn.count(step, waiting)
        return active if waiting is None else active | waiting.unsqueeze(1)

    @tells("selection")
    def choose(
        self,
        index: int,
        forward: Forward,
        step: Step,
        candidates: Tensor,
        weight: Tensor,
        ranks: Tensor | None = None,
    ) -> Tensor:
        """Which candidates each token of a decode step leaves out (paper 3.3), with a note in the prompt's log.

        Parameters
        ----------
        candidates : Tensor
            ``[N, |C|]``: activations of the candidates, in ascending channel order or in the order that ``ranks`` says.
        weight : Tensor
            ``[|C|]`` or ``[N, |C|]``: the scorer's weight of each.
        ranks : Tensor or None
            ``[|C|]`` (``[N, |C|]`` of experts): which of the candidates in ascending order each one is.

        Returns
        -------
        Tensor
            ``[N, n]``, indices into ``candidates``.
        """
        sizes, state = self.sizes[index], forward.state
        group, groups = step.choices(self.per_sequence)
        values = self._weighted(candidates.detach(), step.weight)
        if self.own_choice is not None:
            part = state.ffns[index].partition
            channels = (
                part.candidates.expand(len(step), -1) if len(part.candidates) == 1 else part.candidates[step.unit]
            )
            if ranks is not None:
                channels = channels.gather(1, ranks.expand(len(step), -1))
            position = step.column + (forward.past or 0)
            values = self.own_choice.step_scores(values, weight, channels, position)
            weight = values.new_ones(values.shape[1])
        dropped = choose(values, weight, sizes.candidates_dropped, group, groups, step.valid)
        if step.expert is None and (group is not None or state.rows == 1):
            state.ffns[index].steps.add(dropped, ranks)
        elif step.expert is None and forward.phase is Phase.DECODE:
            state.ffns[index].steps.add(dropped.view(forward.rows, forward.length, -1), ranks)
        return dropped if group is None else dropped[group]

    def chooser(
        self, index: int, state: PromptState, weight: Tensor, ranks: Tensor
    ) -> Callable[[Tensor, Tensor | None], None]:
        """:meth:`choose` for one token of each sequence, with everything but the activations known beforehand.

        The function takes activations of R and C, ``[B, K]``, which it zeroes where the step leaves them out, and which of
        several sequences have a say, ``[B]`` or None. It runs once a step and FFN, so it is as short as it can be.
        """
        sizes, log, device = self.sizes[index], state.ffns[index].steps, weight.device

        @cache
        @torch.inference_mode(False)  # buffers that may be written in and out of inference mode
        def torchs() -> Choose:
            return step_chooser(weight, sizes.retained, sizes.candidates_dropped)

        def by_torch(h: Tensor, valid: Tensor | None) -> None:
            torchs()(h, valid, log.slot(ranks, device))

        library = kernels.library() if weight.is_cpu and weight.dtype is torch.float32 else None
        leave_out = by_torch
        if library is not None:
            leave_out = library.chooser(weight.contiguous(), sizes, self.step_slot(index, state, ranks), by_torch)
        return self.events.told_briefly("selection", leave_out)

    def step_slot(self, index: int, state: PromptState, ranks: Tensor) -> Callable[[], int]:
        """For C that chooses by itself, for one token of each sequence: the address to note at what it leaves out, ``[1, n]``."""
        return partial(state.ffns[index].steps.address, ranks, ranks.device)

    # units that the prompt did not reach ----------------------------------------------------------------------------

    def _learn(self, index: int, forward: Forward, step: Step, h: Tensor, positions: Tensor | None) -> Tensor | None:
        """Let units without a partition see these tokens, step by step, and partition them once it is enough.

        Returns
        -------
        Tensor or None
            ``[N]``, boolean: tokens whose unit had no partition yet at its step, and runs dense.
        """
        ffn = forward.state.ffns[index]
        assert ffn.ready is not None
        new = (~ffn.ready[step.unit]).nonzero().squeeze(1)
        if not len(new):
            return None
        mine = step[new]
        taught = _in_original_order(h[new].detach(), mine.expert, positions)
        if forward.past is not None:
            ffn.lessons.remember(ffn.snapshot, taught, mine, forward.past)
        waiting = torch.zeros(len(step), dtype=torch.bool, device=h.device)
        waiting[new] = self._teach(index, forward.state, taught, mine)
        return waiting

    def _unlearn(self, index: int, state: PromptState, length: int) -> bool:
        """Unlearn the steps that a cache of ``length`` tokens no longer holds; whether a unit has lost its partition."""
        ffn = state.ffns[index]
        ready, found = ffn.ready, ffn.lessons.cropped(length)
        if found is None:
            return False
        before, again = found
        ffn.unlearn(before)
        for lesson in again:
            ffn.lessons.keep(lesson)
            self._teach(index, state, lesson.h, lesson.step)
        assert ready is not None and ffn.ready is not None
        return bool((ready & ~ffn.ready).any())

    def _teach(self, index: int, state: PromptState, h: Tensor, step: Step) -> Tensor:
        """Add tokens to the statistics, step by step; ``h`` is in original order. Which had no partition, ``[N]``."""
        ffn = state.ffns[index]
        assert ffn.ready is not None
        waited = torch.zeros(len(step), dtype=torch.bool, device=h.device)
        for now in step.number.unique(sorted=True):
            here = ((step.number == now) & ~ffn.ready[step.unit]).nonzero().squeeze(1)
            waited[here] = True
            self._observe_routed(ffn, step[here], h[here], None, in_prompt=False)
            enough = self._enough(ffn)
            assert enough is not None
            done = (~ffn.ready & enough).nonzero().squeeze(1)
            if len(done):
                weight = self._per_unit(self.channel_weights()[index], state).to(h.device)[done]
                energy = ffn.energy(self.config.modality_weights)
                assert energy is not None
                fresh = partition(weight * energy[done].sqrt(), self.sizes[index])
                ffn.keep_late(done, fresh, weight.gather(1, fresh.candidates))
        return waited


def _where(forward: Forward) -> torch.device:
    """Device of what is known about the positions of a forward."""
    if forward.positions is not None:
        return forward.positions.modality.device
    return torch.device("cpu") if forward.valid is None else forward.valid.device


def _places(channels: Tensor, step: Step, positions: Tensor | None) -> Tensor:
    """``[N, n]``: where original channels of each token's expert are in ``h``."""
    if positions is None:
        return channels
    return positions[0][channels] if step.expert is None else positions[step.expert].gather(1, channels)


def _in_original_order(h: Tensor, expert: Tensor | None, positions: Tensor | None) -> Tensor:
    """``[N, D]``: ``h`` with every channel in its own place."""
    if positions is None:
        return h
    return h[:, positions[0]] if expert is None else h.gather(1, positions[expert])


__all__ = ["Engine"]
