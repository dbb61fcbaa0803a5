"""What executors know of a weight: the tensors behind it, and whether they can be read and moved."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Stored:
    """The tensors behind a weight ``[out, in]`` (``[in, out]`` of a Conv1D): it is ``matrix * scale``.

    Attributes
    ----------
    matrix : Tensor
        Of the weight's shape: floats, or int8. Whoever gives it other memory or another order changes the weight.
    scale : Tensor or None
        ``[out, 1]``, float32: the factor of each output. None: 1.
    dtype : torch.dtype
        Of the module's inputs and outputs.
    """

    matrix: Tensor
    scale: Tensor | None
    dtype: torch.dtype

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All of them."""
        return (self.matrix,) if self.scale is None else (self.matrix, self.scale)

    @property
    def nbytes(self) -> int:
        """Of all."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def part(self, start: int, end: int, wide: torch.dtype) -> Tensor:
        """Outputs ``start`` to ``end`` of the matrix as floats, ``[n, in]``, in ``wide``."""
        found = self.matrix[start:end].to(wide)
        return found if self.scale is None else found.mul_(self.scale[start:end])


class Format(Protocol):
    """A way to store the weight of a linear module. One class, one file.

    Attributes
    ----------
    name : str
        For tables and JSON.
    """

    name: str

    def holds(self, weight: Any) -> bool:
        """Whether a weight is stored so, in whatever variant."""

    def why_not(self, weight: Any) -> str | None:
        """Why the tensors do not say by themselves what the module multiplies with, or None if they do: ``it is ...``."""

    def stored(self, weight: Any) -> Stored:
        """The tensors of a weight, for which :meth:`why_not` finds no reason."""


__all__ = ["Format", "Stored"]
