"""Errors of pop_mm. Each message says what was asked, what was found and what to do."""

from __future__ import annotations


def one_line(error: BaseException) -> str:
    """What an error says, on one line and without its full stop."""
    return " ".join((str(error) or type(error).__name__).split()).rstrip(".")


class PopError(Exception):
    """Base class of every error that pop_mm raises on purpose."""


class PopWarning(UserWarning):
    """Something that goes on all the same, and that the user should know."""


class ConfigError(PopError, ValueError):
    """A setting is out of range, of the wrong type, or does not fit the model."""


class AdapterError(PopError):
    """No adapter fits the model, or an adapter found nothing that can be pruned."""


class PhaseError(PopError, RuntimeError):
    """A forward cannot be attributed to prefill or decode of a known prompt."""


class SessionError(PopError, RuntimeError):
    """A session is used in a way that it does not support (twice on a model, in training mode, concurrently)."""


class NonFiniteError(PopError, ArithmeticError):
    """The prompt's activations are NaN or infinite, so channels cannot be ranked."""


class SampleError(PopError):
    """A sample or model cannot be found, fetched or loaded."""


class EngineError(PopError, RuntimeError):
    """Another engine's model or settings have something that pop_mm did not take over, so that engine must not start."""
