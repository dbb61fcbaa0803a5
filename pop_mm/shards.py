"""Weights that transformers has spread over processes (``tp_plan="auto"``): the part that this process has, and sums over all.

Such a weight is a DTensor: it says the shape of the whole, and each process holds and multiplies its own part of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .classes import is_a, same_class


@dataclass(frozen=True, eq=False)
class Shard:
    """The channels of one record that this process has, of those that all processes have.

    Attributes
    ----------
    start, size : int
        Its first channel, and how many: they lie together.
    whole : int
        D, of all processes.
    group : ProcessGroup
    together : bool
        Whether the processes choose among all channels together; else each among its own.
    """

    start: int
    size: int
    whole: int
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

    def own(self, whole: Tensor) -> Tensor:
        """``[..., size]`` of ``[..., D]``, a view."""
        return whole.narrow(-1, self.start, self.size)

    def picked(self, own: Tensor, channels: Tensor) -> Tensor:
        """What stands at ``channels`` (``[N, n]``, numbers among all) of ``[N, D]``, of which this process has ``own``."""
        place = channels - self.start
        mine = (place >= 0) & (place < self.size)
        return self.sum(own.gather(1, place.clamp(0, max(self.size - 1, 0))).where(mine, 0))


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


__all__ = ["Shard", "is_spread", "local", "shard_of"]
