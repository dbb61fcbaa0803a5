"""From a model to its adapter: registered model type, else structure, else an error that says what was found."""

from __future__ import annotations

from typing import Any

from torch import nn

from pop_mm.errors import AdapterError
from pop_mm.session.unwrap import unwrap

from .base import Adapter
from .registry import SHIPPED, registered_adapters, suggestion
from .structural import StructuralAdapter


def adapter_for(model: nn.Module) -> Adapter:
    """The adapter of a model, which may be in a wrapper (:func:`pop_mm.unwrap.unwrap`).

    ``config.model_type`` is looked up in the registry; a type that nobody registered is matched by structure (gate, up
    and down by name and shape, verified by a probe).

    Raises
    ------
    AdapterError
        Not a transformers decoder, a type known to be unprunable, or a structure that does not fit.
    """
    model = unwrap(model).model
    config = getattr(model, "config", None)
    model_type = getattr(config, "model_type", None)
    if not isinstance(model_type, str):
        raise AdapterError(
            f"pop_mm prunes transformers models, which have a config with a model_type; got {type(model).__name__}. "
            "Pass the transformers model that is in it, or an adapter of your own as adapter=."
        )
    if getattr(config, "is_encoder_decoder", False):
        raise AdapterError(f"{model_type} is an encoder-decoder model; pop_mm prunes decoder-only models.")
    registered = registered_adapters()
    if model_type in registered:
        return registered[model_type]()
    adapter = StructuralAdapter()
    try:
        adapter.projections(model)
    except AdapterError as error:
        raise AdapterError(
            f"No adapter is registered for the model type {model_type!r}, and its structure does not fit either: "
            f"{error}{_closest(model)} Register one with @pop_mm.register_adapter({model_type!r}); docs/adapters.md says "
            f"how.{suggestion(model_type)}"
        ) from None
    return adapter


def _closest(model: nn.Module) -> str:
    """A sentence about the adapter whose table finds most in a model of an unknown type, or nothing."""
    found: dict[type[Adapter], int] = {}
    for cls in dict.fromkeys(SHIPPED.values()):
        try:
            found[cls] = sum(record.weight_count for record in cls().projections(model))
        except Exception:  # a table that does not fit fails wherever it does not
            continue
    if not found:
        return ""
    cls = max(found, key=lambda cls: found[cls])
    return (
        f" Its modules are where {cls.__name__} looks for them: if it computes what those models do, pass "
        f"adapter=pop_mm.adapters.{cls.__name__}(), which is probed first."
    )


def support_table() -> list[dict[str, Any]]:
    """One row for each registered model type: ``model_type``, ``adapter``, ``kind``, ``layout``."""
    return [
        {"model_type": name, "adapter": cls.__name__, "kind": cls.kind, "layout": cls.layout()}
        for name, cls in registered_adapters().items()
    ]
