"""pop_mm: Hugging Face models answer faster on a CPU, since each token reads only the weights that it needs.

``with pop_mm.prune(model, budget=0.65) as session: model.generate(...)`` leaves out, token by token, what the prompt showed to
matter least, and leaves the model exactly as it was. Names are imported on first use: ``import pop_mm`` is light.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .adapters import register_adapter
    from .errors import AdapterError, ConfigError, NonFiniteError, PhaseError, PopError, SessionError
    from .methods import Pop, Thresholds
    from .methods.scoring import Scorer, register_scorer
    from .session.session import Session, prune
    from .settings.config import PopConfig
    from .settings.expert_policy import ExpertPolicy
    from .tuning import tune

__version__ = "0.2.0"
__all__ = [
    "AdapterError",
    "ConfigError",
    "ExpertPolicy",
    "NonFiniteError",
    "PhaseError",
    "Pop",
    "PopConfig",
    "PopError",
    "Scorer",
    "Session",
    "SessionError",
    "Thresholds",
    "prune",
    "register_adapter",
    "register_scorer",
    "tune",
]
_HOME = {
    "ExpertPolicy": "settings.expert_policy",
    "Pop": "methods",
    "PopConfig": "settings.config",
    "Scorer": "methods.scoring",
    "Session": "session.session",
    "Thresholds": "methods",
    "prune": "session.session",
    "register_adapter": "adapters",
    "register_scorer": "methods.scoring",
    "tune": "tuning",
}


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module(f".{_HOME.get(name, 'errors')}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
