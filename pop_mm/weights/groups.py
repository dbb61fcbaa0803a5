"""Modules outside the FFNs that share an input: what thresholds can leave entries out of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ..classes import same_class
from .shards import Shard

GroupKind = Literal["attention_in", "attention_out", "lm_head"]


@dataclass(frozen=True, eq=False)
class InputGroup:
    """Linear modules that are given one and the same tensor.

    Attributes
    ----------
    name : str
        Qualified, of the modules together: ``"model.layers.0.self_attn.{q_proj, k_proj, v_proj}"``.
    layer : int
        Index of the decoder layer.
    modules : tuple of nn.Module
        ``nn.Linear``, transformers' ``Conv1D``, or what stands in their place.
    kind : {"attention_in", "attention_out", "lm_head"}
        q, k and v, or o; or the lm_head, whose ``layer`` is the number behind the last one.
    role : {"attention", "lm_head"}
    source : nn.Module or None
        Of the lm_head: the module whose hidden states (``[B, q, H]``, of all positions) it is given, as a rule of the last ones.
    tied : nn.Module or None
        Of the lm_head: the embedding that has the same weight.
    shard : Shard or None
        Of a model that is spread over processes: which entries of the input this one has; None if all.
    """

    name: str
    layer: int
    modules: tuple[nn.Module, ...]
    kind: GroupKind
    role: Literal["attention", "lm_head"] = "attention"
    source: nn.Module | None = None
    tied: nn.Module | None = None
    experts: None = None
    shard: Shard | None = None

    @property
    def by_input(self) -> dict[str, tuple[nn.Module, ...]]:
        """The modules that are given "x"."""
        return {"x": self.modules}

    @property
    def weight_count(self) -> int:
        """Weights of all modules, without biases."""
        return sum(features[0] * features[1] for features in map(linear_features, self.modules) if features)

    @property
    def size(self) -> int:
        """Entries of the input."""
        features = linear_features(self.modules[0])
        assert features is not None
        return features[0]

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.modules[0].parameters()).device


def linear_features(module: nn.Module) -> tuple[int, int] | None:
    """Inputs and outputs of a linear module, also where its weight is packed; None if it is none."""
    inputs, outputs = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if isinstance(inputs, int) and isinstance(outputs, int):
        return inputs, outputs
    weight = getattr(module, "weight", None)
    if (
        same_class(type(module), "transformers.pytorch_utils:Conv1D")
        and isinstance(weight, Tensor)
        and weight.dim() == 2
    ):
        return int(weight.shape[0]), int(weight.shape[1])
    return None
