"""Functions of the compiled library, as Python calls them."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from typing import Any

import torch

DTYPES = {
    torch.float32: "-DFLOAT32",
    torch.bfloat16: "-DBFLOAT16",
}  # for which there is a library, and the option that makes it
POINTER, INTEGER, INT, DOUBLE = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_double

# torch.compile lets go of tensors of a traced frame once their addresses have been taken, before C has used them
untraced = torch.compiler.disable(recursive=False)


def function(library: ctypes.CDLL, name: str, *arguments: Any) -> Any:
    """A function without a result, with the types of its arguments."""
    found = getattr(library, name)
    found.argtypes, found.restype = arguments, None
    return found


def functions(libraries: Mapping[torch.dtype, ctypes.CDLL], name: str, *arguments: Any) -> dict[torch.dtype, Any]:
    """The same of each dtype's library."""
    return {dtype: function(library, name, *arguments) for dtype, library in libraries.items()}
