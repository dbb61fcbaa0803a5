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
    """One input's products with one of several matrices, or with two of the same shape and strides: parts that are to be summed.

    Parameters
    ----------
    first, second : Tensor
        ``[E, in, out]``.
    """

    def __init__(self, first: Tensor, dtype: torch.dtype, second: Tensor | None = None) -> None:
        from ..kernels.triton_ffn import dtype_of
        from . import triton_rows

        self.kernels = triton_rows
        self._first, self._second = first, second
        self.count, self._inputs, self.outputs = first.shape
        self.wide = torch.promote_types(dtype, torch.float32)
        self.accumulate = dtype_of(self.wide)
        self._blocks = -(-self.outputs // _PRODUCTS["BLOCK_OUT"])
        pieces = -(-self._inputs // _PRODUCTS["BLOCK_IN"])
        a_part = -(-pieces // min(pieces, max(1, _PROGRAMS // self._blocks)))
        self.splits, self._width = -(-pieces // a_part), a_part * _PRODUCTS["BLOCK_IN"]
        self._partial: dict[int, Tensor] = {}

    def partial(self, chosen: int = 1) -> Tensor:
        """The buffer of the parts of so many matrices; it can be written in and out of inference mode."""
        if chosen not in self._partial:
            shape = chosen, self.splits, 1 if self._second is None else 2, self.outputs
            with torch.inference_mode(False):
                self._partial[chosen] = self._first.new_empty(shape, dtype=self.wide)
        return self._partial[chosen]

    def __call__(
        self,
        x: Tensor,
        threshold: Tensor,
        norms: Tensor | None,
        kept: Tensor | None,
        experts: Tensor | None = None,
        own: bool = False,
    ) -> None:
        """Fill :meth:`partial`, for ``x`` of ``[in]``; with ``own`` an ``x`` and a threshold of each of the ``experts``."""
        chosen = 1 if experts is None else len(experts)
        self.kernels.products_kernel[self._blocks, self.splits, chosen](
            x,
            norms,
            threshold,
            self._first,
            self._second,
            self.partial(chosen),
            kept,
            experts,
            self.count,
            self._inputs,
            self.outputs,
            self._first.stride(1),
            self._first.stride(0),
            self._width,
            OWN=own,
            ACCUMULATE=self.accumulate,
            **_PRODUCTS,
        )

    def finish(
        self,
        scale: Tensor | None,
        bias: Tensor | None,
        out: Tensor,
        experts: Tensor | None = None,
        router: Tensor | None = None,
    ) -> None:
        """The output of the one matrix, or the sum of those of the ``experts``, times the router's weights."""
        chosen = 1 if experts is None else len(experts)
        self.kernels.finish_kernel[(-(-self.outputs // _FINISH["BLOCK"]),)](
            self.partial(chosen),
            scale,
            bias,
            router,
            out,
            experts,
            self.count,
            chosen,
            0 if bias is None else bias.stride(0),
            self.splits,
            self.outputs,
            ACCUMULATE=self.accumulate,
            **_FINISH,
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
            (_Product(weight[None], self.dtype), scale, None if bias is None else bias[None])
            for (weight, bias), scale in zip(matrices, factors, strict=True)
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
    """FFNs of one shape by chosen rows: one FFN, or the experts of a layer.

    Parameters
    ----------
    weights : FFNWeights
        For whose views :func:`why_not` finds no reason. Gate and up have the same strides. Norms and scales: contiguous.
    dtype
        As for :class:`.rows.RowsFFN`.
    """

    def __init__(self, weights: FFNWeights, dtype: torch.dtype | None = None) -> None:
        super().__init__(weights.views, dtype)
        self._gated = weights.gate is not None
        (first, bias), (second, up_bias) = weights.gate or weights.up, weights.up if weights.gate else (None, None)
        alike = second is None or second.stride() == first.stride()
        if not alike or (bias is not None and up_bias is not None and bias.stride() != up_bias.stride()):
            raise RuntimeError("there are no Triton rows: gate and up have other strides")
        self._bias_step = next((b.stride(0) for b in (bias, up_bias) if b is not None), 0)
        self._biases = (bias, up_bias) if self._gated else (None, bias)
        self._inward = _Product(first, self.dtype, second)
        self._outward = _Product(weights.down[0], self.dtype)
        scales: Sequence[Tensor | None] = weights.scales or [None] * len(weights.views)
        *inward, self._down_scale = scales
        self._scales = [*[None] * (2 - len(inward)), *inward]
        self._down_bias = weights.down[1]
        self._norms = weights.norms
        self._activation = weights.activation
        self._hidden: dict[int, Tensor] = {}

    def __call__(self, x: Tensor, threshold_x: Tensor, threshold_h: Tensor, kept: Tensor | None = None) -> Tensor:
        """As :class:`.rows.RowsFFN`, with everything where the weights are; ``kept`` is ``[2]``."""
        return self._run(x, None, None, threshold_x, threshold_h, kept)

    def experts(
        self,
        x: Tensor,
        ids: Tensor,
        router: Tensor,
        threshold_x: Tensor,
        threshold_h: Tensor,
        kept: Tensor | None = None,
    ) -> Tensor:
        """As :meth:`.rows.RowsFFN.experts`, with everything where the weights are."""
        router = router.detach()
        router = router if router.dtype is self.dtype else router.to(self._inward.wide)
        return self._run(x, ids.contiguous(), router.contiguous(), threshold_x, threshold_h, kept)

    def _run(
        self,
        x: Tensor,
        ids: Tensor | None,
        router: Tensor | None,
        threshold_x: Tensor,
        threshold_h: Tensor,
        kept: Tensor | None,
    ) -> Tensor:
        inward, chosen = self._inward, 1 if ids is None else len(ids)
        if chosen not in self._hidden:
            with torch.inference_mode(False):
                self._hidden[chosen] = x.new_empty(chosen, inward.outputs)
        h = self._hidden[chosen]
        with torch.cuda.device_of(x):
            out = torch.empty_like(x, memory_format=torch.contiguous_format)
            inward(x.reshape(-1), threshold_x, None, kept, ids)
            inward.kernels.hidden_kernel[-(-inward.outputs // _FINISH["BLOCK"]), chosen](
                inward.partial(chosen),
                *self._scales,
                *self._biases,
                h,
                ids,
                self._outward.count,
                self._bias_step,
                inward.splits,
                inward.outputs,
                GATED=self._gated,
                ACTIVATION=self._activation,
                ACCUMULATE=inward.accumulate,
                **_FINISH,
            )
            self._outward(h, threshold_h, self._norms, None if kept is None else kept[1:], ids, True)
            self._outward.finish(self._down_scale, self._down_bias, out, ids, router)
        return out
