"""What the methods share over the records of one model: tokens of a forward, states of prompts, what a crop takes back.

State belongs to a prompt (:class:`~pop_mm.decoding.state.PromptState`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..errors import PhaseError
from ..events import Events, tells
from ..formats.asking import with_progress
from ..methods import ChannelMethod
from ..modality import added, weighted_sum
from ..settings.config import PopConfig
from ..tracking.phase import Forward
from ..tracking.step import Step
from ..weights.shards import Shard
from .state import PromptState


class Engine(ABC):
    """A method's work, over the records of one model. Knows no architecture.

    Parameters
    ----------
    records : sequence of FFN, Experts or InputGroup
        Those that are really pruned.
    config : PopConfig
    modalities : int
        How many the model can have: 1 is text alone.
    events : Events, optional
        Of the session.

    Attributes
    ----------
    masks : sequence of str
        Inputs of a record that may be masked: "x" of gate and up (or attention), "h" of down.
    own_choice : ChannelMethod or None
        What scores a step's candidates in a way that no kernel knows.
    """

    masks: Sequence[str] = ("h",)
    own_choice: ChannelMethod | None = None

    def __init__(
        self, records: Sequence[Any], config: PopConfig, modalities: int = 1, events: Events | None = None
    ) -> None:
        self.ffns = records
        self.config = config
        self.events = Events() if events is None else events
        self._modalities = modalities
        self._weights: list[Tensor] | None = None  # of each FFN [E, D]
        self._waiting: list[int] = []  # records that decode steps teach

    @cached_property
    def processes(self) -> Shard | None:
        """Of a model that is spread over processes: what sums over them."""
        return next((record.shard for record in self.ffns if record.shard is not None), None)

    def together(self, index: int) -> Shard | None:
        """What a record's channels are chosen with, where processes choose together."""
        shard: Shard | None = self.ffns[index].shard
        return shard if shard is not None and shard.together else None

    @property
    def decides_alone(self) -> bool:
        """Whether this process decides about a prompt without the others."""
        return not any(self.together(index) for index in range(len(self.ffns)))

    @abstractmethod
    def new_state(self, rows: int, cache: Any) -> PromptState:
        """State of a new prompt of ``rows`` sequences."""

    @abstractmethod
    def partition_all(self, state: PromptState) -> None:
        """Decide what is still undecided about a prompt; before its first decode step."""

    @abstractmethod
    def check_finite(self, state: PromptState) -> None:
        """Raise :class:`NonFiniteError` if the prompt's statistics are not finite."""

    @abstractmethod
    def mask(self, index: int, which: str, forward: Forward, values: Tensor, positions: Tensor | None = None) -> Tensor:
        """One input of record number ``index``, zero where a decode step leaves it out; observe the prompt's.

        Parameters
        ----------
        which : {"x", "h"}
        values : Tensor
            ``[B, q, n]`` or ``[B * q, n]``.
        positions : Tensor or None
            ``[E, D]``: where each original channel is in ``h``; None if in its own place.

        Returns
        -------
        Tensor
            Like ``values``; the very same where nothing is left out.
        """

    @abstractmethod
    def apply(self, index: int, forward: Forward, step: Step, h: Tensor, positions: Tensor | None) -> Tensor:
        """:meth:`mask` for the inputs of down projections, ``[N, D]``, of tokens as an executor has routed them."""

    @abstractmethod
    def _read(self, index: int) -> Tensor:
        """What the weights of a record say about its channels; they must be in the original order."""

    @property
    def per_sequence(self) -> bool:
        """Whether each row has its own partition and step mask."""
        return self.config.batch == "per_sequence"

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

    @tells("statistics")
    def count_tokens(self, forward: Forward) -> None:
        """Add this forward's prompt tokens to the state's count."""
        state: PromptState = forward.state
        for modality, mask in self.step(forward, where(forward)).by_modality:
            shape = forward.rows, forward.length
            tokens = torch.full((forward.rows,), forward.length) if mask is None else mask.view(shape).sum(-1)
            state.tokens_of = added(state.tokens_of, modality, tokens)

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

    def _first_bad(self, bad: Tensor) -> int | None:
        """The first place of ``bad`` (integers from 0) that is not 0 in some process; the same in all."""
        found = (bad if self.processes is None else self.processes.sum(bad)).nonzero()
        return int(found[0]) if len(found) else None

    def _unlearn(self, index: int, state: PromptState, length: int) -> bool:
        """Unlearn the steps that a cache of ``length`` tokens no longer holds; whether a unit has lost its partition."""
        return False


def where(forward: Forward) -> torch.device:
    """Device of what is known about the positions of a forward."""
    if forward.positions is not None:
        return forward.positions.modality.device
    return torch.device("cpu") if forward.valid is None else forward.valid.device


__all__ = ["Engine", "where"]
