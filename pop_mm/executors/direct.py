"""A dense FFN as one function on views of its first channels, by torch's kernels."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..kernels import View, traced
from ..tracking.phase import Forward
from ..weights.layout import FFN, Projection, linear


def down_input(ffn: FFN, rows: Tensor, width: int) -> Tensor:
    """The input of the down projection on an FFN's first ``width`` channels, ``[N, H]`` to ``[N, width]``."""
    parts = [linear(rows, *view) for p in ffn.inputs for view in p.narrow_views(width)]
    assert ffn.activation is not None
    h = ffn.activation.forward(parts[0])
    return h.mul_(parts[1]) if len(parts) == 2 else h


def static_linear(projection: Projection, width: int, x: Tensor, compiled: bool) -> Tensor:
    """A projection on its first ``width`` channels, traceable: ``[..., in]`` to ``[..., out]``."""
    rows = x.reshape(-1, x.shape[-1])
    views = projection.narrow_views(width)
    parts = [
        traced.matvec(rows, weight.t(), bias)
        if compiled and traced.fits(rows, weight.t())
        else linear(rows, weight, bias)
        for weight, bias in views
    ]
    out = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
    return out.view(*x.shape[:-1], out.shape[-1])


def direct_forward(
    ffn: FFN, width: int, zero_dropped: Callable[[Tensor, Forward], None] | None, down: View
) -> Callable[[Tensor, Forward | None], Tensor]:
    """An FFN as one function on views of its first ``width`` channels: ``act(gate) * up`` or ``act(up)``, then ``down``."""
    inputs = [view for p in ffn.inputs for view in p.narrow_views(width)]
    assert ffn.activation is not None
    activation = ffn.activation.forward

    def compute(x: Tensor, current: Forward | None) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        parts = [linear(rows, *view) for view in inputs]
        h = activation(parts[0])
        if len(parts) == 2:
            h = h * parts[1] if h.requires_grad else h.mul_(parts[1])
        if zero_dropped is not None:
            assert current is not None
            if h.requires_grad:
                h = h.clone()
            zero_dropped(h, current)
        return linear(h, *down).view(x.shape)

    return compute


@torch.no_grad()
def direct_forward_fits(ffn: FFN) -> bool:
    """Whether the holder's forward is just that, as far as one random token can tell."""
    holder, weight = ffn.holder, ffn.down.stored
    if holder is None or ffn.activation is None or "forward" in holder.__dict__:
        return False
    x = torch.randn(1, 1, ffn.hidden_size, generator=torch.Generator().manual_seed(0)).to(
        weight.matrix.device, weight.dtype
    )
    try:
        expected = holder(x)
        found = _by_modules(ffn, x)
    except Exception:  # a holder that wants more than x is left to its own forward
        return False
    if not isinstance(expected, Tensor) or expected.shape != found.shape:
        return False
    scale = float(expected.abs().max())
    return math.isfinite(scale) and torch.allclose(
        expected, found, rtol=0, atol=scale * 50 * torch.finfo(expected.dtype).eps
    )


def _by_modules(ffn: FFN, x: Tensor) -> Tensor:
    """The same by the forwards of its modules, however they store their weights."""
    parts = [part for p in ffn.inputs for part in type(p.module).forward(p.module, x).chunk(p.blocks, -1)]
    assert ffn.activation is not None
    h = ffn.activation.forward(parts[0])
    h = h * parts[1] if len(parts) == 2 else h
    found: Tensor = type(ffn.down.module).forward(ffn.down.module, h)
    return found


__all__ = ["direct_forward", "direct_forward_fits", "down_input", "static_linear"]
