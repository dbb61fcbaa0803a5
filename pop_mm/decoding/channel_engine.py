"""Methods that leave out channels, over the FFNs of one model: the partition, and the choice at each decode step.

State is always in original channel numbers. Where an executor has reordered channels it passes ``positions``: the position of
each original channel.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from .. import kernels
from ..events import tells
from ..ops.select import Choose, choose, step_chooser
from ..partition import Partition, partition
from ..tracking.phase import Forward, Phase
from ..tracking.step import Step
from ..weights.shards import of_chosen
from .state import FFNState, PromptState
from .statistics import ChannelStatistics, in_original_order


class ChannelEngine(ChannelStatistics):
    """The algorithm of the paper, over the FFNs of one model; a dense FFN is a layer of one expert."""

    # the partition --------------------------------------------------------------------------------------------------

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
        least = 1 if ffn.experts is None else self.config.experts.min_tokens
        return None if ffn.seen is None else ffn.seen >= least

    def rank(self, index: int, state: PromptState, modality_weights: Mapping[str, float]) -> Partition:
        """The partitions of one FFN's units that these weights of the modalities would make."""
        return partition(self._of_all(index, self._scores(index, state, modality_weights)), self.sizes[index])

    def _of_all(self, index: int, own: Tensor) -> Tensor:
        """``[..., D]`` of all channels, from those that this process has."""
        return of_chosen(self.ffns[index].shard, own)

    def _own(self, index: int, channels: Tensor) -> Tensor:
        """Of ``[..., D]``, those that this process has."""
        shard = self.together(index)
        return channels if shard is None else shard.own(channels)

    def _scores(self, index: int, state: PromptState, modality_weights: Mapping[str, float]) -> Tensor:
        """``[U, D]`` of the channels that this process has.

        What stands in for the scores of units that have seen too few tokens is their weights, if anything.

        A dense FFN that the prompt did not run (a cross-attention layer without an image) has nothing else to go by.
        """
        ffn, weight = state.ffns[index], self._per_unit(self._own(index, self.channel_weights()[index]), state)
        energy, stand_in = ffn.energy(modality_weights), self._stand_ins[index]
        stand_in = None if stand_in is None else self._own(index, stand_in)
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
                key = self.sizes[index], scores.shape, scores.device, scores.dtype, self.together(index) is None
                alike.setdefault(key, []).append((index, scores))
        for (sizes, *_), group in alike.items():
            parts = partition(self._of_all(group[0][0], torch.stack([scores for _, scores in group])), sizes)
            for number, (index, _) in enumerate(group):
                self._keep(index, state, parts[number])

    # decode: the reference ------------------------------------------------------------------------------------------

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
        if decode is None and self.method.prefill == "dense":
            return h
        self.partition(index, state)
        result = h.clone()
        if self.method.prefill == "partition":
            result = h.where(self._own(index, self._allowed(index, state, step, positions)), 0)
        if decode is not None and len(decode):
            tokens = h[decode]
            result[decode] = tokens.where(self._active(index, forward, step[decode], tokens, positions), 0)
        return result

    def _allowed(self, index: int, state: PromptState, step: Step, positions: Tensor | None) -> Tensor:
        """``[N, D]`` boolean: R and C of each token's unit, at their places in ``h``; everything where there is no partition.

        Where processes choose together, of all channels.
        """
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
            shard = self.together(index)
            values = h.gather(1, places) if shard is None else shard.picked(h, places)
            dropped = self.choose(index, forward, step, values, weight)
            active = active.scatter(1, places.gather(1, dropped), False)
        active = self._own(index, active)
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
        taught = in_original_order(h[new].detach(), mine.expert, positions)
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
                scores = self._of_all(index, self._own(index, weight) * energy[done].sqrt())
                fresh = partition(scores, self.sizes[index])
                ffn.keep_late(done, fresh, weight.gather(1, fresh.candidates))
        return waited


def _places(channels: Tensor, step: Step, positions: Tensor | None) -> Tensor:
    """``[N, n]``: where original channels of each token's expert are in ``h``."""
    if positions is None:
        return channels
    return positions[0][channels] if step.expert is None else positions[step.expert].gather(1, channels)


__all__ = ["ChannelEngine"]
