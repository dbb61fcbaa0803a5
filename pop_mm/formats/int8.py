"""torchao's int8 weight-only weights, as ``TorchAoConfig(Int8WeightOnlyConfig())`` and ``quantize_`` make them.

A weight ``[out, in]`` is an ``Int8Tensor``: ``qdata`` of the same shape and a ``scale`` for each output, which torchao's own
``linear`` multiplies with once, behind the product with ``qdata``.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from ..classes import same_class
from .base import Stored

_ACTIVATIONS = ("act_quant_kwargs", "act_quant_scale", "act_quant_zero_point", "act_pre_scale")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Int8:
    """torchao's ``Int8Tensor`` with a scale for each output, no zero point, and activations as they are."""

    name = "int8"

    def holds(self, weight: Any) -> bool:
        """Whether it is an ``Int8Tensor``."""
        return same_class(type(weight), "torchao.quantization:Int8Tensor")

    def why_not(self, weight: Any) -> str | None:
        """A reason for other scales (of groups, of the whole tensor), zero points, and activations that are quantised too."""
        if any(getattr(weight, name, None) is not None for name in _ACTIVATIONS):
            return "is an Int8Tensor that quantises or scales activations too"
        qdata, scale, zero = weight.qdata, weight.scale, getattr(weight, "zero_point", None)
        if weight.dim() != 2 or type(qdata) is not Tensor or type(scale) is not Tensor or weight.dtype not in _DTYPES:
            return f"is an Int8Tensor of {weight.dtype} with shape {tuple(weight.shape)}"
        if qdata.dtype != torch.int8 or scale.dtype != torch.float32 or not scale.is_contiguous():
            return f"is an Int8Tensor of {qdata.dtype} with scales of {scale.dtype}"
        if tuple(scale.shape) != (len(weight), 1) or list(weight.block_size) != [1, weight.shape[1]]:
            return f"is an Int8Tensor with scales of shape {tuple(scale.shape)}, not one for each output"
        if zero is not None and zero.device.type != "meta" and bool(zero.any()):
            return "is an Int8Tensor with zero points"
        return None if _is_as_known() else "is an Int8Tensor of a torchao that computes something else with it"

    def stored(self, weight: Any) -> Stored:
        """``qdata`` and ``scale`` themselves."""
        return Stored(weight.qdata, weight.scale, weight.dtype)


@cache
@torch.no_grad()
def _is_as_known() -> bool:
    """Whether this torchao's linear is ``(x @ qdata.T) * scale``, as far as a small one can tell."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    generator = torch.Generator().manual_seed(0)
    linear: Any = nn.Linear(32, 16, bias=False, device="cpu", dtype=torch.float32)
    linear.weight.copy_(torch.randn(16, 32, generator=generator))
    quantize_(linear, Int8WeightOnlyConfig())
    x, weight = torch.randn(2, 32, generator=generator), linear.weight
    return torch.allclose(linear(x), x @ (weight.qdata * weight.scale).t(), rtol=1e-4, atol=1e-4)
