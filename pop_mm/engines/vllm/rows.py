"""The products of one running request by chosen rows: what its thresholds leave out is not read.

A matrix is kept a second time, input-major, beside what vLLM multiplies prompts and batches with.
"""

from __future__ import annotations

from torch import Tensor

from ...ops.rows import Room, RowsLinear
from ...ops.rows import why_not as why_not_rows
from .masked import MaskedEntries
from .tokens import Tokens


class ChosenRows:
    """One linear module on steps of a single token that decodes.

    Parameters
    ----------
    masked : MaskedEntries
        Its input.
    turned : Tensor
        ``[in, out]``, contiguous: its weight on this rank.
    room : Room
        Shared by all modules.
    """

    def __init__(self, masked: MaskedEntries, turned: Tensor, room: Room) -> None:
        self._masked = masked
        self._rows = RowsLinear([(turned, None)], room)
        self.bytes = turned.numel() * turned.element_size()

    @staticmethod
    def why_not(turned: Tensor) -> str | None:
        """Why the compiled functions cannot read a turned weight, or None if they can."""
        return why_not_rows([(turned, None)])

    def takes(self, x: Tensor, tokens: Tokens) -> bool:
        """Whether a forward is one decode step of one request, without padding."""
        return tokens.single and self._rows.takes(x)

    def __call__(self, x: Tensor, bias: Tensor | None, tokens: Tokens) -> Tensor:
        """The product with the kept entries of ``x``, ``[..., in]`` of one token."""
        limit, norms, count = self._masked.of_step(tokens)
        (out,) = self._rows(x, limit, norms, count)
        out = out.view(*x.shape[:-1], -1)
        return out if bias is None else out + bias


__all__ = ["ChosenRows", "Room"]
