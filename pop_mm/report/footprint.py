"""Bytes of weights that a decoded token reads: the one count, which report, inspect, bench and eval print.

Counted are the weight matrices of the decoder layers and the lm_head. Biases, norms, routers, embedding rows, the scorer's
weights and the KV cache are not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import nn

from ..adapters import Adapter
from ..formats import format_of, stored
from ..weights.groups import InputGroup
from ..weights.layout import linear_weight_count

# by role, as tables name them
FFN_PARTS = {"dense": "FFN", "expert": "routed experts", "shared_expert": "shared experts"}


class Plan(Protocol):
    """What a session does with a record: an FFN, the experts of a layer, or attention modules that share an input."""

    @property
    def ffn(self) -> Any:
        """The record."""

    def share_read(self, batch: int = 1) -> float:
        """Share of the record's weights that a decode step of ``batch`` rows reads on the plan's backend."""

    @property
    def share_intended(self) -> float:
        """Share of the record's weights that a step of one row would read on a backend that reads no more than it needs."""


class WeightBytes(Protocol):
    """Bytes that weights take, as a decoded token reads them from the dense model."""

    def of_record(self, record: Any) -> float:
        """Of an FFN, of those experts of a layer that a token uses, or of attention modules that share an input."""

    def of_attention(self, model: nn.Module, adapter: Adapter, count: int) -> float:
        """Of all attention; ``count`` weights."""

    def of_head(self, head: nn.Module, count: int) -> float:
        """Of the lm_head; ``count`` weights."""


@dataclass(frozen=True)
class Uniform:
    """All weights take the same number of bytes; with 1 byte, the weights themselves are counted."""

    itemsize: int

    def of_record(self, record: Any) -> float:
        """As its weights are many."""
        return float(self.itemsize * record.weight_count)

    def of_attention(self, model: nn.Module, adapter: Adapter, count: int) -> float:
        """As its weights are many."""
        return float(self.itemsize * count)

    def of_head(self, head: nn.Module, count: int) -> float:
        """As its weights are many."""
        return float(self.itemsize * count)


class AsStored:
    """Bytes as the model's linear modules store their weights, scales included; all else is of the model's dtype.

    Parameters
    ----------
    model : nn.Module
    """

    def __init__(self, model: nn.Module) -> None:
        self._uniform = Uniform(itemsize(model))

    def of_record(self, record: Any) -> float:
        """Of all its modules; routed experts are never packed."""
        return self._uniform.of_record(record) - sum(map(self._saved, record.modules))

    def of_attention(self, model: nn.Module, adapter: Adapter, count: int) -> float:
        """Of what the decoder layers hold besides FFNs."""
        others = adapter.besides_ffns(model, adapter.projections(model))
        head = getattr(model, "get_output_embeddings", lambda: None)()
        return self._uniform.of_attention(model, adapter, count) - sum(self._saved(m) for m in others if m is not head)

    def of_head(self, head: nn.Module, count: int) -> float:
        """Of the lm_head."""
        return self._uniform.of_head(head, count) - self._saved(head)

    def _saved(self, module: nn.Module) -> float:
        weight = module._parameters.get("weight")
        form = format_of(weight)
        if form is None or form.name == "plain" or (found := stored(weight)) is None:
            return 0.0
        return float(self._uniform.itemsize * found.matrix.numel() - found.nbytes)


@dataclass(frozen=True)
class Footprint:
    """Of one decoded token.

    Attributes
    ----------
    dense, read : mapping of str to int
        Part -> bytes: "attention", "lm_head", and as the model has them "FFN", "routed experts", "shared experts"; of the dense
        model, and of the pruned one.
    """

    dense: Mapping[str, int]
    read: Mapping[str, int]

    @property
    def dense_total(self) -> int:
        """Of all parts of the dense model."""
        return sum(self.dense.values())

    @property
    def total(self) -> int:
        """Of all parts of the pruned model."""
        return sum(self.read.values())


def footprint(
    model: nn.Module,
    adapter: Adapter,
    plans: Sequence[Plan],
    shares: Sequence[float] | None = None,
    weights: WeightBytes | None = None,
    batch: int = 1,
) -> Footprint:
    """Bytes that one decode step reads, by part. Weights are read once for all rows.

    Parameters
    ----------
    plans : sequence of Plan
        Of all FFNs and experts; of attention, those inputs that something is left out of.
    shares : sequence of float, optional
        Of each plan, the share of its weights that is read; by default what its backend reads.
    weights : WeightBytes, optional
        By default as the model stores them.
    batch : int
        Rows. Of E routed experts, ``min(batch * top_k, E)`` are read: how many different ones a batch needs is not known
        beforehand.
    """
    weights = AsStored(model) if weights is None else weights
    shares = [plan.share_read(batch) for plan in plans] if shares is None else shares
    counts = weights_per_token(model, adapter, plans)
    head = getattr(model, "get_output_embeddings", lambda: None)()
    dense: dict[str, float] = dict.fromkeys(counts, 0.0)
    dense["attention"] = weights.of_attention(model, adapter, counts["attention"])
    dense["lm_head"] = 0.0 if head is None else weights.of_head(head, counts["lm_head"])
    left_out = dict.fromkeys(counts, 0.0)
    for plan, share in zip(plans, shares, strict=True):
        record, part = plan.ffn, FFN_PARTS.get(plan.ffn.role, plan.ffn.role)
        size = weights.of_record(record)
        if record.experts is not None:
            size *= min(batch * record.used, record.experts) / record.used
        dense[part] += 0 if isinstance(record, InputGroup) else size  # attention is there already
        left_out[part] += size * (1 - share)
    return Footprint(
        {part: round(size) for part, size in dense.items()},
        {part: round(size - left_out[part]) for part, size in dense.items()},
    )


def bytes_per_token(
    model: nn.Module, adapter: Adapter, plans: Sequence[Plan], kept: Sequence[float] | None
) -> dict[str, int | None]:
    """Bytes of weights that a decoded token reads, as reports have them.

    Parameters
    ----------
    kept : sequence of float or None
        Of each plan, the share of its weights that the steps read; None before the first.

    Returns
    -------
    dict of str to int or None
        "dense"; "intended"; "read", on the backends of now; and "kept".
    """
    now, meant = (footprint(model, adapter, plans, s) for s in (None, [plan.share_intended for plan in plans]))
    read = None if kept is None else footprint(model, adapter, plans, kept).total
    return {"dense": now.dense_total, "intended": meant.total, "read": now.total, "kept": read}


def weights_per_token(model: nn.Module, adapter: Adapter, plans: Sequence[Plan]) -> dict[str, int]:
    """Weights that a decoded token reads from the dense model, by part. Of routed experts, those count that a token uses."""
    records = [plan.ffn for plan in plans if not isinstance(plan.ffn, InputGroup)]
    head = getattr(model, "get_output_embeddings", lambda: None)()
    parts = {name: sum(ffn.weight_count for ffn in records if ffn.role == role) for role, name in FFN_PARTS.items()}
    return {
        **{name: count for name, count in parts.items() if count},
        "attention": sum(layer.attention for layer in adapter.layer_weights(model, records).values()),
        "lm_head": linear_weight_count(head) if head is not None else 0,
    }


def itemsize(model: nn.Module) -> int:
    """Bytes of one weight of the model's dtype, which is that of its first parameter of floats."""
    return next((p.element_size() for p in model.parameters() if p.is_floating_point()), 4)


__all__ = [
    "FFN_PARTS",
    "AsStored",
    "Footprint",
    "Plan",
    "Uniform",
    "WeightBytes",
    "bytes_per_token",
    "footprint",
    "itemsize",
    "weights_per_token",
]
