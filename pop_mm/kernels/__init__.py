"""Compiled kernels for a CPU: for decoding a few tokens, moving channels, and a prompt's statistics. Their absence costs
nothing but speed.

Stock kernels read weights at a third to a half of the memory's speed at batch 1, and pay a fixed price for every call, so
that narrow weights gain little. These are a few pages of C; :mod:`pop_mm.native` says where the library comes from.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from struct import pack

import torch
from torch import Tensor

from .. import native
from ..errors import ConfigError
from ..partition import Sizes
from .functions import DTYPES, INT, INTEGER, POINTER, function, functions, untraced

VECTORS = Path(__file__).with_name("vectors.h")
_FILES = tuple(Path(__file__).with_name(f"{name}.c") for name in ("matvec", "moves", "statistics"))
_HEADERS = (Path(__file__).with_name("elements.h"), VECTORS)
LeaveOut = Callable[[Tensor, Tensor | None], None]  # of a step's activations, where ``valid`` ones have a say
View = tuple[Tensor, Tensor | None]  # a weight as [in, out], and its bias
MOST_TOKENS = 32  # that the library decodes at once: with more, arithmetic takes over, and torch's kernels are better


class TakesFew:
    """What computes a few tokens of one dtype and size.

    Attributes
    ----------
    dtype : torch.dtype
    columns : int
        Of a token.
    """

    dtype: torch.dtype
    columns: int

    def takes(self, x: Tensor) -> bool:
        """Whether it can compute these, ``[..., columns]``: a few tokens, on the CPU and of its dtype."""
        few = 0 < x.numel() <= MOST_TOKENS * self.columns
        return x.dtype is self.dtype and x.is_cpu and x.shape[-1] == self.columns and few


class Rows(TakesFew):
    """Matrices for :class:`Matvec`, ``[n_i, m]`` each, as the kernel takes them.

    Attributes
    ----------
    blocks : bytes
        Address, rows and row stride of each.
    weights : tuple of Tensor
        Kept, so that the memory is.
    biases : list of tuple of int and Tensor
        Number of a matrix that has a bias, and the bias, ``[n_i]``.
    """

    def __init__(self, weights: Sequence[Tensor], biases: Sequence[Tensor | None] = ()) -> None:
        self.weights = tuple(weights)
        self.biases = [(number, bias) for number, bias in enumerate(biases) if bias is not None]
        self.dtype = weights[0].dtype
        self.columns = weights[0].shape[1]
        self.count = len(weights)
        self.total = sum(len(weight) for weight in weights)
        self.blocks = b"".join(pack("=qqq", weight.data_ptr(), len(weight), weight.stride(0)) for weight in weights)

    @staticmethod
    def fit(weights: Sequence[Tensor]) -> bool:
        """Whether the kernel can read these: on the CPU, float32 or bfloat16, with contiguous rows."""
        return len({weight.dtype for weight in weights}) == 1 and all(
            weight.device.type == "cpu" and weight.dtype in DTYPES and (weight.stride(1) == 1 or weight.shape[1] == 1)
            for weight in weights
        )


def rows_of(inputs: Sequence[View], down: View) -> tuple[Rows, Rows] | None:
    """The views of an FFN, gate and up first, for the kernel; None if it cannot read them all."""
    if not Rows.fit([weight.t() for weight, _ in (*inputs, down)]):
        return None
    wide, narrow = ([weight.t() for weight, _ in views] for views in (inputs, [down]))
    return Rows(wide, [bias for _, bias in inputs]), Rows(narrow, [down[1]])


def sources(dtype: torch.dtype) -> native.Sources:
    """What the library for a dtype of :data:`DTYPES` is made of."""
    return native.Sources(f"kernels_{str(dtype).removeprefix('torch.')}", _FILES, _HEADERS, (DTYPES[dtype],))


class Matvec:
    """``y = W x + b`` for several matrices in one call; sums in float32.

    Parameters
    ----------
    libraries : mapping of dtype to ctypes.CDLL

    Attributes
    ----------
    exchange : Exchange
    energy : Energy
        From the same libraries.
    ffn : dict of dtype to function
        For :class:`pop_mm.kernels.ffn.FFNStep`.
    """

    def __init__(self, libraries: Mapping[torch.dtype, ctypes.CDLL]) -> None:
        self.exchange, self.energy = Exchange(next(iter(libraries.values()))), Energy(libraries)
        matvec = (ctypes.c_char_p, INTEGER, POINTER, *[INTEGER] * 3, POINTER, POINTER, INT)
        self._functions = functions(libraries, "matvec", *matvec)
        self._choices = functions(libraries, "choose", ctypes.c_char_p, POINTER, INTEGER, POINTER, POINTER)
        self.ffn = functions(libraries, "ffn", ctypes.c_char_p, POINTER, INTEGER, *[POINTER] * 8, INT)

    @untraced
    def __call__(self, rows: Sequence[Rows], x: Tensor) -> Tensor:
        """All products, one behind the other.

        Parameters
        ----------
        rows : sequence of Rows
            All of one dtype and with the same number of rows in every matrix.
        x : Tensor
            ``[1, m]`` for all matrices, or ``[matrices, m]``, one for each; of the weights' dtype. For one matrix, any number
            of tokens ``[tokens, m]``.

        Returns
        -------
        Tensor
            ``[matrices, n]``; of one matrix ``[tokens, n]``.
        """
        count, total = sum(r.count for r in rows), sum(r.total for r in rows)
        x = x.contiguous()
        inputs, m = x.shape
        tokens = inputs if count == 1 else 1
        out = torch.empty(max(count, tokens), total // count, dtype=x.dtype, device="cpu")
        wide = x if x.dtype is torch.float32 else torch.empty(x.shape, dtype=torch.float32, device="cpu")
        self._functions[x.dtype](
            rows[0].blocks if len(rows) == 1 else b"".join([r.blocks for r in rows]),
            count,
            x.data_ptr(),
            m if inputs > tokens else 0,
            tokens,
            m,
            wide.data_ptr(),
            out.data_ptr(),
            torch.get_num_threads(),
        )
        first = 0
        for r in rows:
            for number, bias in r.biases:
                (out if count == 1 else out[first + number]).add_(bias)
            first += r.count
        return out

    def chooser(self, weight: Tensor, sizes: Sizes, slot: Callable[[], int], otherwise: LeaveOut) -> LeaveOut:
        """As :func:`pop_mm.ops.select.step_chooser`; what the library does not take goes to ``otherwise``.

        Parameters
        ----------
        weight : Tensor
            ``[|C|]``, float32 on the CPU, contiguous.
        slot : callable
            The address to put the indices at of what a step leaves out, ``[1, n]`` int64.
        """
        functions, counts = self._choices, (sizes.retained, sizes.candidates, sizes.candidates_dropped)
        choice, width = pack("=4q", weight.data_ptr(), *counts), sizes.width

        @untraced
        def leave_out(h: Tensor, valid: Tensor | None, _kept: Tensor = weight) -> None:  # as the memory is
            choose = functions.get(h.dtype)
            if choose is None or h.requires_grad or not h.is_contiguous():
                otherwise(h, valid)
                return
            valid = None if valid is None else valid.contiguous()
            choose(choice, h.data_ptr(), h.numel() // width, None if valid is None else valid.data_ptr(), slot())

        return leave_out


class Exchange:
    """Exchanges rows or columns of a matrix in place.

    Parameters
    ----------
    library : ctypes.CDLL
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        arguments = (POINTER, *[INTEGER] * 4, POINTER, POINTER, INTEGER, INT)
        self._function = function(library, "exchange", *arguments)

    @untraced
    def __call__(self, matrix: Tensor, axis: int, first: Tensor, second: Tensor) -> None:
        """Exchange row (axis 0) or column (axis 1) ``first[i]`` with ``second[i]``.

        Parameters
        ----------
        matrix : Tensor
            ``[n, m]`` on the CPU, of any strides and dtype.
        first, second : Tensor
            ``[k]``, int64 on the CPU, contiguous; within the matrix, disjoint and without repeats.
        """
        self._function(
            matrix.data_ptr(),
            matrix.element_size(),
            matrix.shape[1 - axis],
            matrix.stride(1 - axis),
            matrix.stride(axis),
            first.data_ptr(),
            second.data_ptr(),
            len(first),
            torch.get_num_threads(),
        )
        torch.autograd.graph.increment_version(matrix)  # what torch's own in-place functions tell a graph that holds it


class Energy:
    """Sums the squared activations of each channel, in float32.

    Parameters
    ----------
    libraries : mapping of dtype to ctypes.CDLL
    """

    def __init__(self, libraries: Mapping[torch.dtype, ctypes.CDLL]) -> None:
        self._functions = functions(libraries, "energy", POINTER, *[INTEGER] * 3, POINTER, POINTER, INT)

    def takes(self, h: Tensor) -> bool:
        """Whether it can read these: ``[T, D]`` on the CPU, float32 or bfloat16, with contiguous rows."""
        return h.is_cpu and h.dtype in self._functions and h.dim() == 2 and h.stride(1) == 1

    @untraced
    def __call__(self, h: Tensor, counted: Tensor | None) -> Tensor:
        """As :func:`pop_mm.methods.scoring.channel_energy`, ``[T, D]`` to ``[D]``."""
        sums = torch.zeros(h.shape[1], dtype=torch.float32, device="cpu")
        counted = None if counted is None else counted.contiguous()
        self._functions[h.dtype](
            h.data_ptr(),
            *h.shape,
            h.stride(0),
            None if counted is None else counted.data_ptr(),
            sums.data_ptr(),
            torch.get_num_threads(),
        )
        return sums


def load(wanted: str) -> Matvec | None:
    """The kernels that decode, or None for stock kernels.

    Parameters
    ----------
    wanted : {"auto", "stock", "compiled", "triton"}
        ``auto`` does without where no compiler is found; ``triton`` is for GPUs and has no use for it.

    Raises
    ------
    ConfigError
        ``compiled`` was asked for and cannot be had.
    """
    if wanted in ("stock", "triton"):
        return None
    if wanted == "compiled" and (reason := why_not()) is not None:
        raise ConfigError(
            f"kernels='compiled' needs a C compiler with OpenMP: {reason}. Install gcc, name a compiler in CC, or "
            "use kernels='auto'."
        )
    return library()


@untraced
def library() -> Matvec | None:
    """The compiled library, or None where it cannot be had: moves and statistics on a CPU use it, whatever decodes."""
    made = _library()
    return None if isinstance(made, str) else made


def why_not() -> str | None:
    """Why there is no compiled kernel, or None if there is."""
    made = _library()
    return made if isinstance(made, str) else None


@cache
def _library() -> Matvec | str:
    """The library, shipped or made on first use; or why there is none."""
    made = {dtype: native.load(sources(dtype)) for dtype in DTYPES}
    failed = next((why for why in made.values() if isinstance(why, str)), None)
    return failed or Matvec({dtype: found for dtype, found in made.items() if not isinstance(found, str)})
