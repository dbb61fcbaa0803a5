"""The choice among candidates at a decode step (paper, section 3.3): the only code that ranks them.

Every token scores its candidates; tokens of one group share a choice. The compiled library
(:meth:`pop_mm.kernels.Matvec.chooser`) and the Triton kernels choose alike.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Choose = Callable[[Tensor, Tensor | None, Tensor], None]  # what :func:`step_chooser` makes


def choose(
    values: Tensor,
    weight: Tensor,
    count: int,
    group: Tensor | None = None,
    groups: int = 0,
    valid: Tensor | None = None,
) -> Tensor:
    """Which candidates are left out: those of the lowest scores.

    Parameters
    ----------
    values : Tensor
        ``[N, |C|]``: activations of each token's candidates.
    weight : Tensor
        ``[|C|]`` or ``[N, |C|]``: the scorer's weight of each, not negative.
    count : int
        How many are left out.
    group : Tensor, optional
        ``[N]``, from 0 to ``groups - 1``: tokens that share a choice, by the norm of their activations. None: each has its own.
    groups : int
    valid : Tensor, optional
        ``[N]``, boolean: tokens that have a say in a choice that they share.

    Returns
    -------
    Tensor
        ``[N, count]``, or ``[groups, count]`` of the groups; int64 indices into the candidates.
    """
    if group is None:
        return lowest((values.detach() * weight).abs_(), count)
    return lowest(shared_scores(values, weight, group, groups, valid), count)


def shared_scores(values: Tensor, weight: Tensor, group: Tensor, groups: int, valid: Tensor | None) -> Tensor:
    """``[groups, |C|]``: the norm of each candidate's activations over the tokens of a group, times its weight."""
    squared = values.detach().to(weight.dtype).square()
    if valid is not None:
        squared = squared.masked_fill_(~valid.unsqueeze(1), 0)
    if groups == 1:
        sums = squared.sum(0, keepdim=True)
    else:
        sums = squared.new_zeros(groups, squared.shape[1]).index_add_(0, group, squared)
    if weight.dim() == 2:  # all tokens of a group have the same weights
        weight = weight.new_empty(groups, weight.shape[1]).index_copy_(0, group, weight)
    return sums.sqrt_().mul_(weight)


def lowest(scores: Tensor, count: int) -> Tensor:
    """Indices of the lowest scores, ``[..., count]`` int64. A score that is not finite ranks lowest of all.

    Parameters
    ----------
    scores : Tensor
        ``[..., |C|]``, not negative.
    """
    return torch.topk(torch.nan_to_num(scores, -1.0, -1.0), count, -1, False, False)[1]


def step_chooser(weight: Tensor, retained: int, count: int) -> Choose:
    """:func:`choose` for steps of one token of each sequence, which share their choice.

    For one sequence in as few operations as it can be done: each costs more than its few numbers.

    Parameters
    ----------
    weight : Tensor
        ``[|C|]``, float32 or float64: of each candidate, not negative.
    retained, count : int
        |R|, which stand in front of the candidates, and how many candidates are left out.

    Returns
    -------
    callable
        Takes activations of R and C, one token of each sequence ``[B, K]``, which it zeroes where a candidate is left out; which
        tokens have a say, ``[B]`` or None; and room for the indices of what is left out, ``[1, n]`` int64.
    """
    integer = {torch.float32: torch.int32, torch.float64: torch.int64}[weight.dtype]
    scores = torch.empty(1, len(weight), dtype=weight.dtype, device=weight.device)
    keys = torch.empty(1, len(weight), dtype=integer, device=weight.device)
    values = torch.empty(1, count, dtype=integer, device=weight.device)
    # twice the bits of a float rank as its magnitude does, without the sign; shifted so that infinity is the lowest integer
    bits = scores.view(integer)
    infinity = torch.full((1, 1), torch.inf, dtype=weight.dtype, device=weight.device)
    shift = torch.iinfo(integer).min - 2 * infinity.view(integer)

    def leave_out(h: Tensor, valid: Tensor | None, dropped: Tensor) -> None:
        candidates = h.narrow(1, retained, len(weight))
        if len(h) > 1:
            together = torch.zeros(len(h), dtype=torch.int64, device=h.device)
            dropped.copy_(choose(candidates.detach(), weight, count, together, 1, valid))
            candidates.scatter_(1, dropped.expand(len(h), -1), 0)
            return
        torch.mul(candidates.detach() if h.requires_grad else candidates, weight, out=scores)
        torch.add(shift, bits, alpha=2, out=keys)
        torch.topk(keys, count, -1, False, False, out=(values, dropped))
        candidates.scatter_(1, dropped, 0)

    return leave_out
