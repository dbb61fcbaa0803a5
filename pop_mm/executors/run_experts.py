"""Expert by expert: what routed experts compute, on all of their channels or on narrow views."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..kernels import Matvec
from ..weights.experts import Experts, ExpertViews
from ..weights.layout import linear


def chosen_product(x: Tensor, weight: Tensor, bias: Tensor | None, experts: Tensor) -> Tensor:
    """``x[i] @ weight[experts[i]] + bias[experts[i]]``, summed in float32, in a form that the compiler fuses.

    Parameters
    ----------
    x : Tensor
        ``[k, in]``, or ``[1, in]`` for all.
    weight, bias : Tensor
        ``[E, in, out]``, ``[E, out]``.
    experts : Tensor
        ``[k]``.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    out = (x.unsqueeze(2).to(wide) * weight[experts].to(wide)).sum(1).to(x.dtype)
    return out if bias is None else out + bias[experts]


def run_experts(
    record: Experts,
    hidden: Tensor,
    ids: Tensor,
    weights: Tensor,
    views: Callable[[int], ExpertViews],
    between: Callable[[Tensor | None, Tensor], Tensor],
    alone: bool = False,
    matvec: Matvec | None = None,
    product: Callable[[Tensor, Tensor, Tensor | None], Tensor] = linear,
) -> Tensor:
    """Expert by expert, as the classes' own forwards do it, on any width.

    Parameters
    ----------
    hidden, ids, weights : Tensor
        ``[T, H]``, ``[T, k]``, ``[T, k]``.
    views : callable
        The weights of an expert, all of one width K.
    between : callable
        Takes the slots' flat (token, choice) numbers (None if in that very order) and the inputs of the down
        projections, ``[N, K]``; returns what goes into them.
    alone : bool
        There is one token, and all its experts are on this device: nothing has to be sorted.
    matvec : Matvec, optional
        The compiled kernel, for one token alone.
    product : callable
        As :func:`~pop_mm.weights.layout.linear`.

    Returns
    -------
    Tensor
        ``[T, H]``.
    """
    module: Any = record.module
    if alone:
        order, experts, counts = None, ids[0].tolist(), [1] * ids.shape[1]
        inputs = [hidden] * len(experts)
    else:
        flat = ids.reshape(-1)
        every = torch.bincount(flat, minlength=record.count)[: record.count].tolist()  # another device's are beyond
        experts = [expert for expert, count in enumerate(every) if count]
        if not experts:
            return torch.zeros_like(hidden)
        counts = [every[expert] for expert in experts]
        order = torch.argsort(flat, stable=True)[: sum(counts)]
        tokens = order // ids.shape[1]
        inputs = [hidden[rows] for rows in tokens.split(counts)]
    used = [views(expert) for expert in experts]
    packed = [r for expert in used if (r := expert.rows) and r[0].takes(hidden)] if matvec is not None else []
    compiled = matvec if len(packed) == len(used) else None
    if compiled is not None:
        gate_up = compiled([inward for inward, _ in packed], hidden).view(len(used), -1)
    else:
        gate_up = torch.cat(
            [
                torch.cat([product(x, *view) for view in expert.inputs], -1)
                for x, expert in zip(inputs, used, strict=True)
            ]
        )
    h = between(order, module._apply_gate(gate_up) if module.has_gate else module.act_fn(gate_up))
    if compiled is not None:
        out = compiled([outward for _, outward in packed], h)
    else:
        out = torch.cat([product(part, *expert.down) for part, expert in zip(h.split(counts), used, strict=True)])
    if getattr(module, "has_post_expert_norm", False):
        out = module.post_expert_norm(out)
    if order is None:
        return (out * weights[0].unsqueeze(1)).sum(0, keepdim=True).to(hidden.dtype)
    out = out * weights.reshape(-1)[order].unsqueeze(1)
    return torch.zeros_like(hidden).index_add_(0, tokens, out.to(hidden.dtype))


__all__ = ["chosen_product", "run_experts"]
