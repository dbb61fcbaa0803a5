"""The C sources of this folder as libraries, one for each dtype, shipped or compiled on first use: :mod:`pop_mm.native`."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch

from .. import kernels, native
from ..kernels.functions import INT, INTEGER, POINTER, function

OPTIONS = {
    torch.float32: "-DFLOAT32",
    torch.bfloat16: "-DBFLOAT16",
    torch.float16: "-DFLOAT16",
    torch.float64: "-DFLOAT64",
}
_FILES = tuple(Path(__file__).with_name(name) for name in ("rows.c", "histogram.c", "transpose.c"))
_HEADERS = (*(Path(__file__).with_name(name) for name in ("scalar.h", "activate.h")), *kernels.HEADERS)


def sources(dtype: torch.dtype, options: Sequence[str] = ()) -> native.Sources:
    """What the library for a dtype of :data:`OPTIONS` is made of; with more options for the compiler."""
    return native.Sources(f"ops_{str(dtype).removeprefix('torch.')}", _FILES, _HEADERS, (OPTIONS[dtype], *options))


class Library:
    """The functions of the sources for one dtype.

    Parameters
    ----------
    found : ctypes.CDLL
    dtype : torch.dtype
        For which it was compiled.
    """

    def __init__(self, found: ctypes.CDLL, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.rows = function(found, "rows", ctypes.c_char_p, INTEGER, INTEGER, POINTER, INTEGER, *[POINTER] * 5, INT)
        self.ffn = function(found, "ffn", ctypes.c_char_p, INTEGER, POINTER, POINTER, INT, *[POINTER] * 6, INT)
        self.histogram = function(found, "histogram", POINTER, *[INTEGER] * 3, *[POINTER] * 3, INT)
        self.transpose = function(found, "transpose", *[POINTER, INTEGER, INTEGER] * 2, *[INTEGER] * 3, INT)
        self.want_large_pages = function(found, "want_large_pages", POINTER, INTEGER)
        self.rows_room, self.ffn_room = found.rows_room, found.ffn_room
        for room in (self.rows_room, self.ffn_room):
            room.argtypes, room.restype = [INTEGER] * 4, INTEGER


def library(dtype: torch.dtype) -> Library | None:
    """The compiled functions for a dtype of :data:`OPTIONS`, or None where they cannot be had."""
    made = _library(dtype)
    return None if isinstance(made, str) else made


def why_not(dtype: torch.dtype) -> str | None:
    """Why there are no compiled functions for a dtype, or None if there are."""
    made = _library(dtype)
    return made if isinstance(made, str) else None


def make(dtype: torch.dtype, options: Sequence[str] = ()) -> Library | str:
    """The library for a dtype, with more options for the compiler; or why there is none."""
    if dtype not in OPTIONS:
        return f"there is none for {dtype}"
    found = native.load(sources(dtype, options))
    return found if isinstance(found, str) else Library(found, dtype)


_library = cache(make)
