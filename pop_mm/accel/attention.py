"""Attention of a single token by the compiled kernel, through transformers' own interface for attention functions."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from types import FunctionType
from typing import Any

from torch import Tensor, nn

from ..ops.layer import attention, attention_takes
from .few import FewTokens, Forward

_NOT_PLAIN = ("position_bias", "softcap", "cache")  # options that ask for more than softmax(q K^T) V
_INTERFACE = "ALL_ATTENTION_FUNCTIONS"  # under which the modules of transformers know it


class SingleTokenAttention(FewTokens):
    """Attention modules that take "sdpa" from an interface of their own, where it is the compiled kernel.

    A step with a mask, and whatever else the kernel does not take, is left to transformers' function.
    """

    def forward_of(self, module: nn.Module) -> Forward | None:
        """None for modules that do not ask transformers' interface."""
        few, static, own_forward = self.few, self.static, type(module).forward
        with_kernel = with_own_interface(own_forward)
        if with_kernel is None:
            return None

        def forward(*args: Any, **kwargs: Any) -> Any:
            chosen = own_forward if static.active or not few() else with_kernel
            return chosen(module, *args, **kwargs)

        return forward


def with_own_interface(forward: Any) -> FunctionType | None:
    """The same code, where the interface's name stands for one in which "sdpa" is ours; None if it asks no interface.

    Of a forward that is wrapped (in transformers from 5.24 on, to take arguments by their old names) it is the code within.
    Its other names are those of now: what somebody puts into the module's namespace later is not seen.
    """
    forward = inspect.unwrap(forward)
    if not isinstance(forward, FunctionType) or _INTERFACE not in forward.__code__.co_names:
        return None
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    shared = forward.__globals__.get(_INTERFACE)
    if shared is not ALL_ATTENTION_FUNCTIONS or shared.get("sdpa") is not sdpa_attention_forward:
        return None
    own = AttentionInterface()
    own["sdpa"] = _instead_of(sdpa_attention_forward, shared)
    names = {**forward.__globals__, _INTERFACE: own}
    code = forward.__code__.replace()  # of its own: torch.compile keeps what belongs to the names by code object
    copy = FunctionType(code, names, forward.__name__, forward.__defaults__, forward.__closure__)
    copy.__kwdefaults__ = forward.__kwdefaults__
    return copy


def is_stock_sdpa() -> Callable[[], bool]:
    """What tells whether "sdpa" is transformers' own function: somebody may register another one at any time."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    return lambda: ALL_ATTENTION_FUNCTIONS.get("sdpa") is sdpa_attention_forward


def _instead_of(stock: Callable[..., Any], shared: Mapping[str, Any]) -> Callable[..., Any]:
    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
    ) -> tuple[Tensor, None]:
        now = shared["sdpa"]  # somebody may have registered another one
        plain = attention_mask is None and not any(options.get(name) is not None for name in _NOT_PLAIN)
        if now is not stock or not plain or options.get("dropout") or not attention_takes(query, key, value):
            found: tuple[Tensor, None] = now(module, query, key, value, attention_mask, **options)
            return found
        scale = options.get("scaling")
        return attention(query, key, value, query.shape[-1] ** -0.5 if scale is None else scale), None

    return attend
