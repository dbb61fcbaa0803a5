"""Architecture adapters: where each model family keeps its prunable projections.

Installed as ``pop_mm.adapters``. ``adapter_for(model)`` looks a model up; ``@register_adapter("my_type")`` or the entry
point group ``pop_mm.adapters`` adds one.
"""

from __future__ import annotations

from . import registry as _registry
from .base import Adapter, ExpertPaths, FFNPaths, RefusedAdapter
from .checking import Check, Group, check
from .dense import *  # noqa: F403
from .dense import __all__ as _dense
from .inputs import InputPaths
from .lookup import adapter_for, support_table
from .moe import *  # noqa: F403
from .moe import __all__ as _moe
from .registry import register_adapter, registered_adapters, unregister_adapter
from .vlm import *  # noqa: F403
from .vlm import __all__ as _vlm

__all__ = [
    "Adapter",
    "Check",
    "ExpertPaths",
    "FFNPaths",
    "Group",
    "InputPaths",
    "RefusedAdapter",
    "adapter_for",
    "check",
    "register_adapter",
    "registered_adapters",
    "support_table",
    "unregister_adapter",
    *_dense,
    *_moe,
    *_vlm,
]

_registry.SHIPPED.update(_registry._ADAPTERS)
