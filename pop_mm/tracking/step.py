"""What the algorithm knows of the rows of an FFN's activations: whose each is, and which part of a generation."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from .phase import Forward, Phase

_BY_TOKEN = frozenset(("unit", "column", "number", "valid", "modality", "expert", "weight"))


@dataclass(frozen=True, eq=False)
class Step:
    """The tokens of one forward, flat and row by row; of routed experts, the pairs of token and expert.

    Attributes
    ----------
    phase : Phase
    rows, length : int
        B and q of the forward.
    unit : Tensor
        ``[N]``: row of the statistics and of the plan that the token belongs to. With ``batch="per_sequence"`` its sequence's, of
        routed experts its expert's.
    column, number : Tensor
        ``[N]``: the token's column, and the number of its decode step, below 0 in the prompt.
    valid : Tensor or None
        ``[N]``, boolean: false for padding, rows that have finished, and experts that another device holds. None: all count.
    modality : Tensor or None
        ``[N]``: index of the token's modality; None if all is text.
    present : tuple of int
        The modalities that occur.
    expert, weight : Tensor or None
        ``[N]``: the expert's number and the router's weight; None in a dense FFN.
    """

    phase: Phase
    rows: int
    length: int
    unit: Tensor
    column: Tensor
    number: Tensor
    valid: Tensor | None = None
    modality: Tensor | None = None
    present: tuple[int, ...] = (0,)
    expert: Tensor | None = None
    weight: Tensor | None = None

    @classmethod
    def of(cls, forward: Forward, device: torch.device, per_sequence: bool) -> Step:
        """The tokens of a forward as a dense FFN gets them."""
        rows, length = forward.rows, forward.length
        row = torch.arange(rows, device=device).repeat_interleave(length)
        column = number = torch.arange(length, device=device).repeat(rows)
        if forward.phase is Phase.PREFILL:
            number = column - length
        elif forward.phase is Phase.MIXED:
            start = forward.decode_from
            number = column - (start if isinstance(start, int) else start.to(device)[row])
        valid = None if forward.valid is None else forward.valid.to(device).reshape(-1)
        unit = row if per_sequence else torch.zeros_like(row)
        if forward.positions is None:
            return cls(forward.phase, rows, length, unit, column, number, valid)
        modality = forward.positions.modality.to(device).reshape(-1).long()
        return cls(forward.phase, rows, length, unit, column, number, valid, modality, forward.positions.present)

    def routed(self, ids: Tensor, weights: Tensor, order: Tensor | None, experts: int) -> Step:
        """The pairs of token and expert of one call of a layer's experts.

        Parameters
        ----------
        ids, weights : Tensor
            ``[B * q, k]``, the router's choice.
        order : Tensor or None
            ``[N]``: the flat (token, choice) number of each pair; None if in that very order.
        experts : int
            E. A number past the last one marks an expert of another device (expert parallelism).
        """
        order = torch.arange(ids.numel(), device=ids.device) if order is None else order
        chosen, tokens = ids.reshape(-1)[order], self[order // ids.shape[-1]]
        here, expert = chosen < experts, chosen.clamp(max=experts - 1)
        return replace(
            tokens,
            unit=tokens.unit * experts + expert,
            valid=here if tokens.valid is None else here & tokens.valid,
            expert=expert,
            weight=weights.reshape(-1)[order],
        )

    def __getitem__(self, index: Tensor) -> Step:
        """Some of the tokens."""
        by_token = {name: value[index] for name, value in vars(self).items() if name in _BY_TOKEN and value is not None}
        return replace(self, **by_token)

    def __len__(self) -> int:
        return len(self.unit)

    @cached_property
    def counted(self) -> Tensor | None:
        """``[N]``, boolean: the prompt's tokens that count; None if all are."""
        if self.phase is not Phase.MIXED:
            return self.valid
        prompt = self.number < 0
        return prompt if self.valid is None else prompt & self.valid

    @cached_property
    def by_modality(self) -> list[tuple[int, Tensor | None]]:
        """A modality and which of the counted tokens are of it, ``[N]``; None if all tokens are."""
        if self.modality is None:
            return [(0, self.counted)]
        masks = ((m, self.modality == m) for m in self.present)
        return [(m, mask if self.counted is None else mask & self.counted) for m, mask in masks]

    def choices(self, per_sequence: bool) -> tuple[Tensor | None, int]:
        """Which tokens share a choice (``[N]``; None if each has its own), and how many choices there are.

        With ``batch="shared"`` the tokens of one step share it, of routed experts those that the step sends to one expert.
        """
        if self.rows == 1 or per_sequence or not len(self):
            return None, len(self)
        if self.expert is not None:
            together, group = torch.unique(self.expert * (self.length + 1) + self.number, return_inverse=True)
            return group, len(together)
        if self.phase is Phase.DECODE:
            return self.number, self.length
        number = self.number - self.number.min()
        return number, int(number.max()) + 1


__all__ = ["Step"]
