"""Attention of a single token by the compiled kernel, through transformers' own interface for attention functions."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import FunctionType, MethodType
from typing import Any

from torch import Tensor, nn

from ..kernels.attention import Attention
from ..phase import set_instance_attribute
from .static import StaticSteps

_NOT_PLAIN = (
    "position_bias",
    "softcap",
    "cache",
)  # options of attention functions that ask for more than softmax(q K^T) V
_INTERFACE = "ALL_ATTENTION_FUNCTIONS"  # under which the modules of transformers know it


class SingleTokenAttention:
    """Attention modules that take "sdpa" from an interface of their own, where it is the compiled kernel for one token.

    Anything else, a mask among it, is left to transformers' function.

    Parameters
    ----------
    attention : Attention
    single : callable
        Whether the forward of the model that runs now is such a step.
    static : StaticSteps
    """

    def __init__(self, attention: Attention, single: Callable[[], bool], static: StaticSteps) -> None:
        self._attention = attention
        self._single = single
        self._static = static
        self._forwards: dict[type[nn.Module], FunctionType | None] = {}
        self._undo: list[Callable[[], object]] = []

    def attach(self, modules: Iterable[nn.Module]) -> None:
        """Replace the forwards, on the instance, of those modules that ask transformers' interface."""
        for module in modules:
            kind = type(module)
            if kind not in self._forwards:
                self._forwards[kind] = self._with_own_interface(kind.forward)
            forward = self._forwards[kind]
            if forward is not None and "forward" not in module.__dict__:
                self._undo.append(set_instance_attribute(module, "forward", MethodType(forward, module)))

    def detach(self) -> None:
        """Give the modules their own forwards back."""
        while self._undo:
            self._undo.pop()()

    def _with_own_interface(self, forward: Any) -> FunctionType | None:
        """The same code, where the interface's name stands for one in which "sdpa" is ours; None if it asks no interface."""
        if not isinstance(forward, FunctionType) or _INTERFACE not in forward.__code__.co_names:
            return None
        from transformers import AttentionInterface
        from transformers.integrations.sdpa_attention import sdpa_attention_forward
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        shared = forward.__globals__.get(_INTERFACE)
        if shared is not ALL_ATTENTION_FUNCTIONS or shared.get("sdpa") is not sdpa_attention_forward:
            return None
        own = AttentionInterface()
        own["sdpa"] = self._instead_of(sdpa_attention_forward)
        names = {**forward.__globals__, _INTERFACE: own}
        copy = FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
        copy.__kwdefaults__ = forward.__kwdefaults__
        return copy

    def _instead_of(self, stock: Callable[..., Any]) -> Callable[..., Any]:
        attention, single, static = self._attention, self._single, self._static

        def attend(
            module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
        ) -> tuple[Tensor, None]:
            plain = attention_mask is None and not any(options.get(name) is not None for name in _NOT_PLAIN)
            if not plain or static.active or not single() or not attention.takes(query, key, value):
                found: tuple[Tensor, None] = stock(module, query, key, value, attention_mask, **options)
                return found
            scale = options.get("scaling")
            return attention(query, key, value, query.shape[-1] ** -0.5 if scale is None else scale), None

        return attend
