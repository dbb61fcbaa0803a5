"""A decoder layer of one token by rows, in two calls of the compiled library: up to its cache, and from there on."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from struct import pack
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels.functions import untraced
from .layer import attention_described
from .rows import NO_FFN, RowsFFN, RowsLinear

_LENGTHS = 256  # tokens in a cache, after which its room is asked for again


class Norm(NamedTuple):
    """A norm as the C functions take it."""

    weight: int  # its address
    eps: float
    kind: int  # as of pop_mm.ops.layer.norm


NO_NORM = Norm(0, 0.0, 0)


def norms_described(norms: Sequence[Norm]) -> bytes:
    """Norms one behind the other."""
    return b"".join(pack("=qdq", *norm) for norm in norms)


class RowsLayer:
    """Norms, projections by rows, rotation, attention and residuals of a layer; what the modules compute one by one, bit for bit.

    It does not keep the kernels and their weights alive: whoever calls it has them (:meth:`is_of`).

    Parameters
    ----------
    inward, outward : RowsLinear
        Of q, k and v, and of o.
    ffn : RowsFFN or None
        None if the layer's FFN is left to the caller.
    thresholds : sequence of Tensor
        ``[1]`` each, float32 on the CPU: of the input of q, k and v, of that of o, of the FFN's x and h (or of nothing).
    kept : sequence of Tensor
        int64 on the CPU, ``[1]``, ``[1]`` and ``[2]``: the numbers of entries kept are added to them.
    head : int
        Entries of one.
    """

    def __init__(
        self,
        inward: RowsLinear,
        outward: RowsLinear,
        ffn: RowsFFN | None,
        thresholds: Sequence[Tensor],
        kept: Sequence[Tensor],
        head: int,
    ) -> None:
        self._made_of = tuple(None if kernel is None else weakref.ref(kernel) for kernel in (inward, outward, ffn))
        self._held = *thresholds, *kept  # as the memory is
        first, second = ([t.data_ptr() for t in some] for some in (thresholds, kept))
        first, second = first + [0] * (4 - len(first)), second + [0] * (3 - len(second))
        matrices = inward.described + outward.described + (NO_FFN if ffn is None else ffn.described)
        self._described = matrices + pack("=8q", *first, *second, head)
        self._library, self._room, self._head = inward.library, inward.room, head
        self._columns, self._outputs, self._dtype = inward.columns, inward.outputs, inward.dtype
        self._sizes: dict[tuple[int, int], int] = {}

    def is_of(self, *kernels: RowsLinear | RowsFFN | None) -> bool:
        """Whether it was made of these, which are alive then."""
        return all(
            (None if known is None else known()) is kernel for known, kernel in zip(self._made_of, kernels, strict=True)
        )

    @untraced
    def begin(self, norms: bytes, hidden: Tensor, cosine: Tensor, sine: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value of a token.

        Parameters
        ----------
        norms : bytes
            Four, from :func:`norms_described`: the layer's first, those of a query head and a key head (:data:`NO_NORM`
            twice if there are none), the layer's second.
        hidden : Tensor
            ``[1, 1, H]``.
        cosine, sine : Tensor
            ``[..., d]`` of one token, contiguous.

        Returns
        -------
        tuple of Tensor
            ``[1, heads, 1, d]`` each.
        """
        outputs, threads = self._outputs, torch.get_num_threads()
        if (size := self._sizes.get((0, threads))) is None:
            size = self._sizes[0, threads] = self._library.begin_room(self._described, self._columns, threads)
        out = torch.empty(1, 1, sum(outputs), dtype=self._dtype, device="cpu")
        self._library.begin_layer(
            self._described,
            norms,
            hidden.data_ptr(),
            self._columns,
            cosine.data_ptr(),
            sine.data_ptr(),
            out.data_ptr(),
            self._room.address(size),
            threads,
        )
        heads = out.view(1, -1, 1, self._head)
        query, key, value = heads.split_with_sizes([n // self._head for n in outputs], 1)
        return query, key, value

    @untraced
    def end(self, norms: bytes, query: Tensor, key: Tensor, value: Tensor, scale: float, hidden: Tensor) -> Tensor:
        """What the layer makes of a token, ``[1, 1, H]``; without its FFN if that is left to the caller.

        Parameters
        ----------
        norms, hidden
            As of :meth:`begin`.
        query, key, value, scale
            As of :func:`pop_mm.ops.layer.attention`.
        """
        threads = torch.get_num_threads()
        longest = -(-value.shape[2] // _LENGTHS) * _LENGTHS
        if (room := self._sizes.get((longest, threads))) is None:
            shape = attention_described(query, key, value, scale, longest)
            room = self._sizes[longest, threads] = self._library.end_room(self._described, shape, threads)
        out = torch.empty(hidden.shape, dtype=hidden.dtype, device="cpu")
        self._library.end_layer(
            self._described,
            norms,
            attention_described(query, key, value, scale),
            query.data_ptr(),
            key.data_ptr(),
            value.data_ptr(),
            hidden.data_ptr(),
            out.data_ptr(),
            self._room.address(room),
            threads,
        )
        return out


__all__ = ["NO_NORM", "Norm", "RowsLayer", "norms_described"]
