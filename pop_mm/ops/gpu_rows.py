"""Decode steps of one token that read chosen rows of input-major matrices, in Triton; the contract is that of :mod:`.rows`.

Everything that a step writes but its result lies in buffers that are made once, and thresholds are read from tensors: a CUDA
graph finds them where they were. With TRITON_INTERPRET=1 in the environment the kernels run on the CPU, slowly, for tests.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

import torch
from torch import Tensor

from ..kernels import View
from ..kernels.gpu import _interpreted
from .reference import FFNWeights

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Blocks: chosen by counting registers and programs, not measured.
_PRODUCTS = {"BLOCK_IN": 16, "BLOCK_OUT": 256}
_FINISH = {"BLOCK": 256}
_PROGRAMS = 1024  # of a product: several for each multiprocessor


def why_not_dtypes(dtype: torch.dtype, weights: torch.dtype) -> str | None:
    """Why there are no kernels for a model's dtype and that of its weights, or None if there are."""
    if dtype not in _DTYPES or weights not in (dtype, torch.int8):
        return f"there is none for {dtype} with weights of {weights}"
    return None


def why_not(weights: Sequence[View], dtype: torch.dtype | None = None) -> str | None:
    """Why the kernels cannot read these, ``[..., in, out]`` each, or None if they can; ``dtype`` as for :func:`.rows.why_not`."""
    tensors = [t for view in weights for t in view if t is not None]
    if find_spec("triton") is None:
        return "the package triton is not installed"
    if len({t.device for t in tensors}) > 1 or (tensors[0].device.type != "cuda" and not _interpreted()):
        return "the weights are not on one CUDA device"
    stored, wanted = weights[0][0].dtype, weights[0][0].dtype if dtype is None else dtype
    same = {weight.dtype for weight, _ in weights} == {stored}
    if (
        not same
        or why_not_dtypes(wanted, stored)
        or any(bias is not None and bias.dtype is not wanted for _, bias in weights)
    ):
        return f"the weights' dtypes: {', '.join(sorted({str(t.dtype) for t in tensors}))}"
    for weight, bias in weights:
        if not weight.numel():
            return f"a weight is empty: {tuple(weight.shape)}"
        if weight.stride(-1) != 1 and weight.shape[-1] > 1:
            return f"a weight is not stored input-major: {tuple(weight.shape)} with strides {weight.stride()}"
        if bias is not None and bias.stride(-1) != 1 and bias.shape[-1] > 1:
            return f"a bias is not contiguous: {tuple(bias.shape)} with strides {bias.stride()}"
    return None


class _Product:
    """One input's products with one matrix, or two of the same shape and strides: their parts, which have to be summed."""

    def __init__(self, first: Tensor, dtype: torch.dtype, second: Tensor | None = None) -> None:
        from ..kernels.triton_ffn import dtype_of
        from . import triton_rows

        self.kernels = triton_rows
        self._first, self._second = first, second
        self._inputs, self.outputs = first.shape
        wide = torch.promote_types(dtype, torch.float32)
        self.accumulate = dtype_of(wide)
        self._blocks = -(-self.outputs // _PRODUCTS["BLOCK_OUT"])
        pieces = -(-self._inputs // _PRODUCTS["BLOCK_IN"])
        a_part = -(-pieces // min(pieces, max(1, _PROGRAMS // self._blocks)))
        self.splits, self._width = -(-pieces // a_part), a_part * _PRODUCTS["BLOCK_IN"]
        with torch.inference_mode(False):  # a buffer that may be written in and out of inference mode
            self.partial = first.new_empty(self.splits, 1 if second is None else 2, self.outputs, dtype=wide)

    def __call__(self, x: Tensor, threshold: Tensor, norms: Tensor | None, kept: Tensor | None) -> None:
        """Fill ``partial``, for ``x`` of ``[in]``."""
        self.kernels.products_kernel[self._blocks, self.splits](
            x,
            norms,
            threshold,
            self._first,
            self._second,
            self.partial,
            kept,
            self._inputs,
            self.outputs,
            self._first.stride(0),
            self._width,
            ACCUMULATE=self.accumulate,
            **_PRODUCTS,
        )

    def finish(self, scale: Tensor | None, bias: Tensor | None, out: Tensor) -> None:
        """The output of the one matrix."""
        self.kernels.finish_kernel[(-(-self.outputs // _FINISH["BLOCK"]),)](
            self.partial, scale, bias, out, self.splits, self.outputs, ACCUMULATE=self.accumulate, **_FINISH
        )


class _Step:
    """What both have in common."""

    def __init__(self, views: Sequence[View], dtype: torch.dtype | None) -> None:
        if (reason := why_not(views, dtype)) is not None:
            raise RuntimeError(f"there are no Triton rows: {reason}")
        weight = views[0][0]
        self.dtype = weight.dtype if dtype is None else dtype
        self.columns, self._device = weight.shape[-2], weight.device

    def takes(self, x: Tensor) -> bool:
        """Whether it can compute this: one token where the weights are, of their dtype, that no gradient is wanted of."""
        return (
            x.dtype is self.dtype
            and x.device == self._device
            and x.shape[-1] == self.columns == x.numel()
            and not (x.requires_grad and torch.is_grad_enabled())
        )


class GPURowsLinear(_Step):
    """Linear modules of one input by chosen rows.

    Parameters
    ----------
    matrices : sequence of tuple of Tensor and Tensor or None
        For which :func:`why_not` finds no reason: ``[in, out_i]`` and a bias ``[out_i]``.
    dtype, scales
        As for :class:`.rows.RowsLinear`.
    """

    def __init__(
        self, matrices: Sequence[View], dtype: torch.dtype | None = None, scales: Sequence[Tensor] | None = None
    ) -> None:
        super().__init__(matrices, dtype)
        factors = [None] * len(matrices) if scales is None else scales
        self._products = [
            (_Product(weight, self.dtype), scale, bias) for (weight, bias), scale in zip(matrices, factors, strict=True)
        ]
        self._outputs = [weight.shape[1] for weight, _ in matrices]

    def __call__(
        self, x: Tensor, threshold: Tensor, norms: Tensor | None = None, kept: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """As :class:`.rows.RowsLinear` for one input, with everything where the weights are."""
        x = x.reshape(-1)
        with torch.cuda.device_of(x):
            outputs = x.new_empty(sum(self._outputs)).split(self._outputs)
            for number, ((product, scale, bias), out) in enumerate(zip(self._products, outputs, strict=True)):
                product(x, threshold, norms, None if number else kept)
                product.finish(scale, bias, out)
        return outputs


class GPURowsFFN(_Step):
    """One FFN by chosen rows.

    Parameters
    ----------
    weights : FFNWeights
        One FFN (E = 1), for whose views :func:`why_not` finds no reason. Gate and up have the same strides.
    dtype
        As for :class:`.rows.RowsFFN`.
    """

    def __init__(self, weights: FFNWeights, dtype: torch.dtype | None = None) -> None:
        super().__init__(weights.views, dtype)
        count, self._gated = len(weights.up[0]), weights.gate is not None
        first, second = (weights.up[0][0], None) if weights.gate is None else (weights.gate[0][0], weights.up[0][0])
        if count != 1 or (second is not None and second.stride() != first.stride()):
            raise RuntimeError(
                "there are no Triton rows: they are for one FFN, whose gate and up have the same strides"
            )
        biases = [None if view is None or view[1] is None else view[1][0] for view in (weights.gate, weights.up)]
        self._gate_bias, self._up_bias = biases
        self._inward = _Product(first, self.dtype, second)
        self._outward = _Product(weights.down[0][0], self.dtype)
        *inward, self._down_scale = weights.scales_of(0)
        self._gate_scale, self._up_scale = [None] * (2 - len(inward)) + inward
        self._down_bias = None if weights.down[1] is None else weights.down[1][0]
        self._norms = None if weights.norms is None else weights.norms[0]
        self._activation = weights.activation
        with torch.inference_mode(False):
            self._h = first.new_empty(first.shape[1], dtype=self.dtype)

    def __call__(self, x: Tensor, threshold_x: Tensor, threshold_h: Tensor, kept: Tensor | None = None) -> Tensor:
        """As :class:`.rows.RowsFFN`, with everything where the weights are; ``kept`` is ``[2]``."""
        with torch.cuda.device_of(x):
            inward, out = self._inward, torch.empty_like(x, memory_format=torch.contiguous_format)
            inward(x.reshape(-1), threshold_x, None, kept)
            inward.kernels.hidden_kernel[(-(-inward.outputs // _FINISH["BLOCK"]),)](
                inward.partial,
                self._gate_scale,
                self._up_scale,
                self._gate_bias,
                self._up_bias,
                self._h,
                inward.splits,
                inward.outputs,
                GATED=self._gated,
                ACTIVATION=self._activation,
                ACCUMULATE=inward.accumulate,
                **_FINISH,
            )
            self._outward(self._h, threshold_h, self._norms, None if kept is None else kept[1:])
            self._outward.finish(self._down_scale, self._down_bias, out)
        return out
