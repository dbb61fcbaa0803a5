"""What is known about one prompt: statistics, plans and the log of its decode steps. It belongs to a request, not to a model.

Everything of an FFN is kept by *unit*: one for the whole batch or one for each sequence (``batch="per_sequence"``), times the
experts of a layer. A dense FFN is the case of one expert.
"""

from __future__ import annotations

import copy
import weakref
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import PhaseError
from ..modality import weighted_sum
from ..partition import Partition, Sizes
from ..tracking.caches import known_length
from ..tracking.phase import Forward
from ..tracking.step import Step
from .history import Chunk, History
from .lessons import Lessons
from .steplog import StepLog


class FFNState:
    """What one prompt knows about one FFN, or about the experts of one layer. Channels have their original numbers.

    Attributes
    ----------
    experts : int or None
        E; None for a dense FFN.
    energies : Tensor or None
        Sum of squared activations of each channel over the unit's tokens of each modality, ``[M, U, D]``; None if the prompt did
        not run the FFN.
    seen, prompt_tokens : Tensor or None
        ``[U]``: tokens of the prompt whose modality counts, and all of them.
    partition : Partition or None
        Of every unit, ``[U, ...]``; means something where ``ready``.
    candidate_weight : Tensor or None
        The scorer's weight of each candidate, ``[U, |C|]``.
    ready, late : Tensor or None
        ``[U]``, boolean: units that have their partition, and those that got it while decoding.
    steps : StepLog
        Of a dense FFN.
    decode_tokens, dense_tokens : list of int
        By expert: tokens that it saw while decoding, and those that it ran dense for.
    lessons : Lessons
        What units without a partition have learned from decode steps.
    """

    def __init__(self, sizes: Sizes, experts: int | None = None) -> None:
        self.sizes = sizes
        self.experts = experts
        self.energies: Tensor | None = None
        self.seen: Tensor | None = None
        self.prompt_tokens: Tensor | None = None
        self.partition: Partition | None = None
        self.candidate_weight: Tensor | None = None
        self.ready: Tensor | None = None
        self.late: Tensor | None = None
        self.steps = StepLog(sizes)
        self.decode_tokens = [0] * (experts or 0)
        self.dense_tokens = [0] * (experts or 0)
        self.lessons = Lessons()
        self._all_ready = False

    def add(self, energies: Tensor, seen: Tensor, prompt_tokens: Tensor | None) -> None:
        """Count more tokens: ``[M, U, D]``, ``[U]``, and ``[U]`` of the prompt. Nothing is changed in place, so copies share."""
        self.energies = energies if self.energies is None else self.energies + energies
        self.seen = seen if self.seen is None else self.seen + seen
        if prompt_tokens is not None:
            before = self.prompt_tokens
            self.prompt_tokens = prompt_tokens if before is None else before + prompt_tokens

    def energy(self, weights: Mapping[str, float]) -> Tensor | None:
        """``[U, D]``: all modalities together, each times its weight; None before the first token."""
        if self.energies is None:
            return None
        return weighted_sum(dict(enumerate(self.energies)), weights)

    def count(self, step: Step, waiting: Tensor | None) -> None:
        """Note the decode tokens of each expert, and those that it ran dense for (``[N]``, boolean)."""
        assert step.expert is not None
        self.count_tokens(step.expert if step.valid is None else step.expert[step.valid], self.decode_tokens)
        if waiting is not None:
            self.count_tokens(step.expert[waiting if step.valid is None else waiting & step.valid], self.dense_tokens)

    def count_tokens(self, experts: Tensor, tokens: list[int]) -> None:
        """Add one token for each of ``experts``; numbers past the last one are another device's."""
        for expert, more in Counter(experts.reshape(-1).tolist()).items():
            if expert < len(tokens):
                tokens[expert] += more

    @property
    def all_ready(self) -> bool:
        """Whether every unit has its partition; the answer is kept once it is yes."""
        if not self._all_ready and self.ready is not None:
            self._all_ready = bool(self.ready.all())
        return self._all_ready

    def keep(self, part: Partition, weight: Tensor, ready: Tensor | None) -> None:
        """The partition of every unit, its candidates' weights ``[U, |C|]``, and the units that it holds for (None: all)."""
        self.partition, self.candidate_weight = part, weight
        self.ready = torch.ones(len(weight), dtype=torch.bool, device=weight.device) if ready is None else ready
        self.late = torch.zeros_like(self.ready)
        self._all_ready = ready is None

    def keep_late(self, units: Tensor, part: Partition, weight: Tensor) -> None:
        """The partitions of some units (``[n]``), made while decoding."""
        old = self.partition
        assert (
            old is not None and self.candidate_weight is not None and self.ready is not None and self.late is not None
        )
        self.partition = Partition(
            old.retained.index_copy(0, units, part.retained),
            old.candidates.index_copy(0, units, part.candidates),
            old.pruned.index_copy(0, units, part.pruned),
            self.sizes,
        )
        self.candidate_weight = self.candidate_weight.index_copy(0, units, weight)
        self.ready, self.late = self.ready.index_fill(0, units, True), self.late.index_fill(0, units, True)

    def unlearn(self, before: FFNState) -> None:
        """Know of the units what was known before some decode steps. Counts of steps go on."""
        for name in ("energies", "seen", "partition", "candidate_weight", "ready", "late"):
            setattr(self, name, getattr(before, name))
        self._all_ready = False

    def restore(self, before: FFNState) -> None:
        """Know what was known before a prefill that was cropped off. Counts of steps go on."""
        self.unlearn(before)
        self.prompt_tokens, self.lessons = before.prompt_tokens, before.lessons.copy()

    def invalidate(self) -> None:
        """The partitions so far no longer hold."""
        self.partition = self.ready = None
        self._all_ready = False
        self.lessons = Lessons()

    def snapshot(self) -> FFNState:
        """What is known now, without the log of steps."""
        twin = copy.copy(self)
        twin.steps, twin.lessons = StepLog(self.sizes), self.lessons.copy()
        twin.decode_tokens, twin.dense_tokens = list(self.decode_tokens), list(self.dense_tokens)
        return twin

    def copy(self) -> FFNState:
        """An independent copy."""
        twin = self.snapshot()
        twin.steps = self.steps.copy()
        return twin

    @torch.inference_mode(False)
    def select_rows(self, rows: Tensor) -> None:
        """Row b is row ``rows[b]`` of before."""
        experts = self.experts or 1

        def moved(tensor: Tensor) -> Tensor:
            return tensor.unflatten(0, (-1, experts))[rows.to(tensor.device)].flatten(0, 1)

        if self.energies is not None:
            self.energies = torch.stack([moved(energy) for energy in self.energies])
        if self.partition is not None:
            part = self.partition
            self.partition = Partition(moved(part.retained), moved(part.candidates), moved(part.pruned), part.sizes)
        for name in ("seen", "prompt_tokens", "candidate_weight", "ready", "late"):
            if (tensor := getattr(self, name)) is not None:
                setattr(self, name, moved(tensor))
        self.lessons = self.lessons.none()
        self.steps.select_rows(rows)


@dataclass(frozen=True)
class Snapshot:
    """What was known about a prompt at one time. Tensors are never changed in place, so it shares them."""

    tokens_of: Mapping[int, Tensor]
    ffns: Sequence[FFNState]


class PromptState:
    """What is known about one prompt, for every FFN; it lives as long as the prompt's cache.

    Attributes
    ----------
    tokens_of : mapping of int to Tensor
        Modality -> ``[B]``: prompt tokens counted so far.
    moved : bool
        Whether an executor has seen the current partition.
    history : History
        What was known before each prefill forward but the first.
    countable : bool
        Whether the cache counts its tokens. Where it does not (some with linear attention), it cannot be cropped either.
    length : int or None
        Tokens that the cache held after the latest forward, where it says so without waiting.
    drops : bool
        Whether the cache has dropped earlier tokens by itself, so that its length no longer tells which it holds.
    """

    def __init__(self, ffns: Sequence[FFNState], rows: int, cache: Any) -> None:
        self.ffns = ffns
        self.rows = rows
        self.tokens_of: Mapping[int, Tensor] = {}
        self.moved = False
        self.history: History[Snapshot] = History()
        self.countable = True
        self.length: int | None = None
        self.drops = False
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
        twin.history = self.history.copy()
        twin.bind(cache)
        return twin

    def begin_chunk(self, forward: Forward) -> None:
        """Before a forward that holds prompt: remember what is known without it."""
        if forward.past is not None and forward.prompt_length:
            self.history.begin(forward.past, forward.prompt_length, self._snapshot, forward.next_chunk)

    def end_chunk(self, forward: Forward) -> None:
        """After such a forward: a cache may hold fewer tokens than it was given."""
        columns = forward.prompt_length
        if forward.past is not None and forward.cache is not None and columns:
            length = int(forward.cache.get_seq_length())
            self.countable = length > 0 and not self.drops
            self.history.end(length - (forward.length - columns))

    def end_forward(self, forward: Forward) -> None:
        """After any forward: whether the cache has dropped tokens of earlier forwards to take in those of this one.

        What a first prefill dropped of its own tokens (a compressed prompt) leaves the later ones in order.
        """
        length = None if forward.cache is None else known_length(forward.cache)
        if length is not None and forward.past and length < forward.past + forward.length:
            self.drops, self.countable = True, False
        self.length = length

    def check_crop(self, length: int) -> None:
        """Raise :class:`PhaseError` if a cache that drops tokens was cropped as well since the latest forward."""
        if self.drops and self.length is not None and length < self.length:
            raise PhaseError(
                f"The cache holds {length} tokens and held {self.length} after its latest forward. It drops tokens by itself (a "
                "window, or another choice of what to keep), so its length does not tell which tokens were cropped off. Start a "
                "new cache, or crop only caches that keep every token."
            )

    def _snapshot(self) -> Snapshot:
        return Snapshot(self.tokens_of, [ffn.snapshot() for ffn in self.ffns])

    def before(self, chunk: Chunk[Snapshot]) -> PromptState:
        """What was known before a prefill forward, for the rows of now."""
        assert chunk.before is not None
        state = PromptState([ffn.snapshot() for ffn in chunk.before.ffns], self.rows, None)
        state.tokens_of = chunk.before.tokens_of
        if chunk.rows is not None:
            state.select_rows(chunk.rows)
        return state

    def restore(self, chunk: Chunk[Snapshot], before: PromptState) -> None:
        """Know what was known before a prefill forward that was cropped off the cache."""
        self.tokens_of, self.moved = before.tokens_of, False
        for mine, known in zip(self.ffns, before.ffns, strict=True):
            mine.restore(known)
        self.history.forget(chunk)

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
        self.history.select_rows(rows)
        for ffn in self.ffns:
            ffn.select_rows(rows)


__all__ = ["FFNState", "PromptState"]
