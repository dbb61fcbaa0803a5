"""Functions of the compiled library, as Python calls them."""

from __future__ import annotations

import ctypes
from typing import Any

import torch

DTYPES = {torch.float32: "float", torch.bfloat16: "bfloat16"}  # that most functions come in, and how C names them
POINTER, INTEGER, INT, DOUBLE = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_double

# torch.compile lets go of tensors of a traced frame once their addresses have been taken, before C has used them
untraced = torch.compiler.disable(recursive=False)


def function(library: ctypes.CDLL, name: str, *arguments: Any) -> Any:
    """A function without a result, with the types of its arguments."""
    found = getattr(library, name)
    found.argtypes, found.restype = arguments, None
    return found


def functions(library: ctypes.CDLL, name: str, *arguments: Any) -> dict[torch.dtype, Any]:
    """The same for each of :data:`DTYPES`."""
    return {dtype: function(library, f"{name}_{suffix}", *arguments) for dtype, suffix in DTYPES.items()}
