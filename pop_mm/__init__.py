"""pop_mm: Partition-guided Online Pruning (POP) for Hugging Face models.

``with pop_mm.prune(model, ratio=0.4) as session: model.generate(...)`` prunes every FFN while it decodes, from what the
prompt showed, and leaves the model exactly as it was. Names are imported on first use, so that ``import pop_mm`` is light.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import PopConfig
    from .errors import (
        AdapterError,
        ConfigError,
        NonFiniteError,
        PhaseError,
        PopError,
        SessionError,
    )
    from .scoring import Scorer, register_scorer
    from .session import Session, prune

_NAMES = {
    "PopConfig": "config",
    "AdapterError": "errors",
    "ConfigError": "errors",
    "NonFiniteError": "errors",
    "PhaseError": "errors",
    "PopError": "errors",
    "SessionError": "errors",
    "Scorer": "scoring",
    "register_scorer": "scoring",
    "Session": "session",
    "prune": "session",
    "register_adapter": "adapters",
}
__version__ = "0.1.0"
__all__ = [*_NAMES, "__version__"]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        return getattr(import_module(f".{_NAMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
