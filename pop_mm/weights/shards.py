"""Weights that transformers has spread over processes (``tp_plan="auto"``): the part that this process has, and sums over all.

Such a weight is a DTensor: it says the shape of the whole, and each process holds and multiplies its own part of it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..classes import is_a, same_class


@dataclass(frozen=True, eq=False)
class Part(ABC):
    """The channels, or entries of an input, that one of several processes has.

    Attributes
    ----------
    start, size : int
        The first, and how many: they lie together.
    whole : int
        D, of all processes.
    """

    start: int
    size: int
    whole: int

    @abstractmethod
    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over the processes, which must all ask for it."""

    def own(self, whole: Tensor) -> Tensor:
        """``[..., size]`` of ``[..., D]``, a view."""
        return whole.narrow(-1, self.start, self.size)

    def picked(self, own: Tensor, channels: Tensor) -> Tensor:
        """What stands at ``channels`` (``[N, n]``, numbers among all) of ``[N, D]``, of which this process has ``own``."""
        if self.size == self.whole:
            return own.gather(1, channels)
        place, mine = self.places(channels)
        return self.sum(own.gather(1, place.clamp(0, max(self.size - 1, 0))).where(mine, 0))

    def places(self, channels: Tensor) -> tuple[Tensor, Tensor]:
        """Where channels (numbers among all) stand among this process's own, and, boolean, which of them do."""
        place = channels - self.start
        return place, (place >= 0) & (place < self.size)


@dataclass(frozen=True, eq=False)
class Shard(Part):
    """The part of one record's channels that transformers has given to this process.

    Attributes
    ----------
    group : ProcessGroup
    together : bool
        Whether the processes choose among all channels together; else each among its own.
    """

    group: Any
    together: bool = False

    @property
    def channels(self) -> int:
        """How many are chosen among."""
        return self.whole if self.together else self.size

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over the processes, which must all ask for it."""
        total = tensor.detach().clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(total, group=self.group)
        return total

    def gathered(self, own: Tensor) -> Tensor:
        """``[..., D]`` from each process's ``[..., size]``."""
        found = own.new_zeros((*own.shape[:-1], self.whole))
        self.own(found).copy_(own.detach())
        return self.sum(found)


def of_chosen(shard: Shard | None, own: Tensor) -> Tensor:
    """``[..., D]`` of the channels that are chosen among: this process's or, where processes choose together, those of all."""
    return shard.gathered(own) if shard is not None and shard.together else own


def is_spread(weight: object) -> bool:
    """Whether a weight is a DTensor."""
    return is_a(type(weight), "torch.distributed.tensor:DTensor")


def local(weight: Tensor) -> Tensor:
    """What this process has of a weight: all of it, if it is not spread."""
    found: Tensor = weight.detach().to_local() if is_spread(weight) else weight  # type: ignore[attr-defined]
    return found


def shard_of(weight: Any, axis: int, together: bool) -> Shard | None:
    """The part of a spread weight's ``axis`` that this process has; None if each has all of it.

    Raises
    ------
    ValueError
        It is cut into pieces along the axis that do not lie together.
    """
    if not is_spread(weight):
        return None
    (placement,), whole, processes = weight.placements, weight.shape[axis], weight.device_mesh.size()
    if placement.is_replicate() or placement.dim % weight.dim() != axis:
        return None
    if not same_class(type(placement), "torch.distributed.tensor:Shard"):
        raise ValueError(f"is cut as {placement}")
    start = min(weight.device_mesh.get_local_rank() * -(-whole // processes), whole)
    return Shard(start, local(weight).shape[axis], whole, weight.device_mesh.get_group(), together)


__all__ = ["Part", "Shard", "is_spread", "local", "of_chosen", "shard_of"]
