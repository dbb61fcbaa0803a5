"""What of a model a session relies on, and whether it is still so.

Before every forward: the modules at their places, their classes and the forwards of those, whether they are compiled, the
tensors in them, their memory and their version counters. Before a prompt also the settings and hooks of modules that are made
of others (adapters), and one line of each weight of an FFN, since writing to ``weight.data`` leaves no trace anywhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor, nn

from ..executors.moved import Versions
from ..formats import tensors_behind
from ..formats.asking import is_ours
from ..ops.sample import Sampled, sample
from ..weights.exchange import Matrix
from ..weights.experts import Experts
from ..weights.groups import InputGroup
from ..weights.layout import FFN
from .eager import is_compiled

_version = attrgetter("_version")
_forward = attrgetter("forward")
_data_ptr = torch.Tensor.data_ptr
_CALLS = ("_compiled_call_impl", "forward")  # what a call runs, where it is not the class's forward
_OF_EVERY_MODULE = set(vars(nn.Module()))
_SAMPLE = 4096  # numbers of an adapter's weight
_SIMPLE = (bool, int, float, str, type(None))


class Watch:
    """The FFNs of one model as they were when the watch began.

    Parameters
    ----------
    model : nn.Module
    records : iterable of FFN, Experts or InputGroup
        Those that are pruned.
    versions : Versions
        Gets the version counters of now; the session writes those that it causes there.
    positions : callable
        Where the original channels of an FFN stand in its weights now, ``[U, D]``; None if they are in their own places.
    besides : iterable of nn.Module
        Modules outside the FFNs whose forwards the session has replaced.

    Attributes
    ----------
    replaced : str or None
        The class of a module where somebody has replaced the session's own forward, once :meth:`change` has seen it.
    """

    def __init__(
        self,
        model: nn.Module,
        records: Iterable[Any],
        versions: Versions,
        positions: Callable[[Any], Tensor | None],
        besides: Iterable[nn.Module] = (),
    ) -> None:
        records = list(records)
        watched = dict.fromkeys(module for record in records for module in _modules(record))
        self._watched = [module for module in watched if _holds_tensors(module)]
        self._places = list(_places(model, watched))
        self._parents: list[Any] = [parent for parent, _, _ in self._places]
        self._children = [name for _, name, _ in self._places]
        self._modules = [child for *_, child in self._places]
        self._slots: list[tuple[str, dict[str, Any], str]] = [
            (f"{type(m).__name__}.{name}", tensors, name)
            for m in self._watched
            for tensors in (m._parameters, m._buffers)
            for name in tensors
        ]
        for where, tensors, name in list(self._slots):  # tensors that a weight is made of
            attributes = vars(weight) if (weight := tensors[name]) is not None else {}
            for inner in map(id, tensors_behind(weight) if attributes else ()):
                self._slots += [(f"{where}.{key}", attributes, key) for key, t in attributes.items() if id(t) == inner]
        self._dicts: list[Any] = [tensors for _, tensors, _ in self._slots]
        self._names = [name for *_, name in self._slots]
        self._composed = [m for record in records for m in record.modules if m._modules]
        self._ffns = [record for record in records if not isinstance(record, InputGroup)]
        self._versions = versions
        self._positions = positions
        self.replaced: str | None = None
        self._callers = list(dict.fromkeys([model, *(child for *_, child in self._places), *besides]))
        called = {r.holder if isinstance(r, FFN) else r.module for r in self._ffns}
        self._bypassed = {*watched} - called
        self._calls: list[Any] = [vars(module) for module in self._callers for _ in _CALLS]
        self._call_names = [name for _ in self._callers for name in _CALLS]
        self._called = list(map(dict.get, self._calls, self._call_names))
        self._classes = list(map(type, self._callers))
        self._kinds = list(dict.fromkeys(self._classes))
        self._forwards = list(map(_forward, self._kinds))
        self._note()

    def _note(self) -> None:
        self._tensors = list(map(dict.get, self._dicts, self._names))
        present = {id(t): t for t in self._tensors if t is not None}
        self._counted = [t for t in present.values() if not t.is_inference()]
        buffers = {id(t) for m in self._watched for t in m._buffers.values()}
        self._buffers = [t for t in self._counted if id(t) in buffers]
        self._addressed = [
            t for t in present.values() if type(t) in (Tensor, nn.Parameter) and t.layout is torch.strided
        ]
        self._addresses = list(map(_data_ptr, self._addressed))
        self._versions.of.clear()
        self._versions.of.update(zip(map(id, self._counted), map(_version, self._counted), strict=True))
        self._settings = self._settings_now()
        self._looked_at = {record: LookedAt(record) for record in self._ffns}
        self._sums = dict(zip(self._ffns, self._sums_now(self._ffns), strict=True))

    def moved(self, tensors: Iterable[Tensor]) -> None:
        """The session has given these tensors other memory."""
        places = {id(tensor): place for place, tensor in enumerate(self._addressed)}
        for tensor in tensors:
            if id(tensor) in places:
                self._addresses[places[id(tensor)]] = tensor.data_ptr()

    def forward_done(self) -> None:
        """After a forward, which may itself have changed buffers and settings (observers of a quantisation do)."""
        for buffer in self._buffers:
            self._versions.of[id(buffer)] = buffer._version
        if self._composed:
            self._settings = self._settings_now()

    def change(self) -> str | None:
        """The first thing that is not as it was, of those that cost next to nothing to look at; None if all is."""
        if not all(map(is_, map(dict.get, self._parents, self._children), self._modules)):
            for parent, name, child in self._places:
                if parent.get(name) is not child:
                    return f"the module {name!r}, a {type(child).__name__}, was replaced by a {type(parent.get(name)).__name__}"
        if not all(map(is_, map(dict.get, self._dicts, self._names), self._tensors)):
            where = next(
                where for (where, d, name), t in zip(self._slots, self._tensors, strict=True) if d.get(name) is not t
            )
            return f"{where} was replaced"
        other = all(map(is_, map(dict.get, self._calls, self._call_names), self._called)) or self._other_call()
        if isinstance(other, str):
            return other
        if list(map(type, self._callers)) != self._classes:
            pairs = zip(self._classes, self._callers, strict=True)
            before, now = next((old, type(module)) for old, module in pairs if type(module) is not old)
            return f"a {before.__name__} was made a {now.__name__}"
        if not all(map(is_, map(_forward, self._kinds), self._forwards)):
            return "the forward of a class was replaced"
        if list(map(_data_ptr, self._addressed)) != self._addresses:
            return "the data of a weight was replaced"
        if list(map(_version, self._counted)) != list(self._versions.of.values()):
            return "a weight was written to"
        return None

    def _other_call(self) -> str | None:
        """What is called instead of what was.

        What wraps it (``functools.wraps``) calls the same, if a session calls the module at all.
        """
        now = list(map(dict.get, self._calls, self._call_names))
        modules = [module for module in self._callers for _ in _CALLS]
        changed = [
            i
            for i, (called, module) in enumerate(zip(self._called, modules, strict=True))
            if now[i] is not called
            and not (_wraps(now[i], called, module) and (module not in self._bypassed or is_ours(now[i])))
        ]
        if not changed:
            return None
        modules = [modules[i] for i in changed]
        for i, module in zip(changed, modules, strict=True):
            kept = vars(module).get("_old_forward") is self._called[i]  # by accelerate's hooks, which Patches knows
            if is_ours(self._called[i]) and not is_compiled(module) and not kept:
                self.replaced = type(module).__name__
        return f"a {type(modules[0]).__name__} was {'compiled' if is_compiled(modules[0]) else 'given another forward'}"

    def settings_changed(self) -> bool:
        """Whether a module that is made of others has other settings, or other hooks (peft's for the adapter of each row)."""
        return self._settings_now() != self._settings

    def rewritten(self, records: Iterable[FFN | Experts] | None = None) -> list[FFN | Experts]:
        """Of these FFNs, or all: those whose weights, where they are the same tensors as before, hold other numbers."""
        places = zip(self._addressed, map(_data_ptr, self._addressed), self._addresses, strict=True)
        same = {id(tensor) for tensor, now, before in places if now == before}
        wanted = self._ffns if records is None else list(records)
        return [
            record
            for record, now in zip(wanted, self._sums_now(wanted), strict=True)
            if any(key in same and self._sums[record].get(key, total) != total for key, total in now.items())
        ]

    def _settings_now(self) -> list[Any]:
        modules = [module for composed in self._composed for module in composed.modules()]
        settings = [
            (key, plain)
            for module in modules
            for key, value in vars(module).items()
            if key not in _OF_EVERY_MODULE and (plain := _plain(value)) is not None
        ]
        return [*settings, *([*module._forward_pre_hooks, *module._forward_hooks] for module in modules)]

    @torch.no_grad()
    def _sums_now(self, records: Sequence[FFN | Experts]) -> list[dict[int, int]]:
        """By FFN, id of a weight -> a sum over numbers of it."""
        keys, matrices = list[tuple[int, int]](), list[Sampled]()
        for number, record in enumerate(records):
            for key, sampled in self._looked_at[record].sampled(self._positions(record)):
                keys.append((number, key))
                matrices.append(sampled)
        sums: list[dict[int, int]] = [{} for _ in records]
        for (number, key), total in zip(keys, sample(matrices), strict=True):
            sums[number][key] = sums[number].get(key, 0) * 31 + total
        return sums


def _wraps(forward: object, called: object, module: nn.Module) -> bool:
    """Whether a forward wraps (``functools.wraps``) what was called before it."""
    inner = getattr(forward, "__wrapped__", None)
    own = called is None and getattr(inner, "__func__", None) is type(module).forward
    return inner is not None and (inner is called or own)


def _modules(record: FFN | Experts | InputGroup) -> Iterator[nn.Module]:
    more = [m for m in (record.holder, record.activation) if m is not None] if isinstance(record, FFN) else []
    for module in record.modules:
        yield from module.modules()
    yield from more


def _places(model: nn.Module, watched: Iterable[nn.Module]) -> Iterator[tuple[dict[str, Any], str, nn.Module]]:
    """Where the watched modules, and those above them, stand: the children of the one above, a name there, and the module."""
    wanted, seen = set(watched), dict[nn.Module, bool]()
    found: list[tuple[dict[str, Any], str, nn.Module]] = []

    def holds(module: nn.Module) -> bool:
        if module not in seen:
            seen[module] = False
            below = [(name, child) for name, child in module._modules.items() if child is not None and holds(child)]
            found.extend((module._modules, name, child) for name, child in below)
            seen[module] = module in wanted or bool(below)
        return seen[module]

    holds(model)
    yield from found


def _holds_tensors(module: nn.Module) -> bool:
    """Whether its tensors stay where they are, in dicts of torch's; compressed-tensors puts caches of its own in their place."""
    plain = type(module._parameters) is dict and type(module._buffers) is dict
    return plain and not _is_offloaded(module)


def _is_offloaded(module: nn.Module) -> bool:
    """Whether its tensors come and go with every forward."""
    return any(getattr(hook, "offload", False) for hook in _hooks(module))


def _hooks(module: nn.Module) -> Iterator[Any]:
    hook = getattr(module, "_hf_hook", None)
    yield from getattr(hook, "hooks", [] if hook is None else [hook])


class LookedAt:
    """The weights of an FFN that can be read, and what of each is looked at."""

    def __init__(self, record: FFN | Experts) -> None:
        self._channels = list(_channel_weights(record))
        own = {id(tensor) for module in record.modules for tensor in module._parameters.values()}  # biases of down
        parts = dict.fromkeys(part for module in record.modules for part in module.modules())
        held = {id(t): t for part in parts for t in part._parameters.values() if t is not None}
        for weight, _ in self._channels:
            held.pop(id(weight), None)
        others = filter(_is_readable, held.values())
        self._others = [(t, 1 if id(t) in own else max(1, t.numel() // _SAMPLE)) for t in others]

    def sampled(self, positions: Tensor | None) -> Iterator[tuple[int, Sampled]]:
        """Of each weight a number of every channel, and in turn of every input or output of the FFN.

        Of what holds nothing of the channels some numbers.
        """
        for weight, matrices in self._channels:
            for matrix, axis in () if weight.is_meta else matrices(weight.detach(), None):
                rows = matrix if axis == 0 else matrix.transpose(-1, -2)
                yield id(weight), (rows if rows.dim() == 3 else rows.unsqueeze(0), positions)
        for tensor, step in self._others:
            if not tensor.is_meta:
                yield id(tensor), (tensor.detach().reshape(-1)[::step].view(1, -1, 1), None)


def _channel_weights(
    record: FFN | Experts,
) -> Iterator[tuple[Tensor, Callable[[Tensor, int | None], Iterable[Matrix]]]]:
    """Readable weights and biases that hold something of every channel."""
    whole = isinstance(record, Experts) or all(
        isinstance(getattr(p.module, "weight", 0), Tensor) for p in record.projections
    )
    for found in record.channel_tensors() if whole else ():
        if _is_readable(found.tensor):
            yield found.tensor, found.matrices


def _is_readable(tensor: Tensor) -> bool:
    plain = type(tensor) is nn.Parameter and tensor.layout is torch.strided and tensor.device.type != "meta"
    return plain and tensor.is_floating_point() and tensor.element_size() in (2, 4, 8)


def _plain(value: Any) -> Any:
    """A value that compares: of simple types, or made of these; None for other things, which are of no account."""
    if isinstance(value, _SIMPLE):
        return value
    if isinstance(value, list | tuple | set | frozenset):
        return type(value), [_plain(item) for item in value]
    if isinstance(value, dict):
        return [(str(key), _plain(item)) for key, item in value.items()]
    return None
