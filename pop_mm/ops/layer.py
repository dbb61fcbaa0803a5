"""What a decoder layer computes for a token besides its matrices, by the compiled library: norms, rotation, attention."""

from __future__ import annotations

from struct import pack

import torch
from torch import Tensor

from ..kernels.functions import untraced
from .library import library

KINDS = ("rounded before the weight", "rounded once", "rounded once, with the weight added to 1")


def norm_takes(x: Tensor, weight: Tensor) -> bool:
    """Whether :func:`norm` can compute these: ``[..., n]`` and ``[n]`` on the CPU, contiguous, of one dtype with a library."""
    return (
        x.dtype is weight.dtype
        and x.is_cpu
        and weight.is_cpu
        and weight.shape == x.shape[-1:]
        and x.is_contiguous()
        and weight.is_contiguous()
        and library(x.dtype) is not None
    )


@untraced
def norm(x: Tensor, weight: Tensor, eps: float, kind: int) -> Tensor:
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last axis, summed in float32 (float64 for float64).

    Parameters
    ----------
    x : Tensor
        ``[..., n]``.
    weight : Tensor
        ``[n]``.
    eps : float
    kind : int
        Number of one of :data:`KINDS`, which say where it is rounded: Llama's, GPT-OSS's, Gemma's.
    """
    out = torch.empty(x.shape, dtype=x.dtype, device="cpu")
    size, found = weight.numel(), library(x.dtype)
    assert found is not None
    addresses = x.data_ptr(), weight.data_ptr(), out.data_ptr()
    found.rms_norm(*addresses, x.numel() // size, size, eps, kind, torch.get_num_threads())
    return out


@untraced
def rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotate the heads of one token in place, rounded as transformers' ``apply_rotary_pos_emb`` rounds.

    Parameters
    ----------
    query, key : Tensor
        ``[..., H, d]`` and ``[..., G, d]``, contiguous.
    cos, sin : Tensor
        ``[..., d]`` of one token, contiguous, of the same dtype.
    """
    found, size = library(query.dtype), query.shape[-1]
    assert found is not None
    angles = (cos.data_ptr(), sin.data_ptr())
    first, second = query.data_ptr(), key.data_ptr()
    if second == first + query.nbytes:  # they lie in one piece
        found.rotate(first, *angles, (query.numel() + key.numel()) // size, size)
        return
    found.rotate(first, *angles, query.numel() // size, size)
    found.rotate(second, *angles, key.numel() // size, size)


def attention_takes(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether :func:`attention` can compute these: one token on the CPU, what belongs to a head and token side by side."""
    return (
        query.dtype == key.dtype == value.dtype
        and query.is_cpu
        and query.shape[0] == query.shape[2] == key.shape[0] == 1
        and key.shape[:3] == value.shape[:3]
        and min(key.shape) > 0
        and query.shape[3] == key.shape[3]
        and query.shape[1] % key.shape[1] == 0
        and key.stride(3) == value.stride(3) == 1
        and library(query.dtype) is not None
    )


def attention_described(query: Tensor, key: Tensor, value: Tensor, scale: float, length: int | None = None) -> bytes:
    """Shapes and strides of :func:`attention` as the C functions take them; ``length`` instead of the keys' own."""
    sizes = query.shape[1], key.shape[1], value.shape[2] if length is None else length, query.shape[3], value.shape[3]
    return pack("=9qd", *sizes, key.stride(1), key.stride(2), value.stride(1), value.stride(2), scale)


@untraced
def attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """``softmax(q K^T * scale) V`` for a single query; scores and sums in float32 (float64 for float64).

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
    heads, size, (length, wide) = query.shape[1], query.shape[3], value.shape[2:]
    sums = torch.float64 if query.dtype is torch.float64 else torch.float32
    out = torch.empty(1, 1, heads, wide, dtype=query.dtype, device="cpu")
    room = torch.empty(heads * (size + length + wide), dtype=sums, device="cpu")
    found = library(query.dtype)
    assert found is not None
    found.attend(
        attention_described(query, key, value, scale),
        query.data_ptr(),
        key.data_ptr(),
        value.data_ptr(),
        room.data_ptr(),
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out


__all__ = ["KINDS", "attention", "attention_described", "attention_takes", "norm", "norm_takes", "rotate"]
