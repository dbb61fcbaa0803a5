"""Weights in one byte each: torchao's int8 weight-only quantisation of a model's decoder layers, once it is loaded."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from ..adapters import Adapter, adapter_for
from ..adapters.base import find
from ..errors import PopError

WEIGHTS = ("auto", "int8", "int8+head")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class QuantiseError(PopError, ValueError):
    """Weights that cannot be stored in the form that was asked for."""


def check_weights(weights: str) -> None:
    """Raise ``QuantiseError`` for a form that nobody knows, and for int8 where torchao is not installed."""
    if weights not in WEIGHTS:
        raise QuantiseError(f"weights must be one of {', '.join(WEIGHTS)}; got {weights!r}.")
    if weights != "auto":
        _torchao()


def quantise(model: Any, weights: str = "int8") -> Any:
    """Store the weights of a model's decoder layers as int8 with a scale for each output, in place, by torchao.

    Quantised are the ``nn.Linear`` of the decoder layers: attention (q, k, v, o, or what stands for them), FFNs, shared experts.
    All else stays as it is: embeddings, the lm_head, norms, routers and the gates of shared experts, routed experts (which
    transformers keeps in tensors of three axes), Conv1D (GPT-2), and everything of a vision-language model but the decoder layers
    of its language model.

    Parameters
    ----------
    model : PreTrainedModel
        In float32, bfloat16 or float16; on any device, the meta device too.
    weights : {"auto", "int8", "int8+head"}
        ``"auto"`` changes nothing; ``"int8+head"`` stores the lm_head so too. One that is tied to the embedding becomes a copy of
        its own, and the embedding stays.

    Returns
    -------
    PreTrainedModel
        The same model.

    Raises
    ------
    QuantiseError
        torchao is not installed; the model is quantised already; it has no such layer, or another dtype.
    AdapterError
        No adapter fits the model, so that its decoder layers are not known.
    """
    check_weights(weights)
    if weights == "auto":
        return model
    quantization = _torchao()
    linears = set(quantised_linears(model, adapter_for(model)))
    name = type(model).__name__
    if weights == "int8+head":
        head = getattr(model, "get_output_embeddings", lambda: None)()
        if type(head) is not nn.Linear:
            raise QuantiseError(
                f"{name} has no lm_head that is an nn.Linear; its decoder layers alone are weights='int8'."
            )
        linears.add(head)
    if not linears:
        raise QuantiseError(f"{name} has no nn.Linear in its decoder layers, so there is nothing to store as int8.")
    for module in linears:
        if type(module.weight) is not nn.Parameter:
            raise QuantiseError(f"{name} is quantised already: a weight is a {type(module.weight).__name__}.")
        if module.weight.dtype not in _DTYPES:
            raise QuantiseError(
                f"torchao quantises float32, bfloat16 and float16; a weight of {name} is {module.weight.dtype}. Load it with "
                "dtype='bfloat16', for example."
            )
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig(), filter_fn=lambda module, _: module in linears)
    return model


def quantised_copy(model: Any, weights: str) -> Any:
    """A quantised copy of a model, which stays as it is: to compare with; with ``"auto"`` the model itself."""
    check_weights(weights)
    return model if weights == "auto" else quantise(copy.deepcopy(model), weights)


def quantised_linears(model: nn.Module, adapter: Adapter) -> list[nn.Module]:
    """What :func:`quantise` quantises."""
    _, layers = adapter.layers(model)
    found: dict[nn.Module, None] = {}
    for layer in layers:
        kept = {part for path in adapter.not_weights if (gate := find(layer, path)) for part in gate.modules()}
        found |= dict.fromkeys(m for m in layer.modules() if type(m) is nn.Linear and m not in kept)
    return list(found)


def _torchao() -> Any:
    try:
        from torchao import quantization
    except ImportError as error:
        raise QuantiseError(
            f'int8 weights need torchao, which cannot be imported ({error}): pip install "pop_mm[int8]".'
        ) from error
    return quantization


__all__ = ["WEIGHTS", "QuantiseError", "check_weights", "quantise", "quantised_copy", "quantised_linears"]
