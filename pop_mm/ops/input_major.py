"""Whole products with input-major weights of half precision, for CPUs on which torch has no fast ones.

torch multiplies bfloat16 and float16 by oneDNN where that knows the dtype: bfloat16 from AVX-512 on, float16 from AVX512-FP16
on. Elsewhere it has loops of its own, which take 15 to 80 times as long on input-major weights as on row-major ones (measured on
Zen 3, 2048 x 2048). Here a block of rows at a time becomes float32, which every CPU multiplies fast.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

_BLOCK = 2**20  # entries that are float32 at once: 4 MiB
_ASKED = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}


@cache
def is_slow(dtype: torch.dtype) -> bool:
    """Whether torch's own products of this dtype are slow on this CPU where weights are input-major."""
    if dtype not in _ASKED:
        return False
    supported = getattr(torch.ops.mkldnn, _ASKED[dtype], None)  # None: a torch without oneDNN
    return supported is None or not supported()


def helps(x: Tensor, weight: Tensor) -> bool:
    """Whether :func:`product` is faster than torch's own: on such a CPU, where no gradient is wanted and nothing is compiled.

    What does not fit a weight is left to torch, which says so.
    """
    return (
        x.is_cpu
        and x.dtype is weight.dtype
        and is_slow(x.dtype)
        and not torch.compiler.is_compiling()
        and not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad))
    )


@torch.no_grad()
def product(x: Tensor, weight: Tensor, bias: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
    """``(x @ weight) * scale + bias``, summed in float32 and rounded once.

    Parameters
    ----------
    x : Tensor
        ``[..., in]``.
    weight : Tensor
        ``[in, out]``, floats or int8.
    bias, scale : Tensor, optional
        ``[out]``.

    Returns
    -------
    Tensor
        ``[..., out]``, of the dtype of ``x``.
    """
    inputs, outputs = weight.shape
    rows = x.reshape(-1, x.shape[-1]).float()
    out = torch.zeros(len(rows), outputs, dtype=torch.float32, device=x.device)
    size = max(1, min(inputs, _BLOCK // max(1, outputs)))
    block = torch.empty(size, outputs, dtype=torch.float32, device=x.device)
    for some, part in zip(rows.split(size, 1), weight.split(size), strict=True):
        out.addmm_(some, block[: len(part)].copy_(part))
    if scale is not None:
        out *= scale
    if bias is not None:
        out += bias
    return out.to(x.dtype).view(*x.shape[:-1], outputs)


__all__ = ["helps", "is_slow", "product"]
