"""A slow correction of thresholds, which holds the share that is read over a long answer.

An answer's activations are not quite the prompt's: thresholds of the prompt may keep a few hundredths more or less of them
than was asked for. So all thresholds of a sequence are multiplied by one factor ``f``, which changes from block to block of the
answer's tokens::

    ln f_k = ln f_(k-1) + s_(k-2) - s        for k >= 2; f_0 = f_1 = 1

``s_k`` is the share of the weights that the tokens of block k read, ``s`` the share that they are meant to. Between the
block that is looked at and the one that is corrected lies another, so that a token's thresholds depend on tokens alone that came
well before it: a step of several tokens, of which assisted decoding crops some off again, finds the thresholds that steps of one
token find. Ours; no source does this.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 64  # tokens
_MOST = 1.0  # of ln f, either way


class Correction:
    """The factor of one prompt's thresholds, for each of its sequences.

    Parameters
    ----------
    intended : float
        Share of the weights that a token is meant to read.
    """

    def __init__(self, intended: float) -> None:
        self.intended = intended
        self._start: int | None = None  # of the answer in the cache
        self._tokens: Tensor | None = None  # [B, T, 2], float64: weights that each token read, and of how many
        self._logs: list[Tensor] = []  # [B], float64: ln f of each block but the first two

    def restart(self) -> None:
        """The prompt goes on: what follows is another answer."""
        self._start, self._tokens, self._logs = None, None, []

    def begin(self, position: int, length: int) -> Tensor | None:
        """Before a forward of answer tokens.

        Parameters
        ----------
        position : int
            Tokens in the cache before the first of them; of earlier forwards' tokens those behind are cropped off.
        length : int
            How many they are.

        Returns
        -------
        Tensor or None
            ``[B, length]``, float32: the factor of each; None if all are 1.
        """
        if self._start is None:
            self._start = position
        first = position - self._start
        if self._tokens is not None and self._tokens.shape[1] > first:
            self._tokens = self._tokens[:, :first]
            del self._logs[first // BLOCK :]
        last = (first + length - 1) // BLOCK
        while len(self._logs) < min(last - 1, first // BLOCK):
            self._logs.append(self._next())
        if last < 2 or not self._logs:
            return None
        if length == 1 and len(self._logs) == last - 1:
            return self._logs[-1].exp().float().unsqueeze(1)
        numbers = (torch.arange(first, first + length).div(BLOCK, rounding_mode="floor") - 1).clamp_(0, len(self._logs))
        logs = torch.stack([torch.zeros_like(self._logs[0]), *self._logs], 1)
        return logs[:, numbers.to(logs.device)].exp().float()

    def _next(self) -> Tensor:
        assert self._tokens is not None
        start = len(self._logs) * BLOCK
        read, whole = self._tokens[:, start : start + BLOCK].sum(1).unbind(-1)
        before = self._logs[-1] if self._logs else torch.zeros_like(read)
        off = torch.where(whole > 0, read / whole.clamp(min=1) - self.intended, 0)
        return (before + off).clamp(-_MOST, _MOST)

    def end(self, read: Tensor) -> None:
        """After that forward: ``[B, length, 2]``, float64, weights that each token read, and of how many."""
        if self._tokens is not None:  # of one row, where the prompt's only sequence is continued by several
            read = torch.cat([self._tokens.expand(len(read), -1, -1).to(read.device), read], 1)
        self._tokens = read

    def copy(self) -> Correction:
        """An independent copy; tensors are never changed in place, so it shares them."""
        twin = Correction(self.intended)
        twin._start, twin._tokens, twin._logs = self._start, self._tokens, list(self._logs)
        return twin

    def select_rows(self, rows: Tensor) -> None:
        """Row b is row ``rows[b]`` of before."""
        self._tokens = None if self._tokens is None else self._tokens[rows.to(self._tokens.device)]
        self._logs = [log[rows.to(log.device)] for log in self._logs]


__all__ = ["BLOCK", "Correction"]
