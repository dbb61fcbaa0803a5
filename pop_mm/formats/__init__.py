"""Forms in which linear modules store their weights, one file each. Executors ask these, and know no package's classes.

What none of them holds is opaque: the module is asked for its columns, and runs masked.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .base import Format, Stored
from .int8 import Int8
from .plain import Plain

FORMATS: tuple[Format, ...] = (Plain(), Int8())


def format_of(weight: Any) -> Format | None:
    """The form of a weight; None if it is opaque."""
    return next((form for form in FORMATS if form.holds(weight)), None)


def why_not(weight: Any) -> str | None:
    """Why the tensors behind a weight do not say what it is, as the end of "the weight ..."; None if they do."""
    form = format_of(weight)
    return f"is a {type(weight).__name__}" if form is None else form.why_not(weight)


def stored(weight: Any) -> Stored | None:
    """The tensors behind a weight; None where :func:`why_not` has a reason."""
    form = format_of(weight)
    return None if form is None or form.why_not(weight) is not None else form.stored(weight)


def tensors_behind(parameter: Any) -> tuple[Tensor, ...]:
    """The plain tensors whose memory a parameter is: itself, or those of a form that is known; none of what is opaque."""
    form = format_of(parameter)
    if form is None:
        return (parameter,) if type(parameter) is Tensor else ()
    if form.name == Plain.name:
        return (parameter,)
    return () if form.why_not(parameter) is not None else form.stored(parameter).tensors


__all__ = ["FORMATS", "Format", "Int8", "Plain", "Stored", "format_of", "stored", "tensors_behind", "why_not"]
