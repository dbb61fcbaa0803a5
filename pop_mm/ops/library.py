"""The C sources of this folder as libraries, shipped or compiled on first use: :mod:`pop_mm.native`.

There is one for each dtype of a model, and one more for each that int8 weights can have, for models with such weights.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch

from .. import kernels, native
from ..kernels.functions import DOUBLE, DTYPES, INT, INTEGER, POINTER, function

OPTIONS = {**DTYPES, torch.float16: "-DFLOAT16", torch.float64: "-DFLOAT64"}
INT8 = (torch.float32, torch.bfloat16, torch.float16)  # dtypes of models whose weights may be int8
_NAMES = ("rows.c", "histogram.c", "transpose.c", "layer.c", "whole.c", "dot.c", "sample.c")
_FILES = tuple(map(Path(__file__).with_name, _NAMES))
_HEADERS = (
    *(Path(__file__).with_name(name) for name in ("scalar.h", "activate.h", "rows.h", "layer.h")),
    kernels.VECTORS,
)


def sources(dtype: torch.dtype, options: Sequence[str] = (), weights: torch.dtype | None = None) -> native.Sources:
    """What the library for a dtype of :data:`OPTIONS` is made of; with more options for the compiler.

    ``weights`` is the weights' dtype: int8, or None for that of the model.
    """
    own: tuple[str, ...]
    name, own = f"ops_{str(dtype).removeprefix('torch.')}", (OPTIONS[dtype],)
    if weights is torch.int8:
        name, own = f"{name}_int8", (*own, "-DINT8")
    return native.Sources(name, _FILES, _HEADERS, (*own, *options))


def every_source() -> list[native.Sources]:
    """Of all libraries."""
    return [*map(sources, OPTIONS), *(sources(dtype, weights=torch.int8) for dtype in INT8)]


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
        self.dot = function(found, "dot", ctypes.c_char_p, INTEGER, POINTER, INTEGER, POINTER, POINTER, INT)
        self.histogram = function(found, "histogram", POINTER, *[INTEGER] * 3, *[POINTER] * 3, INT)
        self.transpose = function(found, "transpose", *[POINTER, INTEGER, INTEGER] * 2, *[INTEGER] * 3, INT)
        self.sample = function(found, "sample", ctypes.c_char_p, INTEGER, POINTER, INT)
        self.want_large_pages = function(found, "want_large_pages", POINTER, INTEGER)
        self.page_out = function(found, "page_out", POINTER, INTEGER)
        self.attend = function(found, "attend", ctypes.c_char_p, *[POINTER] * 5, INT)
        self.rotate = function(found, "rotate", *[POINTER] * 3, INTEGER, INTEGER)
        self.rms_norm = function(found, "rms_norm", *[POINTER] * 3, INTEGER, INTEGER, DOUBLE, INT, INT)
        self.begin_layer = function(found, "begin_layer", *[ctypes.c_char_p] * 2, POINTER, INTEGER, *[POINTER] * 4, INT)
        self.end_layer = function(found, "end_layer", *[ctypes.c_char_p] * 3, *[POINTER] * 6, INT)
        self.rows_room, self.ffn_room = found.rows_room, found.ffn_room
        self.begin_room, self.end_room = found.begin_room, found.end_room
        for room in (self.rows_room, self.ffn_room):
            room.argtypes = [INTEGER] * 4
        self.begin_room.argtypes = [ctypes.c_char_p, INTEGER, INTEGER]
        self.end_room.argtypes = [ctypes.c_char_p, ctypes.c_char_p, INTEGER]
        for room in (self.rows_room, self.ffn_room, self.begin_room, self.end_room):
            room.restype = INTEGER


def library(dtype: torch.dtype, weights: torch.dtype | None = None) -> Library | None:
    """The compiled functions for a dtype of :data:`OPTIONS` (and of the weights), or None where they cannot be had."""
    made = _library(dtype, weights)
    return None if isinstance(made, str) else made


def why_not_dtypes(dtype: torch.dtype, weights: torch.dtype | None = None) -> str | None:
    """Why there are no compiled functions for a dtype, or None if there are."""
    made = _library(dtype, weights)
    return made if isinstance(made, str) else None


def make(dtype: torch.dtype, options: Sequence[str] = (), weights: torch.dtype | None = None) -> Library | str:
    """The library for a dtype, with more options for the compiler; or why there is none."""
    if dtype not in OPTIONS:
        return f"there is none for {dtype}"
    weights = None if weights is dtype else weights
    if weights is not None and (weights is not torch.int8 or dtype not in INT8):
        return f"there is none for {dtype} with weights of {weights}"
    found = native.load(sources(dtype, options, weights))
    return found if isinstance(found, str) else Library(found, dtype)


@cache
def _library(dtype: torch.dtype, weights: torch.dtype | None) -> Library | str:
    return make(dtype, weights=weights)
