"""Architecture adapters: where each model family keeps its prunable projections.

Installed as ``pop_mm.adapters``. ``adapter_for(model)`` looks a model up; ``@register_adapter("my_type")`` or the entry
point group ``pop_mm.adapters`` adds one.
"""

from __future__ import annotations

from .base import Adapter, ExpertPaths, FFNPaths, RefusedAdapter
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
    "ExpertPaths",
    "FFNPaths",
    "InputPaths",
    "RefusedAdapter",
    "adapter_for",
    "register_adapter",
    "registered_adapters",
    "support_table",
    "unregister_adapter",
    *_dense,
    *_moe,
    *_vlm,
]
