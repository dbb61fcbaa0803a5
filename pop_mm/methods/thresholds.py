"""Thresholds from the prompt: the prefill sets one for each input, a decode step leaves out the entries below it.

A decode step multiplies vectors by matrices. An entry of the vector that is nearly zero makes one column of the matrix not
worth reading. For an FFN with input ``x`` and ``h = act(W_gate x) * (W_up x)``::

    prefill (dense)    t_x = the (1 - rho)   quantile of |x_i|                     over the prompt's tokens and i
                       t_h = the (1 - kappa) quantile of |h_j| * ||W_down[:, j]||  over the prompt's tokens and j
    decode step        x is zero where |x_i| <= t_x, h where |h_j| * ||W_down[:, j]|| <= t_h

The inputs of attention projections are treated as ``x``. Nothing is fixed for the prompt but the thresholds; over a long answer
they are corrected slowly (:mod:`pop_mm.decoding.correction`). A sequence's first token does not count: it is a sink of attention,
with activations that no later token has.

Sources. Leaving out inputs of small magnitude is TEAL's (Liu et al., arXiv 2408.14690), which calibrates its thresholds on
other text beforehand; CATS (2404.08763) and CHESS (2409.01366) are of its family. Weighing an entry by the norm of its
column is WINA's (2505.19427; of a whole matrix there, of the down projection alone here, where it was measured to help).
Ours: the thresholds come from the prompt's own prefill, so that nothing has to be calibrated, and the shares of x and h.

Magnitudes are counted in fixed bins: the upper 12 bits of a non-negative float32 (8 of the exponent, 4 of the mantissa).
Counts add up over chunks of a prompt, and need no sort; a quantile interpolates within its bin.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache, reduce

import torch
from torch import Tensor

from ..checks import check_budget
from ..modality import TEXT
from ..ops.histogram import BINS
from ..ops.histogram import histogram as count_bins
from ..ops.reference import BIN_SHIFT, kept, magnitudes
from .base import Method

MIN_PROMPT_TOKENS = 4  # fewer say too little: such a prompt decodes dense
PASS_ALL = -1.0  # a threshold that every magnitude passes
_GROUP = 64  # bins that a quantile is looked for in, of the sums of such groups first
_FIRST_NOT_FINITE = 255 << 4  # bins of infinity and NaN begin here


class Thresholds(Method):
    """Entries of each matrix's input above a threshold from the prompt.

    Parameters
    ----------
    head_budget : float, optional
        Share of the lm_head's weight bytes that a decoded token reads, in (0, 1], beyond the budget. None: all.

    Raises
    ------
    ConfigError
        Another value.
    """

    name = "thresholds"
    about = "entries of each matrix's input above a threshold from the prompt"
    session = "pop_mm.session.threshold_session:ThresholdSession"
    settings = ("head_budget",)
    head_budget: float | None = None

    def __init__(self, *, head_budget: float | None = None) -> None:
        self.head_budget = head_budget
        self.check()

    def check(self) -> None:
        """Raise :class:`ConfigError` for a head_budget out of range."""
        if self.head_budget is not None:
            check_budget("head_budget", self.head_budget)


def hidden_share(rho: float) -> float:
    """kappa, the share of h that is kept, where rho of x is: ``rho - 0.2``, the best split that was measured.

    Towards both ends it meets what it must: half of rho below 0.4, and 1 at 1.
    """
    return max(rho / 2, rho - 0.2, 2 * rho - 1)


def histogram(values: Tensor, tokens: Tensor, weight: Tensor | None = None) -> Tensor:
    """How many :func:`magnitudes` of each sequence fall into each bin; on a CPU by the compiled library, if there is one.

    Parameters
    ----------
    values : Tensor
        ``[N, n]``: one line for each token.
    tokens : Tensor
        ``[B, N]``, boolean: which of them count for each sequence.
    weight : Tensor, optional
        ``[n]`` or ``[N, n]``: of each entry.

    Returns
    -------
    Tensor
        ``[B, BINS]``, int64.
    """
    if weight is not None and weight.dim() == 2:
        values, weight = magnitudes(values, weight), None
    weight = None if weight is None else weight.to(torch.float32)
    counts = torch.zeros(tokens.shape[0], BINS, dtype=torch.int64, device=values.device)
    count_bins(values, counts, weight, tokens)
    return counts


def not_finite(counts: Tensor) -> Tensor:
    """Those of ``[..., BINS]`` that count infinities and NaN; a view."""
    return counts[..., _FIRST_NOT_FINITE:]


def quantile(counts: Tensor, share: float | Tensor) -> Tensor:
    """The threshold that a share of the counted magnitudes is above, evenly spread within its bin.

    Parameters
    ----------
    counts : Tensor
        ``[..., BINS]``, int64.
    share : float or Tensor
        In [0, 1]; a tensor is float64 and broadcasts to ``[...]``.

    Returns
    -------
    Tensor
        ``[...]``, float32.
    """
    edges = _edges(counts.device)
    groups = counts.unflatten(-1, (-1, _GROUP))
    sums = groups.sum(-1)
    up_to = sums.cumsum(-1)
    share = torch.as_tensor(share, dtype=torch.float64, device=counts.device)
    target = (1 - share).unsqueeze(-1) * up_to[..., -1:].double()
    group = _first_reaching(up_to, target)
    inside = groups.gather(-2, group.unsqueeze(-1).expand(*group.shape, _GROUP)).squeeze(-2)
    up_to = inside.cumsum(-1) + (up_to - sums).gather(-1, group)
    place = _first_reaching(up_to, target)
    inside, before = inside.gather(-1, place), (up_to - inside).gather(-1, place)
    part = (target - before.double()) / inside.double().clamp(min=1)
    place = group * _GROUP + place
    low, high = edges[place], edges[place + 1]
    return (low + part.clamp(0, 1) * (high - low)).squeeze(-1).float()


def _first_reaching(up_to: Tensor, target: Tensor) -> Tensor:
    """``[..., 1]``: where rising counts ``[..., n]`` first reach a target ``[..., 1]``; the last place if they do not."""
    return torch.searchsorted(up_to.double(), target).clamp_(max=up_to.shape[-1] - 1)


def share_above(counts: Tensor, threshold: Tensor) -> Tensor:
    """``[...]``, float64: share of the counted magnitudes above a threshold ``[...]``; the inverse of :func:`quantile`."""
    edges = _edges(counts.device)
    counts = counts.double()
    value = threshold.double().unsqueeze(-1)
    part = ((value - edges[:-1]) / (edges[1:] - edges[:-1])).clamp(0, 1)
    total = counts.sum(-1)
    return (1 - (counts * part).sum(-1) / total.clamp(min=1)).where(total > 0, torch.nan)


def deciding(counts: Mapping[int, Tensor], tokens: Mapping[int, Tensor]) -> dict[int, Tensor]:
    """The counts that set a sequence's threshold; those of other modalities are zero.

    Decoded tokens are text, so text sets it (measured best on a vision-language model); all modalities do where the prompt
    has too little text, and nothing does for a prompt of fewer than :data:`MIN_PROMPT_TOKENS` tokens.

    Parameters
    ----------
    counts : mapping of int to Tensor
        Modality -> ``[..., B, BINS]``.
    tokens : mapping of int to Tensor
        Modality -> ``[B]``, prompt tokens.

    Returns
    -------
    dict of int to Tensor
        Modality -> ``[..., B, BINS]``.
    """
    if not counts:
        return {}
    device = next(iter(counts.values())).device
    short = torch.stack([count.to(device) for count in tokens.values()]).sum(0) < MIN_PROMPT_TOKENS
    alone = torch.zeros_like(short)
    if TEXT in counts and len(counts) > 1:
        alone = tokens[TEXT].to(device) >= MIN_PROMPT_TOKENS
    hidden = {modality: short if modality == TEXT else short | alone for modality in counts}
    return {
        modality: own.masked_fill(hidden[modality].unsqueeze(-1), 0) if hidden[modality].any() else own
        for modality, own in counts.items()
    }


def threshold(counts: Mapping[int, Tensor], tokens: Mapping[int, Tensor], shares: Sequence[float]) -> Tensor:
    """Thresholds of several inputs, for each sequence, from its prompt.

    Parameters
    ----------
    counts : mapping of int to Tensor
        Modality -> ``[K, B, BINS]``; not empty.
    tokens : mapping of int to Tensor
        Modality -> ``[B]``, prompt tokens.
    shares : sequence of float
        K: of the entries that are kept of each input.

    Returns
    -------
    Tensor
        ``[K, B]``, float32; :data:`PASS_ALL` where nothing decides.
    """
    chosen = reduce(torch.add, deciding(counts, tokens).values())
    share = torch.tensor(shares, dtype=torch.float64, device=chosen.device).unsqueeze(-1)
    return quantile(chosen, share).masked_fill(chosen.sum(-1) == 0, PASS_ALL)


@cache
@torch.inference_mode(False)  # for use in and out of inference mode
def _edges(device: torch.device) -> Tensor:
    """``[BINS + 1]``, float64: where bins begin and end; what is not finite ends at the largest float32."""
    bits = torch.arange(BINS + 1, dtype=torch.int64).clamp_(max=_FIRST_NOT_FINITE) << BIN_SHIFT
    edges = bits.to(torch.int32).view(torch.float32)
    edges[_FIRST_NOT_FINITE:] = torch.finfo(torch.float32).max
    widths = torch.arange(BINS + 1).sub_(_FIRST_NOT_FINITE).clamp_(min=0)  # keeps the edges rising
    return (edges.double() * (1 + widths)).to(device)


__all__ = [
    "BINS",
    "MIN_PROMPT_TOKENS",
    "PASS_ALL",
    "Thresholds",
    "deciding",
    "hidden_share",
    "histogram",
    "kept",
    "magnitudes",
    "not_finite",
    "quantile",
    "share_above",
    "threshold",
]
