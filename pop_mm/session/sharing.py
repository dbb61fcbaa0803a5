"""Weights whose memory is not the model's own: what is written there, others see, or it cannot be written at all."""

from __future__ import annotations

import gc
import sys
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..formats import tensors_behind
from ..weights.experts import Experts
from ..weights.layout import FFN

_MAPS = Path("/proc/self/maps")  # Linux has it


def fixed_weights(model: nn.Module, records: Iterable[FFN | Experts]) -> dict[str, str]:
    """Why the channels of some FFNs cannot be moved although their weights are plain: name of an FFN -> the reason.

    A weight stands in memory that is shared with another process, that cannot be written to, or that belongs to a module of
    another model as well.
    """
    regions = _regions()
    reasons = {}
    suspects: dict[str, list[int]] = {}
    for record in records:
        found = (t for module in record.modules for p in module.parameters(False) for t in tensors_behind(p))
        weights = list(filter(_is_loaded, found))
        reason = next((why for p in weights if (why := _why_fixed(p, regions)) is not None), None)
        if reason is not None:
            reasons[record.name] = f"the weights of {record.name} are in {reason}"
        elif held := _held_by_others(weights):
            suspects[record.name] = [_address(p) for p in held]
    others = _other_users(model, suspects)
    if others:
        gc.collect()  # models that nobody uses any more may still be around
        others = _other_users(model, suspects)
    for name, addresses in suspects.items():
        user = next((others[address] for address in addresses if address in others), None)
        if user is not None:
            reasons[name] = f"{name} shares its weights with a {user} of another model"
    return reasons


def _is_loaded(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided and tensor.device.type != "meta"


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


# processes -----------------------------------------------------------------------------------------------------------


class _Region(NamedTuple):
    start: int
    end: int
    reason: str


def _regions() -> list[_Region]:
    """Memory of this process that is not its own or cannot be written, by address; empty where the system does not tell."""
    try:
        lines = _MAPS.read_text().splitlines()
    except OSError:
        return []
    regions = []
    for line in lines:
        span, flags, *rest = line.split(maxsplit=5)
        path = rest[3] if len(rest) > 3 else ""
        device = path.startswith("/dev/") and not path.startswith("/dev/shm/")  # pinned memory of a driver
        if "w" not in flags:
            reason = "memory that is mapped for reading alone"
        elif "s" in flags and not device:
            reason = "memory that is shared with a file or another process"
        else:
            continue
        start, end = (int(part, 16) for part in span.split("-"))
        regions.append(_Region(start, end, reason))
    return regions


def _why_fixed(tensor: Tensor, regions: list[_Region]) -> str | None:
    if tensor.device.type != "cpu" or not tensor.numel():
        return None
    if tensor.is_shared():
        return "memory that is shared with other processes"
    start = tensor.data_ptr()
    end = start + tensor.untyped_storage().nbytes() - tensor.storage_offset() * tensor.element_size()
    index = max(bisect_right(regions, start, key=lambda region: region.start) - 1, 0)
    while index < len(regions) and regions[index].start < end:
        if regions[index].end > start:
            return regions[index].reason
        index += 1
    return None


# models --------------------------------------------------------------------------------------------------------------


def _uses(tensor: Tensor) -> tuple[int, int]:
    """How many hold the object, and how many its memory."""
    count = getattr(torch._C, "_storage_Use_Count", None)  # not documented
    return sys.getrefcount(tensor), 0 if count is None else count(tensor.untyped_storage()._cdata)


def _held_by_others(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Those that something may hold besides the module that they belong to. Looking for it takes much longer."""
    lone = nn.Module()
    lone.weight = nn.Parameter(torch.zeros(1, device="cpu"))
    alone = min(_uses(p) for p in list(lone.parameters()))
    return [p for p in tensors if not alone[1] or any(a > b for a, b in zip(_uses(p), alone, strict=True))]


def _other_users(model: nn.Module, suspects: Mapping[str, list[int]]) -> dict[int, str]:
    """Address of a storage -> the class of a module outside the model that uses it."""
    addresses = {address for of_one in suspects.values() for address in of_one}
    own = set(model.modules())
    found: dict[int, str] = {}
    for module in _all_modules() if addresses else ():
        if module not in own:
            for parameter in list(module.__dict__.get("_parameters", {}).values()):
                for tensor in () if parameter is None else filter(_is_loaded, tensors_behind(parameter)):
                    if _address(tensor) in addresses:
                        found.setdefault(_address(tensor), type(module).__name__)
    return found


def _all_modules() -> Iterator[nn.Module]:
    """Every module that is alive. Types alone are looked at: an object may be a proxy that answers for another one."""
    kinds: set[type] = set()
    new: set[type] = {nn.Module}
    while new:
        kinds |= new
        below: list[type] = []
        for kind in new:
            below += kind.__subclasses__()
        new = set(below) - kinds
    return (thing for thing in gc.get_objects() if type(thing) in kinds)
