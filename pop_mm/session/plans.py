"""What a session would do with a model, whatever the method."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..settings.config import PopConfig
from .session import plan_ffns
from .threshold_session import plan_thresholds


def plans_of(model: Any, config: PopConfig) -> Sequence[Any]:
    """What a session would do with every FFN, and of thresholds with every other input; changes nothing.

    Raises
    ------
    AdapterError, ConfigError
        As :func:`~pop_mm.session.session.plan_ffns` and :func:`~pop_mm.session.threshold_session.plan_thresholds`.
    """
    return plan_thresholds(model, config) if config.chosen_method == "thresholds" else plan_ffns(model, config)


__all__ = ["plans_of"]
