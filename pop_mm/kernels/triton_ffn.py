"""Triton kernels for one decode step of an FFN: what goes into the down projection, the choice among the candidates, and a
down projection that reads chosen columns. :mod:`pop_mm.kernels.gpu` calls them; nothing else needs Triton.

Shapes depend on the sizes of the partition alone, nothing is read back by the host, and no result depends on the order in
which programs run: a step can be captured in a CUDA graph and gives the same bits every time.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import torch
import triton
import triton.language as tl


def dtype_of(dtype: torch.dtype) -> tl.dtype:
    """Triton's name of a dtype."""
    return getattr(tl, str(dtype).removeprefix("torch."))


@triton.jit
def _activate(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == "silu":
        y = x * tl.sigmoid(x)
    elif ACTIVATION == "gelu":
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":  # (1 + tanh(u)) / 2 = sigmoid(2 u)
        y = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    else:
        y = tl.where(x < 0.0, 0.0, x)  # NaN stays
        if ACTIVATION == "relu2":
            y = y * y
    return y


@triton.jit
def _ranked(score):
    """A score that is not finite ranks below all others."""
    return tl.where(tl.abs(score) < float("inf"), score, -1.0)


@triton.jit
def hidden_kernel(
    x,  # [rows, hidden]
    gate,  # None: ungated
    up,
    gate_bias,
    up_bias,
    channels,  # [rows, width] int64, each row's own channels; None: the first ones, for all rows
    weight,  # [candidates], with channels [rows, candidates]: the scorer's; None: no candidates
    valid,  # [rows] uint8, rows that count in the scores; None: all
    h,  # out: [rows, width]
    scores,  # out: like weight
    rows,
    hidden,
    width,
    retained,
    x_stride,
    channel_stride,
    hidden_stride,
    ACCUMULATE: tl.constexpr,
    OPERANDS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
):
    """``h[b, j] = act(x_b . gate_j) * (x_b . up_j)``, and the scores of the candidates among them.

    ROWS is 1 (a program has one row of the batch) or 16 (it has all rows, and reads each weight once for them). OPERANDS is
    the dtype in which matrices are multiplied: that of the weights, but the interpreter cannot multiply in bfloat16.
    """
    row = tl.program_id(0)
    x += row * x_stride
    h += row * width
    j = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    b = tl.arange(0, ROWS)
    here = j < width
    if channels is None:
        channel = j.to(tl.int64)
    else:
        channel = tl.load(channels + row * width + j, mask=here, other=0)
    at = channel[:, None] * channel_stride

    if ROWS == 1:
        u = tl.zeros([BLOCK_CHANNELS, BLOCK_HIDDEN], ACCUMULATE)
    else:
        u = tl.zeros([BLOCK_CHANNELS, ROWS], ACCUMULATE)
    g = u
    for start in range(0, hidden, BLOCK_HIDDEN):
        i = start + tl.arange(0, BLOCK_HIDDEN)
        offset = at + i[None, :] * hidden_stride
        mask = here[:, None] & (i < hidden)[None, :]
        if ROWS == 1:
            xi = tl.load(x + i, mask=i < hidden, other=0.0).to(ACCUMULATE)[None, :]
            u += tl.load(up + offset, mask=mask, other=0.0).to(ACCUMULATE) * xi
            if gate is not None:
                g += tl.load(gate + offset, mask=mask, other=0.0).to(ACCUMULATE) * xi
        else:
            x_mask = (i < hidden)[:, None] & (b < rows)[None, :]
            xi = tl.load(x + i[:, None] + b[None, :] * x_stride, mask=x_mask, other=0.0).to(OPERANDS)
            rows_of_up = tl.load(up + offset, mask=mask, other=0.0).to(OPERANDS)
            u = tl.dot(rows_of_up, xi, u, input_precision="ieee", out_dtype=ACCUMULATE)
            if gate is not None:
                rows_of_gate = tl.load(gate + offset, mask=mask, other=0.0).to(OPERANDS)
                g = tl.dot(rows_of_gate, xi, g, input_precision="ieee", out_dtype=ACCUMULATE)
    if ROWS == 1:
        u = tl.sum(u, 1)[:, None]
        g = tl.sum(g, 1)[:, None]

    if up_bias is not None:
        u += tl.load(up_bias + channel, mask=here, other=0.0).to(ACCUMULATE)[:, None]
    if gate_bias is not None:
        g += tl.load(gate_bias + channel, mask=here, other=0.0).to(ACCUMULATE)[:, None]
    if gate is None:
        u = _activate(u, ACTIVATION)
    else:
        u = _activate(g, ACTIVATION) * u
    rounded = u.to(h.dtype.element_ty)
    tl.store(h + b[None, :] * width + j[:, None], rounded, mask=here[:, None] & (b < rows)[None, :])

    if weight is not None:
        u = rounded.to(ACCUMULATE)
        if ROWS == 1:
            norm = tl.sum(tl.abs(u), 1)
        else:
            counts = b < rows
            if valid is not None:
                counts = counts & (tl.load(valid + b, mask=counts, other=0) != 0)
            norm = tl.sqrt(tl.sum(tl.where(counts[None, :], u * u, 0.0), 1))
        candidate = row * (width - retained) + j - retained
        here = here & (j >= retained)
        tl.store(scores + candidate, norm * tl.load(weight + candidate, mask=here, other=0.0), mask=here)


@triton.jit
def select_kernel(
    h,  # [groups * ROWS, width], changed in place
    scores,  # [groups, candidates]
    dropped,  # out: [groups, count] int64
    width,
    retained,
    count,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Zero the ``count`` candidates with the lowest scores in all rows of a group; of equal scores the later one goes first.

    Each program ranks a block of the candidates against all of them, which needs neither a sort nor a second pass.
    """
    group = tl.program_id(0)
    candidates = width - retained
    scores += group * candidates
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mine = _ranked(tl.load(scores + i, mask=i < candidates, other=0.0))[:, None]
    rank = tl.zeros([BLOCK], tl.int32)
    for start in range(0, candidates, CHUNK):
        j = start + tl.arange(0, CHUNK)
        other = _ranked(tl.load(scores + j, mask=j < candidates, other=0.0))[None, :]
        below = (other < mine) | ((other == mine) & (j[None, :] > i[:, None]))
        rank += tl.sum((below & (j < candidates)[None, :]).to(tl.int32), 1)
    out = (i < candidates) & (rank < count)
    tl.store(dropped + group * count + rank, i.to(tl.int64), mask=out)
    for row in range(ROWS):
        place = h + (group * ROWS + row) * width + retained + i
        tl.store(place, tl.zeros([BLOCK], h.dtype.element_ty), mask=out)


@triton.jit
def down_kernel(
    h,  # [rows, width]
    channels,  # [rows, width] int64
    down,
    partial,  # out: [splits, rows, hidden]
    width,
    hidden,
    channel_stride,
    hidden_stride,
    split_width,
    ACCUMULATE: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
):
    """``partial[s, b] = sum_j h[b, j] * down[:, channels[b, j]]`` over the s-th part of the channels.

    A column whose activation is zero is not read.
    """
    row, split = tl.program_id(0), tl.program_id(2)
    i = tl.program_id(1) * BLOCK_HIDDEN + tl.arange(0, BLOCK_HIDDEN)
    total = tl.zeros([BLOCK_CHANNELS, BLOCK_HIDDEN], ACCUMULATE)
    for start in range(0, split_width, BLOCK_CHANNELS):
        j = split * split_width + start + tl.arange(0, BLOCK_CHANNELS)
        value = tl.load(h + row * width + j, mask=j < width, other=0.0)
        channel = tl.load(channels + row * width + j, mask=j < width, other=0)
        columns = tl.load(
            down + channel[:, None] * channel_stride + i[None, :] * hidden_stride,
            mask=(value != 0.0)[:, None] & (i < hidden)[None, :],
            other=0.0,
        )
        total += value.to(ACCUMULATE)[:, None] * columns.to(ACCUMULATE)
    tl.store(partial + (split * tl.num_programs(0) + row) * hidden + i, tl.sum(total, 0), mask=i < hidden)


@triton.jit
def sum_kernel(
    partial,  # [splits, rows, hidden]
    bias,  # [hidden] or None
    out,  # out: [rows, hidden]
    splits,
    hidden,
    BLOCK: tl.constexpr,
):
    """Sum the parts of :func:`down_kernel` in a fixed order and add the bias."""
    row = tl.program_id(0)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], partial.dtype.element_ty)
    for split in range(splits):
        total += tl.load(partial + (split * tl.num_programs(0) + row) * hidden + i, mask=i < hidden, other=0.0)
    if bias is not None:
        total += tl.load(bias + i, mask=i < hidden, other=0.0).to(partial.dtype.element_ty)
    tl.store(out + row * hidden + i, total.to(out.dtype.element_ty), mask=i < hidden)
