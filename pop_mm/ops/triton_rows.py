"""Triton kernels that read chosen rows of input-major matrices; :mod:`pop_mm.ops.gpu_rows` calls them, nothing else needs Triton.

A program has some outputs and a part of the inputs. It looks at each of its inputs, and loads the rows of those that are kept:
what a mask leaves out is not read. Shapes do not depend on what is kept, nothing is read back by the host, and no sum depends on
the order in which programs run: a step can be captured in a CUDA graph and gives the same bits every time.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

from ..kernels.triton_ffn import _activate


@triton.jit
def products_kernel(
    x,  # [inputs]
    norms,  # [inputs] float32, factors of the magnitudes; None: none
    threshold,  # [1] float32
    first,  # [inputs, outputs], contiguous outputs
    second,  # another of the same shape and strides; None: there is none
    partial,  # out: [splits, 1 or 2, outputs]
    kept,  # [1] int64, the number of entries kept is added to it; None: not counted
    inputs,
    outputs,
    stride,
    split_width,
    ACCUMULATE: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
):
    """``partial[s, m] = sum_i x[i] * M_m[i]`` over the kept inputs of the s-th part."""
    split = tl.program_id(1)
    o = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    bound = tl.load(threshold)
    a = tl.zeros([BLOCK_IN, BLOCK_OUT], ACCUMULATE)
    b = a
    count = tl.zeros([BLOCK_IN], tl.int64)
    for start in range(0, split_width, BLOCK_IN):
        i = split * split_width + start + tl.arange(0, BLOCK_IN)
        value = tl.load(x + i, mask=i < inputs, other=0.0)
        magnitude = tl.abs(value.to(tl.float32))
        if norms is not None:
            magnitude *= tl.load(norms + i, mask=i < inputs, other=0.0)
        chosen = (i < inputs) & (tl.where(magnitude <= bound, 0, 1) != 0)  # NaN is kept
        count += chosen.to(tl.int64)
        at = i.to(tl.int64)[:, None] * stride + o[None, :]
        mask = chosen[:, None] & (o < outputs)[None, :]
        value = tl.where(chosen, value, 0.0).to(ACCUMULATE)[:, None]  # infinity times what was not read is none
        a += value * tl.load(first + at, mask=mask, other=0.0).to(ACCUMULATE)
        if second is not None:
            b += value * tl.load(second + at, mask=mask, other=0.0).to(ACCUMULATE)
    if second is None:
        tl.store(partial + split * outputs + o, tl.sum(a, 0), mask=o < outputs)
    else:
        tl.store(partial + 2 * split * outputs + o, tl.sum(a, 0), mask=o < outputs)
        tl.store(partial + (2 * split + 1) * outputs + o, tl.sum(b, 0), mask=o < outputs)
    if kept is not None and tl.program_id(0) == 0:
        tl.atomic_add(kept, tl.sum(count, 0))  # whole numbers: in any order the same


@triton.jit
def _total(partial, step, splits, scale, bias, o, outputs, ACCUMULATE: tl.constexpr, BLOCK: tl.constexpr):
    """The sum of all parts in a fixed order, times the outputs' scales, and a bias."""
    total = tl.zeros([BLOCK], ACCUMULATE)
    for split in range(splits):
        total += tl.load(partial + split * step + o, mask=o < outputs, other=0.0)
    if scale is not None:
        total *= tl.load(scale + o, mask=o < outputs, other=0.0)
    if bias is not None:
        total += tl.load(bias + o, mask=o < outputs, other=0.0).to(ACCUMULATE)
    return total


@triton.jit
def finish_kernel(
    partial,  # [splits, outputs]
    scale,  # [outputs] float32, of int8 weights; None: none
    bias,  # [outputs] or None
    out,  # out: [outputs]
    splits,
    outputs,
    ACCUMULATE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A linear module's output."""
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = _total(partial, outputs, splits, scale, bias, o, outputs, ACCUMULATE, BLOCK)
    tl.store(out + o, total.to(out.dtype.element_ty), mask=o < outputs)


@triton.jit
def hidden_kernel(
    partial,  # [splits, 2, size]: gate, up; ungated [splits, 1, size]
    gate_scale,  # [size] float32 or None
    up_scale,
    gate_bias,  # [size] or None
    up_bias,
    h,  # out: [size]
    splits,
    size,
    GATED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``act(gate) * up`` or ``act(up)``, every step rounded as modules round it."""
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    narrow = h.dtype.element_ty
    if GATED:
        g = _total(partial, 2 * size, splits, gate_scale, gate_bias, o, size, ACCUMULATE, BLOCK)
        g = g.to(narrow).to(ACCUMULATE)
        u = _total(partial + size, 2 * size, splits, up_scale, up_bias, o, size, ACCUMULATE, BLOCK)
        u = u.to(narrow).to(ACCUMULATE)
        u = _activate(g, ACTIVATION).to(narrow).to(ACCUMULATE) * u
    else:
        u = _total(partial, size, splits, up_scale, up_bias, o, size, ACCUMULATE, BLOCK).to(narrow).to(ACCUMULATE)
        u = _activate(u, ACTIVATION)
    tl.store(h + o, u.to(narrow), mask=o < size)
