"""Decoder layers of the common kind, for one token: what is between their matrices, without a frame of Python for each part.

Common is: norm, attention with q, k, v and o projections and a rotation, norm, FFN or experts, each added to what it was given. A
layer is taken if it has these parts and, as far as random tokens can tell, computes from them what is computed here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..executors.base import hooks_of
from ..executors.static import StaticSteps
from ..formats.asking import asked
from ..kernels import Matvec
from ..ops.layer import attention, attention_takes, rotate
from ..patching import Patches
from ..tracking.caches import CACHE_NAMES, cache_in, cache_name
from ..tracking.phase import PhaseTracker
from .attention import is_stock_sdpa
from .few import FewTokens, Forward
from .norms import FewTokensNorms
from .whole import WholeLayer

_LAYER = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_NORMS = ("q_norm", "k_norm")  # of the heads, which some have
_KNOWN = {*CACHE_NAMES, "position_embeddings", "position_ids", "use_cache", "cache_position"}


@dataclass(frozen=True, eq=False)
class Parts:
    """The modules of a layer, and what its attention says of itself."""

    layer: nn.Module
    attn: Any
    head: int

    @classmethod
    def of(cls, layer: nn.Module) -> Parts | None:
        """None for a layer that has other parts."""
        found: Any = layer
        if set(layer._modules) != set(_LAYER):
            return None
        attn = found.self_attn
        if attn is None or not {*_ATTENTION} <= set(attn._modules) <= {*_ATTENTION, *_NORMS}:
            return None
        sizes = [getattr(attn, name, None) for name in ("head_dim", "layer_idx")]
        if any(type(size) is not int for size in sizes) or not isinstance(getattr(attn, "scaling", None), float):
            return None
        if {*attn._modules} & {*_NORMS} not in (set(), {*_NORMS}) or attn._parameters or layer._parameters:
            return None
        outputs = [getattr(getattr(attn, name), "out_features", 0) for name in _ATTENTION[:3]]
        if any(size % attn.head_dim for size in outputs) or outputs[1] != outputs[2] or not all(outputs):
            return None
        return cls(layer, attn, attn.head_dim)

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """Those that are not called as modules."""
        found: Any = self.layer
        return (found.input_layernorm, found.self_attn, found.post_attention_layernorm, *self.attn._modules.values())

    def kind(self) -> object:
        """What layers have in common that are probed together."""
        modules = [module for name, module in self.layer.named_modules() if not name.startswith("mlp.")]
        plain = (int, float, str, bool)
        return tuple(
            (type(m), *((k, v) for k, v in vars(m).items() if isinstance(v, plain) and k != "layer_idx"))
            for m in modules
        )

    def attend(self, x: Tensor, cache: Any, cos: Tensor, sin: Tensor, group: Any = None) -> Tensor:
        """What the attention makes of ``x``, ``[1, 1, H]``; ``group`` computes q, k and v in one call where it can."""
        attn, size = self.attn, self.head
        found = None if group is None else group.together(x)
        if found is None:
            found = [project.forward(x) for project in (attn.q_proj, attn.k_proj, attn.v_proj)]
        query, key, value = (part.view(1, 1, -1, size) for part in found)
        if "q_norm" in attn._modules:
            query, key = attn.q_norm.forward(query), attn.k_norm.forward(key)
        rotate(query, key, cos, sin)
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        if cache is not None:
            key, value = cache.update(key, value, attn.layer_idx)
        return self.attended(query, key, value)

    def attended(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """What the attention makes of a query, ``[1, heads, 1, d]``, and what the cache holds."""
        if attention_takes(query, key, value):
            out = attention(query, key, value, self.attn.scaling)
        else:
            out = nn.functional.scaled_dot_product_attention(
                query, key, value, scale=self.attn.scaling, enable_gqa=True
            ).transpose(1, 2)
        found: Tensor = self.attn.o_proj.forward(out.reshape(1, 1, -1))
        return found

    def run(self, hidden: Tensor, attend: Callable[[Tensor], Tensor]) -> Tensor:
        """The whole layer on one token, ``[1, 1, H]``; ``attend`` is what its attention does."""
        layer: Any = self.layer
        return self.behind(hidden + attend(layer.input_layernorm.forward(hidden)))

    def behind(self, hidden: Tensor) -> Tensor:
        """What the layer makes of it behind its attention."""
        layer: Any = self.layer
        out: Tensor = hidden + layer.mlp(layer.post_attention_layernorm.forward(hidden))
        return out


class FewTokensLayers(FewTokens):
    """Decoder layers in a step of one token.

    Parameters
    ----------
    tracker : PhaseTracker
    by_rows : mapping
        Module -> what leaves out its entries itself in a fast step, and hooks it for all others.
    norms : FewTokensNorms
        Of the same session.
    """

    def __init__(
        self,
        library: Matvec,
        few: Callable[[], bool],
        static: StaticSteps,
        tracker: PhaseTracker,
        by_rows: Mapping[nn.Module, Any],
        norms: FewTokensNorms,
    ) -> None:
        super().__init__(library, few, static)
        self._tracker, self._by_rows, self._norms = tracker, by_rows, norms
        self._probed: dict[object, bool] = {}

    def forward_of(self, module: nn.Module) -> Forward | None:
        """None for anything else."""
        parts = Parts.of(module)
        if parts is None:
            return None
        replaced = [part for part in parts.modules if "forward" in part.__dict__ and part not in self._by_rows]
        if replaced or not self._is_common(parts):
            return None
        own_forward, tracker, static, config = type(module).forward, self._tracker, self.static, parts.attn.config
        mine = [self._by_rows[part] for part in parts.modules if part in self._by_rows]
        hooks = hooks_of(parts.modules)
        group = self._by_rows.get(parts.attn.q_proj)
        if group is not None and list(group.modules) != [getattr(parts.attn, name) for name in _ATTENTION[:3]]:
            group = None
        whole = None if group is None else WholeLayer.of(parts, group, self._by_rows, self._norms.replaced)
        is_stock, of_attention = is_stock_sdpa(), vars(parts.attn)

        def forward(*args: Any, **kwargs: Any) -> Any:
            current = tracker.current
            if (
                current is not None
                and current.few
                and len(args) == 1
                and not static.active
                and (not mine or current.fast)
                and sum(map(len, hooks)) == len(mine)
                and config._attn_implementation == "sdpa"
                and is_stock()
                and not hasattr(of_attention.get("forward"), "__wrapped__")  # by somebody, who is to be called
            ):
                hidden, cache = args[0], cache_in(kwargs)
                angles: Any = kwargs.get("position_embeddings")
                if _is_plain(kwargs) and _takes(parts, hidden, angles):
                    cos, sin = angles
                    out = None if whole is None else whole(hidden, cache, cos, sin)
                    return parts.run(hidden, lambda x: parts.attend(x, cache, cos, sin, group)) if out is None else out
            return own_forward(module, *args, **kwargs)

        return forward

    def _is_common(self, parts: Parts) -> bool:
        kind = parts.kind()
        if kind not in self._probed:
            try:
                with asked(parts.layer):
                    self._probed[kind] = agrees(parts)
            except Exception:  # one that wants more, or returns something else, is left to its own forward
                self._probed[kind] = False
        return self._probed[kind]


def _is_plain(kwargs: dict[str, Any]) -> bool:
    """Whether nothing is asked for but the next token: no mask, no other outputs."""
    return all(value is None or value is False or name in _KNOWN for name, value in kwargs.items())


def _takes(parts: Parts, hidden: Tensor, angles: Any) -> bool:
    """One token without a gradient, and one angle for each entry of a head."""
    if not isinstance(angles, tuple) or len(angles) != 2:
        return False
    cos, sin = angles
    return (
        hidden.is_cpu
        and hidden.dim() == 3
        and hidden.shape[0] == hidden.shape[1] == 1
        and not hidden.requires_grad
        and cos.dtype is sin.dtype is hidden.dtype
        and cos.numel() == sin.numel() == cos.shape[-1] == parts.head
        and cos.is_contiguous()
        and sin.is_contiguous()
    )


@torch.no_grad()
def agrees(parts: Parts) -> bool:
    """Whether the layer computes what :meth:`Parts.run` does: its attention alone, then with stand-ins for attention and FFN."""
    from transformers import DynamicCache

    layer: Any = parts.layer
    attn, dtype = parts.attn, layer.input_layernorm.weight.dtype
    size = layer.input_layernorm.weight.numel()
    made = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=made).to(dtype)

    x = random(1, 1, size)
    query = attn.q_proj.forward(x)
    spread = 3 / float(query.float().std() * parts.head**0.5 * attn.scaling)  # of scores, so that rotations matter
    past = [(spread * random(1, attn.k_proj.out_features // parts.head, 3, parts.head)).to(dtype) for _ in range(2)]
    angles = (random(1, 1, parts.head), random(1, 1, parts.head))
    caches = [DynamicCache() for _ in range(2)]
    for cache in caches:
        cache.update(*(tensor.clone() for tensor in past), attn.layer_idx)
    inputs = {"position_embeddings": angles, "attention_mask": None, cache_name(type(attn).forward): caches[0]}
    expected = type(attn).forward(attn, hidden_states=x.clone(), position_ids=torch.tensor([[3]]), **inputs)[0]
    found = parts.attend(x.clone(), caches[1], *angles)
    stored = [cache.layers[attn.layer_idx] for cache in caches]
    if not (
        _near(found, expected) and _near(stored[1].keys, stored[0].keys) and _near(stored[1].values, stored[0].values)
    ):
        return False
    with _stand_ins(layer):
        expected = type(layer).forward(layer, x.clone(), position_ids=torch.tensor([[3]]), use_cache=True, **inputs)
        found = parts.run(x.clone(), lambda given: given * 0.5)
    return _near(found, expected)


@contextmanager
def _stand_ins(layer: Any) -> Any:
    """Attention and FFN that only scale what they are given."""
    with Patches() as patches:
        patches.replace(layer.self_attn, "forward", lambda *args, hidden_states, **_: (hidden_states * 0.5, None))
        patches.replace(layer.mlp, "forward", lambda given, *_: given * -2)
        yield


def _near(found: Any, expected: Any) -> bool:
    """Up to rounding, of sums that may be larger than what is left of them: a first layer's o projection cancels most."""
    if not isinstance(expected, Tensor) or found.shape != expected.shape or found.dtype != expected.dtype:
        return False
    eps = torch.finfo(expected.dtype).eps
    bound = max(8 * eps, min(2**-15, 2**12 * eps)) * float(expected.abs().max())
    return bool(torch.allclose(found.double(), expected.double(), rtol=0, atol=bound))


__all__ = ["FewTokensLayers", "Parts", "agrees"]
