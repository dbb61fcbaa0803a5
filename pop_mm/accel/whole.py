"""Decoder layers all of whose projections are read by rows: in two calls for one token, before its cache and behind it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..ops.layer import attention_takes, norm_takes
from ..ops.rows import RowsFFN, RowsLinear
from ..ops.whole import NO_NORM, Norm, RowsLayer, norms_described
from .norms import Replaced

if TYPE_CHECKING:
    from ..executors.rows_ffn import RowsHolder
    from ..executors.rows_linears import RowsLinears
    from .layers import Parts


class WholeLayer:
    """What a layer's :class:`.layers.Parts` compute one by one, bit for bit. An FFN that is no call by rows gets its own.

    Parameters
    ----------
    parts : Parts
    inward, outward : RowsLinears
        Of q, k and v, and of o.
    holder : RowsHolder or None
        Of the FFN.
    norms : mapping
        Norms whose forwards the session has replaced, by the time that a step is computed.

    Attributes
    ----------
    parts : Parts
    """

    def __init__(
        self,
        parts: Parts,
        inward: RowsLinears,
        outward: RowsLinears,
        holder: RowsHolder | None,
        norms: Mapping[nn.Module, Replaced],
    ) -> None:
        self.parts, self._inward, self._outward, self._holder, self._norms = parts, inward, outward, holder, norms
        layer: Any = parts.layer
        of_heads = [parts.attn._modules.get(name) for name in ("q_norm", "k_norm")]
        self._modules = [layer.input_layernorm, *of_heads, layer.post_attention_layernorm]
        self._known: list[Norm] = []
        self._described = b""
        self._step: RowsLayer | None = None

    @classmethod
    def of(
        cls, parts: Parts, inward: RowsLinears, by_rows: Mapping[nn.Module, Any], norms: Mapping[nn.Module, Replaced]
    ) -> WholeLayer | None:
        """None where the attention's output is not read by rows."""
        layer: Any = parts.layer
        outward = by_rows.get(parts.attn.o_proj)
        if outward is None or len(outward.modules) != 1:
            return None
        return cls(parts, inward, outward, by_rows.get(layer.mlp), norms)

    def __call__(self, hidden: Tensor, cache: Any, cos: Tensor, sin: Tensor) -> Tensor | None:
        """The layer on one token, ``[1, 1, H]``; None, with nothing done, where its parts have to be called one by one."""
        parts, inward, outward = self.parts, self._inward, self._outward
        if (
            not isinstance(inward.kernel, RowsLinear)
            or not isinstance(outward.kernel, RowsLinear)
            or outward.kernel.library is not inward.kernel.library
            or not (inward.counts and outward.counts)
            or not inward.kernel.takes(hidden)
            or not self._norms_fit(hidden)
        ):
            return None
        layer: Any = parts.layer
        holder = self._holder
        if holder is not None and not (holder.nobody_looks() and vars(layer.mlp).get("forward") == holder.forward):
            holder = None
        ffn = None if holder is None else holder.kernel
        if not isinstance(ffn, RowsFFN) or ffn.library is not inward.kernel.library:
            ffn = None
        step = self._step
        if step is None or not step.is_of(inward.kernel, outward.kernel, ffn):
            step = self._step = self._made(inward.kernel, outward.kernel, ffn)
        inward.count()
        query, key, value = step.begin(self._described, hidden, cos, sin)
        if cache is not None:
            key, value = cache.update(key, value, parts.attn.layer_idx)
        if not attention_takes(query, key, value):
            return parts.behind(hidden + parts.attended(query, key, value))
        outward.count()
        if holder is not None and ffn is not None:
            holder.count()
        hidden = step.end(self._described, query, key, value, parts.attn.scaling, hidden)
        return hidden if ffn is not None else parts.behind(hidden)

    def _made(self, inward: RowsLinear, outward: RowsLinear, ffn: RowsFFN | None) -> RowsLayer:
        bounds, kept = [self._inward.bound, self._outward.bound], [self._inward.kept, self._outward.kept]
        if self._holder is not None and ffn is not None:
            mine = self._holder.mine
            bounds, kept = [*bounds, mine.x, mine.h], [*kept, mine.kept]
        return RowsLayer(inward, outward, ffn, bounds, kept, self.parts.head)

    def _norms_fit(self, hidden: Tensor) -> bool:
        """Whether the norms are the library's now; describes them if they are."""
        now = []
        for module in self._modules:
            if module is None:
                now.append(NO_NORM)
                continue
            norm = self._norms.get(module)
            if norm is None or vars(module).get("forward") is not norm.forward:
                return False
            now.append(Norm(module._parameters["weight"].data_ptr(), getattr(module, norm.eps), norm.kind))
        if now != self._known:
            head = hidden.new_empty(1, self.parts.head)
            for module, x in zip(self._modules, (hidden, head, head, hidden), strict=True):
                if module is not None and not norm_takes(x, module._parameters["weight"]):
                    return False
            self._known, self._described = now, norms_described(now)
        return True


__all__ = ["WholeLayer"]
