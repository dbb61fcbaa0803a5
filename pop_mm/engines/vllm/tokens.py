"""Which token of a forward belongs to which request, and whether it is a prompt's. Knows neither vLLM nor methods.

A token at a position below its prompt's length is a prompt token, any other a decode step. That holds for prompts in chunks,
for steps that mix prompts and decoding, and for what is computed again after a preemption.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True)
class Part:
    """Prompt tokens of one forward that lie in one KV block.

    Attributes
    ----------
    block : int
        Number of the block.
    start, stop : int
        Rows of the forward.
    fresh : bool
        Whether the first of them is the block's first token, so that whatever the block held is gone.
    begins : bool
        Whether the first of them is the first token of its sequence.
    """

    block: int
    start: int
    stop: int
    fresh: bool
    begins: bool


@dataclass(frozen=True)
class Prompt:
    """The prompt of a request that decodes.

    Attributes
    ----------
    request : str
        Id of the request.
    length : int
        Tokens of its prompt.
    blocks : Tensor
        ``[n]``, int64: the KV blocks that hold them.
    """

    request: str
    length: int
    blocks: Tensor

    @property
    def key(self) -> tuple[str, int]:
        """What tells it from other prompts: a request whose prompt goes on has another one."""
        return self.request, self.length


@dataclass(frozen=True, eq=False)
class Tokens:
    """The tokens of one forward, request by request.

    Attributes
    ----------
    parts : sequence of Part
        Of the prompt tokens.
    decoding : sequence of Prompt
        Of the R requests that have a decode step here.
    rows : Tensor or slice
        The decode tokens' rows of the forward, ``[N]`` int64; a slice where they follow each other.
    row : Tensor
        ``[N]``, int64: which of ``decoding`` each of them belongs to.
    position : Tensor
        ``[N]``, int64: their places in their sequences.
    """

    parts: Sequence[Part]
    decoding: Sequence[Prompt]
    rows: Tensor | slice
    row: Tensor
    position: Tensor

    @cached_property
    def single(self) -> bool:
        """Whether this is one decode step of one request and nothing else."""
        return len(self.row) == 1 and not self.parts

    @cached_property
    def keys(self) -> tuple[tuple[str, int], ...]:
        """The prompts of the requests that decode."""
        return tuple(prompt.key for prompt in self.decoding)


def tokens_of(
    requests: Sequence[str],
    scheduled: NDArray[np.integer],
    computed: NDArray[np.integer],
    prompts: NDArray[np.integer],
    blocks: NDArray[np.integer],
    block_size: int,
) -> Tokens:
    """The tokens of a forward, from what an engine's scheduler knows.

    Parameters
    ----------
    requests : sequence of str
        Ids of the B requests, in the order of their tokens.
    scheduled, computed, prompts : ndarray
        ``[B]``: tokens of this forward, tokens before them, and tokens of the prompt.
    blocks : ndarray
        ``[B, n]``: KV blocks of each request.
    block_size : int
        Tokens of a block.
    """
    parts: list[Part] = []
    decoding: list[Prompt] = []
    rows: list[NDArray[np.int64]] = []
    row: list[NDArray[np.int64]] = []
    positions: list[NDArray[np.int64]] = []
    start = 0
    for index, request in enumerate(requests):
        first, count, prompt = int(computed[index]), int(scheduled[index]), int(prompts[index])
        last = first + count
        place = first
        while place < min(last, prompt):
            offset = place % block_size
            until = min(place + block_size - offset, last, prompt)
            block = int(blocks[index, place // block_size])
            parts.append(Part(block, start + place - first, start + until - first, offset == 0, place == 0))
            place = until
        if last > prompt:
            own = np.arange(max(first, prompt), last, dtype=np.int64)
            rows.append(own - first + start)
            row.append(np.full(len(own), len(decoding), dtype=np.int64))
            positions.append(own)
            held = blocks[index, : -(-prompt // block_size)].astype(np.int64)
            decoding.append(Prompt(request, prompt, torch.from_numpy(held)))
        start += count
    return Tokens(parts, decoding, _slice(_joined(rows)), *(torch.from_numpy(_joined(a)) for a in (row, positions)))


def _joined(arrays: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
    return np.concatenate(arrays) if arrays else np.zeros(0, dtype=np.int64)


def _slice(rows: NDArray[np.int64]) -> Tensor | slice:
    """Rows that follow each other as a slice, which copies nothing."""
    if len(rows) and rows[-1] - rows[0] == len(rows) - 1:
        return slice(int(rows[0]), int(rows[-1]) + 1)
    return torch.from_numpy(rows)


__all__ = ["Part", "Prompt", "Tokens", "tokens_of"]
