"""Input-major storage of a weight in the same Parameter, and back exactly.

A module's weight ``[out, in]`` is stored with its inputs contiguous. Turned it is still ``[out, in]`` for everyone who computes
with it, but its outputs are contiguous: row i of ``weight.t()`` lies in one piece, so that it can be read or left out.

The numbers move to new memory, and what held on to the old one keeps right values (and the memory): a view that was made before
never shows anything else. Weights that share memory have to be refused before; :func:`why_not` sees what can be seen from one.
"""

from __future__ import annotations

import ctypes
import sys
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .library import Library, library

LARGE_PAGES = True  # on Linux, where it lets programs ask: rows that lie apart are read a tenth faster or more


def is_turned(weight: Tensor) -> bool:
    """Whether ``[..., out, in]`` is stored input-major: as a turned one, or by its checkpoint."""
    return weight.transpose(-1, -2).is_contiguous()


def why_not(parameter: Tensor) -> str | None:
    """Why a weight ``[out, in]`` or ``[E, out, in]`` cannot be turned, or None if it can."""
    if type(parameter) not in (Tensor, nn.Parameter):
        return f"it is a {type(parameter).__name__}"
    if parameter.device.type == "meta":
        return "it is not loaded"
    if parameter.dim() not in (2, 3):
        return f"its shape is {tuple(parameter.shape)}"
    if parameter.is_inference():
        return "it was made in inference mode"
    if is_turned(parameter):
        return None
    if not parameter.is_contiguous():
        return f"its strides are {parameter.stride()}"
    if parameter.untyped_storage().nbytes() != parameter.numel() * parameter.element_size():
        return "it is a part of a larger tensor"
    return None


@dataclass(frozen=True, eq=False)
class Turned:
    """A weight that has been turned.

    Attributes
    ----------
    parameter : Tensor
    """

    parameter: Tensor

    def back(self) -> None:
        """Store the weight as it was: the same values, strides and size of the storage. It may have been changed meanwhile."""
        _move(self.parameter, turned=False)


def turn(parameter: Tensor) -> Turned | None:
    """Store a weight input-major; a gradient of the same strides moves along.

    Parameters
    ----------
    parameter : Tensor
        ``[out, in]`` or ``[E, out, in]``, for which :func:`why_not` finds no reason: a parameter, or a tensor behind one. Nobody
        else may share its memory.

    Returns
    -------
    Turned or None
        None where it was stored so already, and nothing was done.

    Raises
    ------
    ValueError
        It cannot be turned; nothing was changed.
    """
    if (reason := why_not(parameter)) is not None:
        raise ValueError(f"A weight of shape {tuple(parameter.shape)} cannot be stored input-major: {reason}.")
    if is_turned(parameter):
        return None
    _move(parameter, turned=True)
    return Turned(parameter)


@torch.no_grad()
def _move(parameter: Tensor, turned: bool) -> None:
    """Give parameter and gradient memory of their own, in the one order or the other: both, or neither if one fails."""
    moved: list[Tensor] = [parameter]
    if (grad := parameter.grad) is not None and grad.layout is torch.strided and grad.stride() == parameter.stride():
        moved.append(grad)
    with torch.inference_mode(False):
        data = [_stored(tensor.detach(), turned) for tensor in moved]
    for tensor, own in zip(moved, data, strict=True):
        tensor.data = own


def _stored(tensor: Tensor, turned: bool) -> Tensor:
    """A copy of ``[..., out, in]`` with contiguous outputs if ``turned``, else with contiguous inputs."""
    source = tensor if turned else tensor.transpose(-1, -2)
    target = torch.empty_like(source.transpose(-1, -2), memory_format=torch.contiguous_format)
    found = _library(target.dtype) if turned and target.is_cpu else None
    if found is not None and LARGE_PAGES:
        found.want_large_pages(target.data_ptr(), target.nbytes)
    transpose(source, target)
    if found is not None and not source.untyped_storage().resizable():  # mapped from a file, which stays mapped
        found.page_out(source.data_ptr(), source.nbytes)
    return target.transpose(-1, -2) if turned else target


def transpose(source: Tensor, target: Tensor) -> None:
    """Write ``[..., n, m]`` to ``[..., m, n]``, both with contiguous rows; by the compiled library where there is one."""
    found = _library(source.dtype) if source.is_cpu and source.numel() else None
    if found is None or source.stride(-1) != 1 or target.stride(-1) != 1:
        target.copy_(source.transpose(-1, -2))
        return
    found.transpose(
        source.data_ptr(),
        source.stride(0) if source.dim() == 3 else 0,
        source.stride(-2),
        target.data_ptr(),
        target.stride(0) if target.dim() == 3 else 0,
        target.stride(-2),
        source.shape[0] if source.dim() == 3 else 1,
        *source.shape[-2:],
        torch.get_num_threads(),
    )


def hand_back() -> None:
    """Give the system the memory that glibc holds but nobody uses, as after many moves; elsewhere nothing happens."""
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)


def _library(dtype: torch.dtype) -> Library | None:
    """The library that moves weights of a dtype; int8 ones are the same in the library of any model's dtype."""
    return library(torch.float32, torch.int8) if dtype is torch.int8 else library(dtype)
