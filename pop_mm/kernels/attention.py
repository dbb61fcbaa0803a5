"""Attention of one token over its cache, in one call of the compiled library."""

from __future__ import annotations

import ctypes
from struct import pack

import torch
from torch import Tensor

from .functions import INT, POINTER, function, untraced


class Attention:
    """``softmax(q K^T * scale) V`` for a single query in bfloat16; sums in float32. In float32 torch is as fast.

    Parameters
    ----------
    library : ctypes.CDLL
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self._function = function(library, "attend_bfloat16", ctypes.c_char_p, *[POINTER] * 5, INT)

    def takes(self, query: Tensor, key: Tensor, value: Tensor) -> bool:
        """Whether it can compute these: one token on the CPU, all in bfloat16, what belongs to a head and token side by side."""
        return (
            query.dtype == key.dtype == value.dtype == torch.bfloat16
            and query.is_cpu
            and query.shape[0] == query.shape[2] == key.shape[0] == 1
            and key.shape[:3] == value.shape[:3]
            and min(key.shape) > 0
            and query.shape[3] == key.shape[3]
            and query.shape[1] % key.shape[1] == 0
            and key.stride(3) == value.stride(3) == 1
        )

    @untraced
    def __call__(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """The mean of the values, weighted as the query asks.

        Parameters
        ----------
        query : Tensor
            ``[1, H, 1, d]``.
        key, value : Tensor
            ``[1, G, T, d]`` and ``[1, G, T, d_v]``; H / G query heads share each of the G.

        Returns
        -------
        Tensor
            ``[1, 1, H, d_v]``.
        """
        query = query.contiguous()
        heads, groups, size = query.shape[1], key.shape[1], query.shape[3]
        length, wide = value.shape[2:]
        out = torch.empty(1, 1, heads, wide, dtype=query.dtype, device="cpu")
        room = torch.empty(heads * (size + length + wide), dtype=torch.float32, device="cpu")
        self._function(
            pack(
                "=9qf",
                *(heads, groups, length, size, wide),
                *(key.stride(1), key.stride(2), value.stride(1), value.stride(2)),
                scale,
            ),
            query.data_ptr(),
            key.data_ptr(),
            value.data_ptr(),
            room.data_ptr(),
            out.data_ptr(),
            torch.get_num_threads(),
        )
        return out
