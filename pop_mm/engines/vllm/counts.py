"""How much of the weights decode steps kept, summed up on a worker. Knows no vLLM."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .masked import MaskedInput


class Counts(NamedTuple):
    """Sums over decode tokens, on one worker.

    Attributes
    ----------
    tokens : int
        How many there were.
    kept, all : int
        Bytes of the weights of taken-over modules, token by token: those that stand for kept entries, and those that there are.
    """

    tokens: int
    kept: int
    all: int


@dataclass(frozen=True)
class _Reading:
    """Entries that every input has kept so far, on their way to the host."""

    entries: Tensor
    tokens: int
    event: Any

    @property
    def arrived(self) -> bool:
        return self.event is None or bool(self.event.query())


class Counting:
    """Reads what inputs have kept, without making the host wait for a GPU."""

    def __init__(self) -> None:
        self._told = Counts(0, 0, 0)
        self._reading: _Reading | None = None

    def since_last(self, inputs: Sequence[MaskedInput[Any]], tokens: int) -> Counts | None:
        """What has come since the last answer.

        Parameters
        ----------
        inputs : sequence of MaskedInput
        tokens : int
            Decode tokens that went through each of them, since the beginning.

        Returns
        -------
        Counts or None
            None if nothing has come, or if a GPU has not sent it yet: then a later answer has it.
        """
        if self._reading is None and inputs and tokens > self._told.tokens:
            self._reading = _read(torch.cat([masked.kept_entries for masked in inputs]), tokens)
        reading = self._reading
        if reading is None or not reading.arrived:
            return None
        self._reading = None
        entries = reading.entries.tolist()
        now = Counts(
            reading.tokens,
            sum(count * masked.entry_bytes for count, masked in zip(entries, inputs, strict=True)),
            sum(reading.tokens * masked.shard.size * masked.entry_bytes for masked in inputs),
        )
        new = Counts(*(after - before for after, before in zip(now, self._told, strict=True)))
        self._told = now
        return new


def _read(entries: Tensor, tokens: int) -> _Reading:
    if not entries.is_cuda:
        return _Reading(entries, tokens, None)
    copied = entries.to("cpu", non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    return _Reading(copied, tokens, event)


__all__ = ["Counting", "Counts"]
