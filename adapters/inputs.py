"""Which attention modules share an input, by the names that they usually have."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from pop_mm.weights.groups import GroupKind, InputGroup, linear_features


@dataclass(frozen=True)
class InputPaths:
    """Where a layer's modules of one kind are.

    What no path names stays dense, and is counted as dense: convolutions, the recurrence of Mamba and of linear attention,
    cross-attention to an image, the inner projections of multi-latent attention (``q_b_proj``, ``kv_b_proj``), whose inputs
    are a few latent numbers with a norm of their own.

    Attributes
    ----------
    kind : {"attention_in", "attention_out"}
    holders : tuple of str
        Paths from a decoder layer to the module that holds them; the first that is there counts.
    names : tuple of str
        Their names in it. All that are there share the input.
    """

    kind: GroupKind
    holders: tuple[str, ...]
    names: tuple[str, ...]

    def build(self, layer_name: str, layer: nn.Module, index: int) -> InputGroup | None:
        """The group of one layer, or None if the layer has none."""
        from .base import find, join

        for path in self.holders:
            holder = find(layer, path)
            found = {name: module for name in self.names if (module := find(holder, name)) is not None}
            features = [linear_features(module) for module in found.values()]
            if not found or None in features or len({f[0] for f in features if f}) > 1:
                continue
            names = next(iter(found)) if len(found) == 1 else f"{{{', '.join(found)}}}"
            return InputGroup(join(layer_name, path, names), index, tuple(found.values()), self.kind)
        return None


HOLDERS = ("self_attn", "attn.attention", "attn", "attention", "self_attention")
IN_NAMES = (
    *("q_proj", "k_proj", "v_proj"),
    *("qkv_proj", "query_key_value", "c_attn", "Wqkv"),  # fused
    *("q_a_proj", "kv_a_proj_with_mqa"),  # multi-latent attention
)
OUT_NAMES = ("o_proj", "out_proj", "dense", "c_proj", "wo")


ATTENTION = InputPaths("attention_in", HOLDERS, IN_NAMES), InputPaths("attention_out", HOLDERS, OUT_NAMES)
