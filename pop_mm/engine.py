"""POP for one model: statistics in prefill, the partition, the choice at each decode step. Knows no architecture.

State belongs to a prompt (:class:`PromptState`), always in original channel numbers. Where a backend has reordered an FFN's
channels it passes ``positions``: the position of each original channel.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from . import kernels
from .asking import with_progress
from .config import PopConfig
from .errors import NonFiniteError, PhaseError
from .experts import Experts
from .layout import FFN
from .modality import MODALITIES, TEXT, ByModality, added, weighted_sum
from .partition import Choose, Partition, Sizes, dropped_candidates, partition, shared_scores, step_chooser
from .phase import Forward, Phase
from .routed import ExpertsState, RoutedExperts
from .scoring import channel_energy, get_scorer
from .steplog import StepLog


class FFNState:
    """What one prompt knows about one FFN.

    Attributes
    ----------
    energies : mapping of int to Tensor
        Modality -> sum of squared activations of each channel over its tokens of the prompt, ``[D]`` or ``[B, D]``.
    partition : Partition or None
    candidate_weight : Tensor
        The scorer's weight of each candidate, ``[..., |C|]``.
    steps : StepLog
    """

    def __init__(self, sizes: Sizes) -> None:
        self.energies: Mapping[int, Tensor] = {}
        self.partition: Partition | None = None
        self.candidate_weight: Tensor | None = None
        self.steps = StepLog(sizes)

    def add(self, modality: int, energy: Tensor) -> None:
        """Count more tokens of one modality."""
        self.energies = added(self.energies, modality, energy)

    def energy(self, weights: Mapping[str, float]) -> Tensor | None:
        """All modalities together, each times its weight; None before the first token."""
        return weighted_sum(self.energies, weights)

    def copy(self) -> FFNState:
        """An independent copy. Tensors are never changed in place, so they are shared."""
        twin = copy.copy(self)
        twin.steps = self.steps.copy()
        return twin

    def invalidate(self) -> None:
        """The partition so far no longer holds."""
        self.partition = None

    def select_rows(self, rows: Tensor) -> None:
        """Row b is row ``rows[b]`` of before."""
        self.energies = {modality: energy[rows.to(energy.device)] for modality, energy in self.energies.items()}
        if self.partition is not None:
            assert self.candidate_weight is not None
            rows = rows.to(self.candidate_weight.device)
            self.partition, self.candidate_weight = self.partition[rows], self.candidate_weight[rows]
        self.steps.select_rows(rows)


class PromptState:
    """What is known about one prompt, for every FFN; it lives as long as the prompt's cache.

    Attributes
    ----------
    tokens_of : mapping of int to Tensor
        Modality -> ``[B]``: prompt tokens counted so far.
    moved : bool
        Whether a backend has seen the current partition.
    """

    def __init__(self, ffns: Sequence[FFNState | ExpertsState], rows: int, cache: Any) -> None:
        self.ffns = ffns
        self.rows = rows
        self.tokens_of: Mapping[int, Tensor] = {}
        self.moved = False
        self._cache: Any = None
        if cache is not None:
            self.bind(cache)

    @property
    def tokens(self) -> Tensor | None:
        """``[B]``: prompt tokens counted so far, of all modalities."""
        return weighted_sum(self.tokens_of, {})

    def bind(self, cache: Any) -> None:
        """Name the cache that this state belongs to."""
        self._cache = weakref.ref(cache)

    @property
    def alive(self) -> bool:
        """Whether the cache still exists."""
        return self._cache is not None and self._cache() is not None

    def copy(self, cache: Any) -> PromptState:
        """The same knowledge for a copy of the cache."""
        twin = copy.copy(self)
        twin.ffns = [ffn.copy() for ffn in self.ffns]
        twin.bind(cache)
        return twin

    def invalidate(self) -> None:
        """More of the prompt comes: the partitions so far no longer hold."""
        self.moved = False
        for ffn in self.ffns:
            ffn.invalidate()

    @property
    def partitioned(self) -> bool:
        """Whether every FFN has its partition."""
        return all(ffn.partition is not None for ffn in self.ffns)

    def select_rows(self, rows: Tensor) -> None:
        """Row b of the batch is row ``rows[b]`` of before (beam search reorders them); for ``batch="per_sequence"``."""
        self.rows = len(rows)
        self.tokens_of = {modality: tokens[rows.to(tokens.device)] for modality, tokens in self.tokens_of.items()}
        for ffn in self.ffns:
            ffn.select_rows(rows)


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
    """

    def __init__(
        self, ffns: Sequence[FFN | Experts], sizes: Sequence[Sizes], config: PopConfig, modalities: int = 1
    ) -> None:
        self.ffns = ffns
        self.sizes = sizes
        self.config = config
        self.scorer = get_scorer(config.scorer)
        self._weights: list[Tensor] | None = None
        self._routed: dict[int, RoutedExperts] = {}
        self._modalities = modalities

    @property
    def per_sequence(self) -> bool:
        """Whether each row has its own partition and step mask."""
        return self.config.batch == "per_sequence"

    def new_state(self, rows: int, cache: Any) -> PromptState:
        """State of a new prompt of ``rows`` sequences."""
        groups = rows if self.per_sequence else 1
        states = [
            FFNState(sizes) if isinstance(ffn, FFN) else ExpertsState(ffn, sizes, groups, self._modalities)
            for ffn, sizes in zip(self.ffns, self.sizes, strict=True)
        ]
        return PromptState(states, rows, cache)

    def ffn(self, index: int) -> FFN:
        """Number ``index`` of the FFNs, which is not a set of experts."""
        ffn = self.ffns[index]
        assert isinstance(ffn, FFN)
        return ffn

    def routed(self, index: int) -> RoutedExperts:
        """The algorithm for routed experts, number ``index`` of the FFNs."""
        self.channel_weights()
        return self._routed[index]

    def settle(self, state: PromptState, cache_length: Callable[[], int]) -> None:
        """Before a forward: the cache says which steps of the one before it were accepted."""
        for index, ffn in enumerate(state.ffns):
            if isinstance(ffn, ExpertsState) and ffn.undecided is not None:
                self.routed(index).settle(ffn, cache_length())

    def channel_weights(self) -> list[Tensor]:
        """The scorer's weight of each channel of each FFN, ``[D]`` (``[E, D]`` for experts); computed once."""
        if self._weights is None:
            indices = with_progress(range(len(self.ffns)), len(self.ffns), "Reading column norms")
            self._weights = [self._read(index) for index in indices]
        return self._weights

    def _read(self, index: int) -> Tensor:
        """What the weights of an FFN say about its channels; they must be in the original order."""
        ffn = self.ffns[index]
        weight = self.scorer.channel_weight(ffn)
        weight = weight.to(torch.promote_types(weight.dtype, torch.float32))  # a scorer of one's own may be narrower
        if isinstance(ffn, Experts):
            self._routed[index] = RoutedExperts(ffn, self.sizes[index], self.config, weight, self.scorer)
        return weight

    # prefill --------------------------------------------------------------------------------------------------------

    def count_tokens(self, forward: Forward) -> None:
        """Add this forward's prompt tokens to the state's count."""
        state: PromptState = forward.state
        for modality, mask in self._masks(forward, _where(forward)):
            tokens = torch.full((forward.rows,), forward.length) if mask is None else mask.sum(-1)
            state.tokens_of = added(state.tokens_of, modality, tokens)

    def observe(
        self, index: int, forward: Forward, h: Tensor, positions: Tensor | None, numbers: Tensor | None = None
    ) -> None:
        """Add the squared activations of the prompt's tokens (of its probe tokens, if there are any); padding never counts.

        Parameters
        ----------
        h : Tensor
            ``[B, q, D]``, the input of the down projection; ``[n, D]`` of the tokens that ``numbers`` names.
        positions : Tensor or None
            ``[D]``: where each original channel is in ``h``; None if in its own place.
        numbers : Tensor, optional
            ``[n]``, from :meth:`probe_numbers`.
        """
        h = self.scorer.prompt_activations(h.detach())
        for modality, mask in self._observed(forward, h.device):
            if self.per_sequence:
                energy = channel_energy(h, mask)
            else:
                counted = None if mask is None else mask.flatten()
                if counted is not None and numbers is not None:
                    counted = counted[numbers]
                energy = channel_energy(h.flatten(0, -2), counted)
            _ffn_state(forward.state, index).add(
                modality, energy if positions is None else energy.index_select(-1, positions)
            )

    def partition(self, index: int, state: PromptState) -> Partition:
        """Make (or return) the partition of one FFN, or of a layer's experts, from the statistics so far."""
        ffn = state.ffns[index]
        if isinstance(ffn, ExpertsState):
            return self.routed(index).partition(ffn)
        if ffn.partition is None:
            return self._keep(index, ffn, self.rank(index, state, self.config.modality_weights))
        return ffn.partition

    def _keep(self, index: int, ffn: FFNState, part: Partition) -> Partition:
        ffn.partition = part
        ffn.candidate_weight = self.channel_weights()[index][part.candidates]
        return part

    def rank(self, index: int, state: PromptState, modality_weights: Mapping[str, float]) -> Partition:
        """The partition of one FFN that these weights of the modalities would make (for experts: of every unit)."""
        return partition(self._scores(index, state, modality_weights), self.sizes[index])

    def _scores(self, index: int, state: PromptState, modality_weights: Mapping[str, float]) -> Tensor:
        """``[D]``, ``[B, D]`` or (experts) ``[U, D]``.

        An FFN that the prompt did not run (a cross-attention layer without an image) has nothing but its weights to go by.
        """
        ffn = state.ffns[index]
        if isinstance(ffn, ExpertsState):
            return self.routed(index).scores(ffn, modality_weights)
        energy, weight = ffn.energy(modality_weights), self.channel_weights()[index]
        if energy is not None:
            return weight * energy.sqrt()
        return weight.expand(state.rows, -1) if self.per_sequence else weight

    def partition_all(self, state: PromptState) -> None:
        """Make every partition that is missing; before the first decode step. FFNs that are alike are ranked together."""
        self.check_prompt(state)
        alike: dict[Any, list[tuple[int, FFNState, Tensor]]] = {}
        for index, ffn in enumerate(state.ffns):
            if isinstance(ffn, ExpertsState):
                self.partition(index, state)
            elif ffn.partition is None:
                scores = self._scores(index, state, self.config.modality_weights)
                alike.setdefault((self.sizes[index], scores.device, scores.dtype), []).append((index, ffn, scores))
        for (sizes, *_), group in alike.items():
            parts = partition(torch.stack([scores for *_, scores in group]), sizes)
            for number, (index, ffn, _) in enumerate(group):
                self._keep(index, ffn, parts[number])

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

    def check_finite(self, state: PromptState) -> None:
        """Raise :class:`NonFiniteError` if the prompt's statistics are not finite; one look for all FFNs."""
        totals = [(i, energy.sum()) for i, ffn in enumerate(state.ffns) if (energy := ffn.energy({})) is not None]
        if not totals:
            return
        finite = torch.stack([s.to(totals[0][1].device) for _, s in totals]).isfinite()
        if not bool(finite.all()):
            first = self.ffns[totals[int((~finite).nonzero()[0])][0]]
            raise NonFiniteError(
                f"The activations of {first.name} are NaN or infinite in the prompt, so its channels cannot be ranked. "
                "Check the weights and inputs, or run the model in bfloat16 or float32 if it overflows in float16."
            )

    def _prompt_positions(self, forward: Forward, device: torch.device) -> Tensor | None:
        """``[B, q]``: which positions are tokens of the prompt; None if all are."""
        valid = forward.valid
        if forward.phase is not Phase.MIXED:
            return valid
        prompt = ~_decode_positions(forward, device)
        return prompt if valid is None else prompt & valid.to(device)

    def _observed(self, forward: Forward, device: torch.device) -> list[ByModality]:
        """The tokens of this forward that statistics are made from, by modality. Made once for all FFNs."""
        if device not in forward.by_modality:
            masks = self._masks(forward, device)
            if self.config.probe_tokens:
                probes = self._probes(forward, device)
                masks = [(m, probes if mask is None else mask & probes) for m, mask in masks]
            forward.by_modality[device] = masks
        return forward.by_modality[device]

    def _probes(self, forward: Forward, device: torch.device) -> Tensor:
        """``[B, q]``: the ``probe_tokens`` of each row's prompt, evenly spaced over those that count, the last one included.

        All of them if there are no more.
        """
        counting = torch.zeros(forward.rows, forward.length, dtype=torch.bool, device=device)
        for modality, mask in self._masks(forward, device):
            if self.config.modality_weights.get(MODALITIES[modality], 1) > 0:
                counting = counting | (True if mask is None else mask)
        wanted, count = self.config.probe_tokens, counting.sum(-1, keepdim=True).clamp_(min=1)
        number = counting.cumsum(-1)  # from 1
        return counting & (number * wanted // count > (number - 1) * wanted // count)

    def probe_numbers(self, forward: Forward) -> Tensor:
        """``[n]``: the probe tokens of this forward as numbers of its positions, row by row."""
        return self._probes(forward, _where(forward)).flatten().nonzero().squeeze(1)

    def _masks(self, forward: Forward, device: torch.device) -> list[ByModality]:
        prompt = self._prompt_positions(forward, device)
        if prompt is not None:
            prompt = prompt.to(device)
        if forward.positions is None:
            return [(TEXT, prompt)]
        modality = forward.positions.modality.to(device)
        masks = [(m, modality == m) for m in forward.positions.present]
        return [(m, mask if prompt is None else mask & prompt) for m, mask in masks]

    # decode ---------------------------------------------------------------------------------------------------------

    def select(
        self, index: int, forward: Forward, candidates: Tensor, weight: Tensor, ranks: Tensor | None = None
    ) -> Tensor:
        """Which candidates each step of this forward leaves out (paper 3.3).

        Parameters
        ----------
        candidates : Tensor
            ``[B, q, |C|]``: activations of the candidates, in ascending channel order or in the order that ``ranks`` says.
        weight : Tensor
            ``[|C|]`` or ``[B, |C|]``: the scorer's weight of each.
        ranks : Tensor or None
            ``[|C|]``: which of the candidates in ascending order each one is.

        Returns
        -------
        Tensor
            ``[q, n]`` (shared) or ``[B, q, n]`` (per sequence), indices into ``candidates``.
        """
        if self.per_sequence:
            scores = candidates.abs() * weight.unsqueeze(1)
        else:
            scores = shared_scores(candidates, weight, forward.valid)
        dropped = dropped_candidates(scores, self.sizes[index])
        _ffn_state(forward.state, index).steps.add(dropped, ranks)
        return dropped

    def chooser(
        self, index: int, state: PromptState, weight: Tensor, ranks: Tensor
    ) -> Callable[[Tensor, Tensor | None], None]:
        """:meth:`select` for one token of each sequence, with everything but the activations known beforehand.

        The function takes activations of R and C, ``[B, K]``, which it zeroes where the step leaves them out, and which of
        several sequences have a say, ``[B]`` or None. It runs once a step and FFN, so it is as short as it can be.
        """
        sizes, log, device = self.sizes[index], _ffn_state(state, index).steps, weight.device

        @cache
        @torch.inference_mode(False)  # buffers that may be written in and out of inference mode
        def torchs() -> Choose:
            return step_chooser(weight, sizes)

        def by_torch(h: Tensor, valid: Tensor | None) -> None:
            torchs()(h, valid, log.slot(ranks, device))

        library = kernels.library() if weight.is_cpu and weight.dtype is torch.float32 else None
        if library is None:
            return by_torch
        return library.chooser(weight.contiguous(), sizes, self.step_slot(index, state, ranks), by_torch)

    def step_slot(self, index: int, state: PromptState, ranks: Tensor) -> Callable[[], int]:
        """For C that chooses by itself, for one token of each sequence: the address to note at what it leaves out, ``[1, n]``."""
        return partial(_ffn_state(state, index).steps.address, ranks, ranks.device)

    def apply(self, index: int, forward: Forward, h: Tensor, positions: Tensor | None) -> Tensor:
        """The reference path: observe, partition and mask the input of the down projection, as the phase asks.

        Parameters
        ----------
        h : Tensor
            ``[B, q, D]`` or ``[B * q, D]``, all channels.
        positions : Tensor or None
            As for :meth:`observe`.

        Returns
        -------
        Tensor
            Like ``h``, zero on the channels that are left out.
        """
        shape = h.shape
        h = h.view(forward.rows, forward.length, shape[-1])
        if forward.phase is Phase.PREFILL:
            self.observe(index, forward, h, positions)
            if self.config.prefill == "partition":
                allowed = _in_place(self.partition(index, forward.state).allowed(), positions)
                h = h.where(allowed.unsqueeze(-2), 0)
        elif forward.phase is Phase.DECODE:
            h = h.where(self._active(index, forward, h, positions), 0)
        else:
            h = self._apply_mixed(index, forward, h, positions)
        return h.view(shape)

    def _active(self, index: int, forward: Forward, h: Tensor, positions: Tensor | None) -> Tensor:
        """``[q, D]`` or ``[B, q, D]`` boolean: the active channels, at their places in ``h``."""
        ffn = _ffn_state(forward.state, index)
        part = ffn.partition
        assert part is not None and ffn.candidate_weight is not None
        allowed = part.allowed().unsqueeze(-2)
        if not part.sizes.candidates:
            return _in_place(allowed, positions)
        places = part.candidates if positions is None else positions[part.candidates]
        if self.per_sequence:
            candidates = h.gather(-1, places.unsqueeze(1).expand(-1, forward.length, -1))
        else:
            candidates = h[..., places]
        dropped = self.select(index, forward, candidates, ffn.candidate_weight)
        channels = part.candidates.unsqueeze(-2).expand(*dropped.shape[:-1], -1).gather(-1, dropped)
        active = allowed.expand(*dropped.shape[:-1], -1).scatter(-1, channels, False)
        return _in_place(active, positions)

    def _apply_mixed(self, index: int, forward: Forward, h: Tensor, positions: Tensor | None) -> Tensor:
        """Prompt and decode steps in one forward: each decode position is selected as if it had come alone."""
        prompt = self._prompt_positions(forward, h.device)
        if prompt is None or bool(prompt.any()):
            self.observe(index, forward, h, positions)
        part = self.partition(index, forward.state)
        decode = _decode_positions(forward, h.device)
        rows, columns = decode.nonzero(as_tuple=True)
        start = forward.decode_from if isinstance(forward.decode_from, int) else forward.decode_from.to(h.device)[rows]
        steps = columns - start
        steps = steps - steps.min() if len(steps) else steps
        valid = None if forward.valid is None else forward.valid.to(h.device)[rows, columns]
        tokens = h[rows, columns]
        if self.per_sequence or forward.rows == 1:
            keep = self._active_rows(index, forward.state, tokens, rows, part, positions)
        else:
            keep = self._active_steps(index, forward.state, tokens, steps, valid, part, positions)
        prompt_allowed = None
        if self.config.prefill == "partition":
            prompt_allowed = _in_place(part.allowed(), positions).unsqueeze(-2)
        h = h.clone() if prompt_allowed is None else h.where(prompt_allowed, 0)
        h[rows, columns] = tokens.where(keep, 0)
        return h

    def _active_rows(
        self, index: int, state: PromptState, tokens: Tensor, rows: Tensor, part: Partition, positions: Tensor | None
    ) -> Tensor:
        """``[N, D]``: active channels of N tokens, each a step of its own, of batch rows ``rows``."""

        def own(t: Tensor) -> Tensor:
            return t[rows] if self.per_sequence else t.expand(len(tokens), *t.shape)

        ffn = _ffn_state(state, index)
        assert ffn.candidate_weight is not None
        active, chosen = own(part.allowed()), own(part.candidates)
        if self.sizes[index].candidates:
            places = chosen if positions is None else positions[chosen]
            dropped = dropped_candidates(tokens.gather(-1, places).abs() * own(ffn.candidate_weight), self.sizes[index])
            if state.rows == 1:
                ffn.steps.add(dropped)
            active = active.scatter(-1, chosen.gather(-1, dropped), False)
        return _in_place(active, positions)

    def _active_steps(
        self,
        index: int,
        state: PromptState,
        tokens: Tensor,
        steps: Tensor,
        valid: Tensor | None,
        part: Partition,
        positions: Tensor | None,
    ) -> Tensor:
        """``[N, D]``: active channels of N tokens, where tokens of one step share their choice."""
        active = part.allowed()
        if not (self.sizes[index].candidates and len(tokens)):
            return _in_place(active, positions)
        places = part.candidates if positions is None else positions[part.candidates]
        weight = _ffn_state(state, index).candidate_weight
        assert weight is not None
        squared = tokens[:, places].to(weight.dtype).square()
        if valid is not None:
            squared = squared.masked_fill(~valid.unsqueeze(-1), 0)
        sums = squared.new_zeros(int(steps.max()) + 1, squared.shape[-1]).index_add_(0, steps, squared)
        dropped = dropped_candidates(sums.sqrt() * weight, self.sizes[index])
        _ffn_state(state, index).steps.add(dropped)
        active = active.expand(len(dropped), -1).scatter(-1, part.candidates[dropped], False)
        return _in_place(active, positions)[steps]


def _where(forward: Forward) -> torch.device:
    """Where what is known about the positions of a forward is."""
    if forward.positions is not None:
        return forward.positions.modality.device
    return torch.device("cpu") if forward.valid is None else forward.valid.device


def _ffn_state(state: PromptState, index: int) -> FFNState:
    ffn = state.ffns[index]
    assert isinstance(ffn, FFNState)
    return ffn


def _decode_positions(forward: Forward, device: torch.device) -> Tensor:
    """``[B, q]``: which positions of a MIXED forward are decode steps."""
    start = forward.decode_from
    columns = torch.arange(forward.length, device=device)
    if isinstance(start, int):
        return (columns >= start).expand(forward.rows, -1)
    return columns >= start.to(device).unsqueeze(-1)


def _in_place(channels: Tensor, positions: Tensor | None) -> Tensor:
    """A mask over original channels, moved to where the channels are."""
    if positions is None:
        return channels
    return torch.empty_like(channels, memory_format=torch.contiguous_format).scatter_(
        -1, positions.expand_as(channels), channels
    )
