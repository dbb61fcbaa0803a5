"""Channels exchanged in place, in every tensor that holds something of them.

An exchange is exact, whatever bits a weight has, and can be undone: the same exchange again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import kernels

_SWAP_ROWS = 256  # rows moved at once: few calls, and the scratch stays small
_INTEGER = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

Matrix = tuple[Tensor, int]  # with the axis along which its channels lie: 0 for rows, 1 for columns


class ChannelTensor(NamedTuple):
    """A weight or bias that holds something of every channel.

    Attributes
    ----------
    name : str
        Qualified name in the model.
    tensor : Tensor
    matrices : callable
        ``matrices(tensor, expert)``: views in which a row or a column is a channel, of this tensor or of one of its shape (its
        gradient); ``expert`` is None for a dense FFN. In views of all experts these axes are the last two.
    """

    name: str
    tensor: Tensor
    matrices: Callable[[Tensor, int | None], Iterable[Matrix]]


def as_integers(tensor: Tensor) -> Tensor:
    """A view as integers, so that every bit pattern survives a move."""
    return tensor.detach().view(_INTEGER[tensor.element_size()])


@torch.inference_mode(False)  # weights may be written in and out of inference mode
@torch.no_grad()
def swap_channels(matrices: Iterable[Matrix], first: Tensor, second: Tensor) -> None:
    """Exchange channels ``first[i]`` and ``second[i]`` in place; in all matrices or, where one fails for want of memory, in none.

    Parameters
    ----------
    matrices : iterable of Matrix
    first, second : Tensor
        ``[n]``, int64, disjoint and without repeats.
    """
    done: list[Callable[[], None]] = []
    try:
        for matrix, axis in matrices:
            for exchange in exchanges(matrix, axis, first, second):
                exchange()
                done.append(exchange)
    except BaseException:
        for exchange in reversed(done):
            exchange()
        raise
    finally:
        torch.clear_autocast_cache()  # else autocast goes on with casts of weights in the order of before


def exchanges(matrix: Tensor, axis: int, first: Tensor, second: Tensor) -> Iterator[Callable[[], None]]:
    """The steps of an exchange, each of which succeeds or changes nothing, and undoes itself; by the library where it can."""
    library = kernels.library() if matrix.is_cpu else None
    if library is not None:
        yield partial(_exchange, library.exchange, matrix, axis, first, second)
    elif axis == 0:
        for a, b in zip(first.split(_SWAP_ROWS), second.split(_SWAP_ROWS), strict=True):
            yield partial(_swap_rows, as_integers(matrix), torch.cat([a, b]), torch.cat([b, a]))
    else:
        # gather and scatter_ on a block of rows are far faster than index_select and index_copy_ along columns
        target = torch.cat([first, second]).expand(_SWAP_ROWS, -1)
        source = torch.cat([second, first]).expand(_SWAP_ROWS, -1)
        for rows in as_integers(matrix).split(_SWAP_ROWS):
            yield partial(_swap_columns, rows, target[: len(rows)], source[: len(rows)])


def _exchange(exchange: Callable[..., None], matrix: Tensor, *arguments: Any) -> None:
    exchange(matrix, *arguments)
    if not matrix.is_inference():
        torch.autograd.graph.increment_version(matrix)  # autograd does not see what the library writes


def _swap_rows(rows: Tensor, target: Tensor, source: Tensor) -> None:
    rows.index_copy_(0, target, rows.index_select(0, source))


def _swap_columns(rows: Tensor, target: Tensor, source: Tensor) -> None:
    rows.scatter_(1, target, rows.gather(1, source))
