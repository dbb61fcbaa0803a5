"""What the operations compute, in plain torch: right and slow. The kernels choose the same entries.

Which entries count
    An entry is kept if its magnitude is above the threshold. One that equals the threshold is left out; NaN is kept, so that it
    stays visible. Magnitudes are compared in float32: ``float32(|x_i|) > t``, and with norms ``float32(|h_j|) * norm_j > t``, the
    product rounded to float32.

Rounding
    ``x``, the outputs of gate and up (biases included), ``act(gate)`` and ``h`` are each rounded to the model's dtype before they
    are used or compared, as torch's modules return them; an output is rounded once, behind its bias. Sums are float32 (float64
    for float64), so kernels and reference may differ by the order of a sum, but not by a rule.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels import View
from ..kernels.activations import ACTIVATIONS

BINS = 4096  # 8 bits of exponent and the first 4 of the mantissa: steps of 1/16 to 1/32
BIN_SHIFT = 19  # the other bits of the mantissa


def kept(magnitude: Tensor, threshold: Tensor) -> Tensor:
    """Which entries are kept; the only place in torch that decides it.

    Parameters
    ----------
    magnitude : Tensor
        float32, not negative.
    threshold : Tensor
        float32, of a shape that broadcasts.

    Returns
    -------
    Tensor
        Boolean.
    """
    return ~(magnitude <= threshold)


def magnitudes(x: Tensor, norms: Tensor | None = None) -> Tensor:
    """What is compared with a threshold: ``|x|`` in float32, times ``norms`` (float32, broadcast) if there are any."""
    found = x.detach().float().abs()
    return found if norms is None else found * norms


def chosen_product(
    x: Tensor, chosen: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None = None
) -> Tensor:
    """``x @ weight * scale + bias`` for ``[in]`` and ``[in, out]``, of the chosen entries alone; summed wide, rounded once."""
    wide = torch.promote_types(x.dtype, torch.float32)
    out = x[chosen].to(wide) @ weight[chosen].to(wide)
    out = out if scale is None else out * scale
    return (out if bias is None else out + bias.to(wide)).to(x.dtype)


def rows(
    matrices: Sequence[View],
    x: Tensor,
    threshold: Tensor,
    norms: Tensor | None = None,
    scales: Sequence[Tensor] | None = None,
) -> tuple[list[Tensor], Tensor]:
    """Products of several matrices with the kept entries of one vector, or of one vector each.

    Parameters
    ----------
    matrices : sequence of tuple of Tensor and Tensor or None
        ``[in, out_i]`` and a bias ``[out_i]``.
    x : Tensor
        ``[1, in]`` for all, or ``[matrices, in]``.
    threshold : Tensor
        ``[1]`` or ``[matrices]``, float32.
    norms : Tensor, optional
        Like ``x``, float32: factors of the magnitudes.
    scales : sequence of Tensor, optional
        ``[out_i]``, float32: of weights that are int8, the factor of each output.

    Returns
    -------
    list of Tensor
        ``[out_i]`` each.
    Tensor
        ``[1]``, int64: entries of ``x`` that were kept.
    """
    chosen = kept(magnitudes(x, norms), threshold[:, None])
    factors = [None] * len(matrices) if scales is None else scales
    parts = zip(x.expand(len(matrices), -1), chosen.expand(len(matrices), -1), matrices, factors, strict=True)
    return [chosen_product(vector, mask, *view, factor) for vector, mask, view, factor in parts], chosen.sum().view(1)


@dataclass(frozen=True, eq=False)
class FFNWeights:
    """FFNs of one shape, ``act(gate) * up`` or ``act(up)``, then down: the experts of a layer, or one alone (E = 1).

    Attributes
    ----------
    gate : tuple of Tensor and Tensor, or None
        ``[E, H, D]``, and a bias ``[E, D]`` or None. None: ungated.
    up, down : tuple of Tensor and Tensor
        ``[E, H, D]`` and ``[E, D, H]``, with biases ``[E, D]`` and ``[E, H]`` or None.
    activation : str
        A key of :data:`pop_mm.kernels.activations.ACTIVATIONS`.
    norms : Tensor or None
        ``[E, D]``, float32: factors of the magnitudes of h, as a rule ``||W_down[:, j]||``.
    scales : sequence of Tensor or None
        In the order of :attr:`views`, ``[E, D]``, ``[E, D]`` and ``[E, H]``, float32: of int8 weights, the factor of each output.
    """

    gate: View | None
    up: View
    down: View
    activation: str = "silu"
    norms: Tensor | None = None
    scales: Sequence[Tensor] | None = None

    @staticmethod
    def alone(
        gate: View | None,
        up: View,
        down: View,
        activation: str,
        norms: Tensor | None = None,
        scales: Sequence[Tensor] | None = None,
    ) -> FFNWeights:
        """One FFN, of matrices, biases and scales without the leading axis."""

        def stacked(view: View) -> View:
            return view[0][None], None if view[1] is None else view[1][None]

        first = None if gate is None else stacked(gate)
        factors = None if scales is None else [scale[None] for scale in scales]
        return FFNWeights(
            first, stacked(up), stacked(down), activation, None if norms is None else norms[None], factors
        )

    @property
    def views(self) -> tuple[View, ...]:
        """All weights, down last."""
        return (self.up, self.down) if self.gate is None else (self.gate, self.up, self.down)

    def scales_of(self, expert: int) -> list[Tensor | None]:
        """Those of one of them, in the order of :attr:`views`."""
        return [None] * len(self.views) if self.scales is None else [scale[expert] for scale in self.scales]


def ffn(
    weights: FFNWeights, x: Tensor, threshold_x: Tensor, threshold_h: Tensor, expert: int = 0
) -> tuple[Tensor, Tensor]:
    """One FFN of one token, of the kept entries of ``x`` and ``h``.

    Parameters
    ----------
    x : Tensor
        ``[H]``.
    threshold_x : Tensor
        ``[1]``, float32: of ``|x|``.
    threshold_h : Tensor
        ``[E]``, float32: of ``|h|`` times its norms.
    expert : int
        Which of the FFNs.

    Returns
    -------
    Tensor
        ``[H]``.
    Tensor
        ``[2]``, int64: entries kept of ``x`` and of ``h``.
    """
    chosen_x = kept(magnitudes(x), threshold_x)
    *inward, outward = weights.scales_of(expert)
    parts = [
        chosen_product(x, chosen_x, weight[expert], None if bias is None else bias[expert], scale)
        for (weight, bias), scale in zip(weights.views[:-1], inward, strict=True)
    ]
    wide = torch.promote_types(x.dtype, torch.float32)
    active = ACTIVATIONS[weights.activation](parts[0].to(wide)).to(x.dtype)
    h = active * parts[1] if len(parts) == 2 else active
    norms = None if weights.norms is None else weights.norms[expert]
    chosen_h = kept(magnitudes(h, norms), threshold_h[expert])
    weight, bias = weights.down
    y = chosen_product(h, chosen_h, weight[expert], None if bias is None else bias[expert], outward)
    return y, torch.stack([chosen_x.sum(), chosen_h.sum()])


def experts(
    weights: FFNWeights, x: Tensor, ids: Tensor, router: Tensor, threshold_x: Tensor, threshold_h: Tensor
) -> tuple[Tensor, Tensor]:
    """The experts of one token, summed by the router's weights as transformers sums them; the rest as :func:`ffn`.

    Parameters
    ----------
    ids : Tensor
        ``[k]``, int64. An id outside ``0 .. E-1`` is an expert of another device, and adds nothing.
    router : Tensor
        ``[k]``, of the model's dtype or wider.

    Returns
    -------
    Tensor
        ``[H]``.
    Tensor
        ``[2]``, int64: entries kept of ``x`` (counted once), and of ``h`` of all these experts.
    """
    count = kept(magnitudes(x), threshold_x).sum()
    out, total = [], torch.stack([count, count * 0])
    for expert, weight in zip(ids.tolist(), router[:, None], strict=True):
        if 0 <= expert < len(weights.up[0]):
            y, found = ffn(weights, x, threshold_x, threshold_h, expert)
            out.append(y * weight)
            total[1] += found[1]
    if not out:
        return torch.zeros_like(x), total
    return torch.stack(out).sum(0).to(x.dtype), total


def histogram(x: Tensor, counts: Tensor, norms: Tensor | None = None, valid: Tensor | None = None) -> None:
    """Add the numbers of magnitudes in each bin to ``counts``.

    A bin holds the floats that agree in their first 12 bits behind the sign (:data:`BINS`): it begins at the float whose other
    bits are zero, as :func:`bin_edges` gives it. NaN counts in the last bin.

    Parameters
    ----------
    x : Tensor
        ``[T, n]``.
    counts : Tensor
        ``[BINS]``, int64.
    norms : Tensor, optional
        ``[n]``, float32: factors of the magnitudes.
    valid : Tensor, optional
        ``[T]``, boolean: tokens that count.
    """
    found = magnitudes(x if valid is None else x[valid], norms)
    bins = (found.contiguous().view(torch.int32) & 0x7FFFFFFF) >> BIN_SHIFT
    bins = torch.where(found.isnan(), BINS - 1, bins)
    counts += torch.bincount(bins.reshape(-1).long(), minlength=BINS)


def bin_edges(device: torch.device | None = None) -> Tensor:
    """Where each bin of :func:`histogram` begins, ``[BINS]``, float32; bins from that of infinity on hold no finite number."""
    return (torch.arange(BINS, dtype=torch.int32, device=device) << BIN_SHIFT).view(torch.float32)
