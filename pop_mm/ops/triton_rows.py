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
def _expert(experts, c, count):
    """The number of the c-th FFN, and whether there is one: an id past the last is an expert of another device."""
    e, known = c * 0, c >= 0
    if experts is not None:
        e = tl.load(experts + c)
        known = (e >= 0) & (e < count)
        e = tl.where(known, e, 0)
    return e, known


@triton.jit
def products_kernel(
    x,  # [inputs], or [chosen, inputs]
    norms,  # [count, inputs] float32, factors of the magnitudes; None: none
    threshold,  # [1] or [count] float32
    first,  # [count, inputs, outputs], contiguous outputs
    second,  # another of the same shape and strides; None: there is none
    partial,  # out: [chosen, splits, 1 or 2, outputs]
    kept,  # [1] int64, the number of entries kept is added to it; None: not counted
    experts,  # [chosen] int64, which of the matrices; None: the first
    count,
    inputs,
    outputs,
    stride,
    step,  # from one matrix to the next
    split_width,
    OWN: tl.constexpr,  # whether every chosen one has an x and a threshold of its own
    ACCUMULATE: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
):
    """``partial[c, s, m] = sum_i x[i] * M_m[e, i]`` over the kept inputs of the s-th part, e the c-th chosen matrix."""
    split, c = tl.program_id(1), tl.program_id(2)
    e, known = _expert(experts, c, count)
    first += e * step
    if second is not None:
        second += e * step
    if norms is not None:
        norms += e * inputs
    if OWN:
        x += c * inputs
        threshold += e
    o = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    bound, there = tl.load(threshold), tl.where(known, inputs, 0)
    a = tl.zeros([BLOCK_IN, BLOCK_OUT], ACCUMULATE)
    b = a
    passed = tl.zeros([BLOCK_IN], tl.int64)
    for start in range(0, split_width, BLOCK_IN):
        i = split * split_width + start + tl.arange(0, BLOCK_IN)
        value = tl.load(x + i, mask=i < inputs, other=0.0)
        magnitude = tl.abs(value.to(tl.float32))
        if norms is not None:
            magnitude *= tl.load(norms + i, mask=i < inputs, other=0.0)
        chosen = (i < inputs) & (tl.where(magnitude <= bound, 0, 1) != 0)  # NaN is kept
        passed += chosen.to(tl.int64)
        chosen = chosen & (i < there)
        at = i.to(tl.int64)[:, None] * stride + o[None, :]
        mask = chosen[:, None] & (o < outputs)[None, :]
        value = tl.where(chosen, value, 0.0).to(ACCUMULATE)[:, None]  # infinity times what was not read is none
        a += value * tl.load(first + at, mask=mask, other=0.0).to(ACCUMULATE)
        if second is not None:
            b += value * tl.load(second + at, mask=mask, other=0.0).to(ACCUMULATE)
    part = c * tl.num_programs(1) + split
    if second is None:
        tl.store(partial + part * outputs + o, tl.sum(a, 0), mask=o < outputs)
    else:
        tl.store(partial + 2 * part * outputs + o, tl.sum(a, 0), mask=o < outputs)
        tl.store(partial + (2 * part + 1) * outputs + o, tl.sum(b, 0), mask=o < outputs)
    if kept is not None and tl.program_id(0) == 0 and (known if OWN else c == 0):  # an x that all share counts once
        tl.atomic_add(kept, tl.sum(passed, 0))  # whole numbers: in any order the same


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
def _at(pointer, offset):
    """A pointer moved on; None if there is none."""
    return None if pointer is None else pointer + offset


@triton.jit
def finish_kernel(
    partial,  # [chosen, splits, outputs]
    scale,  # [count, outputs] float32, of int8 weights; None: none
    bias,  # [count, outputs] or None
    router,  # [chosen], factors of what is summed; None: one alone
    out,  # out: [outputs]
    experts,  # as for products_kernel
    count,
    chosen,
    bias_step,
    splits,
    outputs,
    ACCUMULATE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A linear module's output, or the sum of those of a token's experts, rounded as the router's dtype rounds."""
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    narrow = out.dtype.element_ty
    sum = tl.zeros([BLOCK], ACCUMULATE)
    for c in range(chosen):
        e, known = _expert(experts, c, count)
        own, factors = partial + c * splits * outputs, _at(scale, e * outputs)
        y = _total(own, outputs, splits, factors, _at(bias, e * bias_step), o, outputs, ACCUMULATE, BLOCK)
        y = y.to(narrow).to(ACCUMULATE)
        if router is not None:
            y = (y * tl.load(router + c).to(ACCUMULATE)).to(router.dtype.element_ty).to(ACCUMULATE)
        sum += tl.where(known, y, 0.0)
    tl.store(out + o, sum.to(narrow), mask=o < outputs)


@triton.jit
def hidden_kernel(
    partial,  # [chosen, splits, 2, size]: gate, up; ungated [chosen, splits, 1, size]
    gate_scale,  # [count, size] float32 or None
    up_scale,
    gate_bias,  # [count, size] or None
    up_bias,
    h,  # out: [chosen, size]
    experts,  # as for products_kernel
    count,
    bias_step,
    splits,
    size,
    GATED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``act(gate) * up`` or ``act(up)``, every step rounded as modules round it."""
    o, c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.program_id(1)
    e, _ = _expert(experts, c, count)
    gate_scale, up_scale = _at(gate_scale, e * size), _at(up_scale, e * size)
    gate_bias, up_bias = _at(gate_bias, e * bias_step), _at(up_bias, e * bias_step)
    narrow = h.dtype.element_ty
    if GATED:
        partial += 2 * c * splits * size
        g = _total(partial, 2 * size, splits, gate_scale, gate_bias, o, size, ACCUMULATE, BLOCK)
        g = g.to(narrow).to(ACCUMULATE)
        u = _total(partial + size, 2 * size, splits, up_scale, up_bias, o, size, ACCUMULATE, BLOCK)
        u = u.to(narrow).to(ACCUMULATE)
        u = _activate(g, ACTIVATION).to(narrow).to(ACCUMULATE) * u
    else:
        partial += c * splits * size
        u = _total(partial, size, splits, up_scale, up_bias, o, size, ACCUMULATE, BLOCK).to(narrow).to(ACCUMULATE)
        u = _activate(u, ACTIVATION)
    tl.store(h + c * size + o, u.to(narrow), mask=o < size)
