"""Checks of settings that several classes have: what was asked, and what is allowed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeGuard

from .errors import ConfigError


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def is_whole(value: object) -> TypeGuard[int]:
    """Whether a value is an integer."""
    return isinstance(value, int) and not isinstance(value, bool)


def check_share(name: str, value: object, *, upper_open: bool = False) -> None:
    """Raise ``ConfigError`` unless a value lies in [0, 1], or [0, 1)."""
    interval = "[0, 1)" if upper_open else "[0, 1]"
    if not is_number(value):
        raise ConfigError(f"{name} must be a number in {interval}; got {value!r}.")
    if value < 0 or value > 1 or (upper_open and value == 1):
        raise ConfigError(f"{name} must lie in {interval}; got {value}.")


def check_budget(name: str, value: object) -> None:
    """Raise ``ConfigError`` unless a value lies in (0, 1]."""
    if not is_number(value) or not 0 < value <= 1:
        raise ConfigError(f"{name} must be a number in (0, 1]; got {value!r}.")


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Raise ``ConfigError`` unless a value is one of some words."""
    if value not in choices:
        raise ConfigError(f"{name} must be one of {', '.join(map(repr, choices))}; got {value!r}.")


__all__ = ["check_budget", "check_choice", "check_share", "is_number", "is_whole"]
