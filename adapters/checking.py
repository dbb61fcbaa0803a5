"""What an adapter finds in a model, which FFNs are fast or masked and why, and whether its contract holds: ``check``."""

from __future__ import annotations

import re
import textwrap
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from pop_mm.errors import AdapterError, SessionError
from pop_mm.session.unwrap import unwrap
from pop_mm.weights.experts import Experts
from pop_mm.weights.layout import FFN

from .base import Adapter
from .contract import Probed, probe_records
from .lookup import adapter_for
from .probe import without_weights
from .registry import is_shipped, registered_adapters
from .structural import StructuralAdapter

_WIDTH = 80


@dataclass(frozen=True)
class Group:
    """FFNs of a model that are pruned alike.

    Attributes
    ----------
    names : tuple of str
    pattern : str
        The names in one, such as ``model.layers.{0-23}.mlp``.
    role : {"dense", "shared_expert", "expert"}
    layout : str
    size : int
        D, channels of each FFN or expert.
    experts : int or None
        Routed experts of each layer.
    status : {"fast", "masked", "dense", "refused"}
        Fast: decode steps read the channels that are kept. Masked: right, but no faster. Refused: the contract is broken.
    reason : str
        Why.
    probed : tuple of str
        The FFNs that were probed for all: one of each class and set of settings.
    not_probed : str or None
        Why none could be.
    """

    names: tuple[str, ...]
    pattern: str
    role: str
    layout: str
    size: int
    experts: int | None
    status: str
    reason: str
    probed: tuple[str, ...]
    not_probed: str | None

    @property
    def broken(self) -> bool:
        """Whether the probe found the contract broken."""
        return self.status == "refused"

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {**vars(self), "names": list(self.names), "probed": list(self.probed)}


@dataclass(frozen=True, repr=False)
class Check:
    """What :func:`check` found; its repr is for people, in lines of at most 80 columns.

    Attributes
    ----------
    model, adapter : str
        Their classes.
    why : str
        Why this adapter.
    groups : tuple of Group
    attention : tuple of str
        Patterns of the attention modules whose inputs thresholds prune; they stay dense with other methods.
    unpruned : tuple of str
        Patterns of the modules with weights that the adapter does not name: they stay dense.
    """

    model: str
    adapter: str
    why: str
    groups: tuple[Group, ...]
    attention: tuple[str, ...]
    unpruned: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether no group breaks the contract."""
        return not any(group.broken for group in self.groups)

    def __repr__(self) -> str:
        lines = [*_wrapped(f"{self.model}: {self.adapter}, {self.why}.", "")]
        for group in self.groups:
            count = f"{len(group.names)} x " if len(group.names) > 1 else ""
            experts = f"{group.experts} experts of " if group.experts is not None else ""
            lines += _wrapped(f"{group.pattern}: {count}{experts}{group.size} channels, {group.layout}", "  ")
            lines += _wrapped(f"{group.status}: {group.reason}", "      ")
            if group.not_probed is not None:
                lines += _wrapped(f"not probed: {group.not_probed}", "      ")
            elif not group.broken:
                where = _patterns(group.probed)
                lines += _wrapped(f"probed on {', '.join(where)}: every channel is computed alone", "      ")
        if self.attention:
            lines += _wrapped(f"Attention, pruned by thresholds alone: {', '.join(self.attention)}.", "  ")
        if self.unpruned:
            lines += _wrapped(f"Not named by the adapter, stays dense: {', '.join(self.unpruned)}.", "  ")
        if not self.ok:
            lines.append("The contract is broken: sessions with this adapter are refused.")
        elif any(group.not_probed is not None for group in self.groups):
            lines.append("The contract was not probed everywhere.")
        else:
            lines.append("The contract holds.")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            **vars(self),
            "groups": [g.to_dict() for g in self.groups],
            "attention": list(self.attention),
            "unpruned": list(self.unpruned),
            "ok": self.ok,
        }


def check(model: nn.Module, adapter: Adapter | None = None) -> Check:
    """Which adapter fits a model, what it prunes and how, and whether its contract holds, probed on numbers.

    Use it on an adapter of your own. Nothing of the model is changed. One FFN of each kind is run a few times.

    Parameters
    ----------
    model : PreTrainedModel
        Or a wrapper of one. With its weights: without, there is nothing to probe.
    adapter : Adapter, optional
        Instead of the one that the model type names.

    Raises
    ------
    AdapterError
        No adapter fits, or it finds nothing. A broken contract is no error here: see :attr:`Check.ok`.
    SessionError
        The model is being pruned now.
    """
    from pop_mm.session.session import plan_ffns
    from pop_mm.settings.config import PopConfig

    model = unwrap(model).model
    given = adapter is not None
    adapter = adapter_for(model) if adapter is None else adapter
    plans = plan_ffns(model, PopConfig(0.2, scope="ffn"), adapter)
    records = [plan.ffn for plan in plans]
    if _being_pruned(records):
        raise SessionError("The model is being pruned; leave the session before you check its adapter.")
    probed = probe_records(model, adapter, records)
    rows = [_Row(plan.ffn, *_status(plan.backend, plan.reason, probed[plan.ffn]), probed[plan.ffn]) for plan in plans]
    pruned = _parts(module for record in records for module in record.modules)
    attention = _parts(module for group in adapter.input_groups(model) for module in group.modules)
    matrices = {name: module for name, module in model.named_modules() if _holds_matrices(module)}
    groups: dict[object, list[_Row]] = {}
    for row in rows:
        groups.setdefault(row.key, []).append(row)
    return Check(
        type(model).__name__,
        type(adapter).__name__,
        _why(model, adapter, given),
        tuple(_group(rows) for rows in groups.values()),
        _patterns([name for name, module in matrices.items() if module in attention - pruned]),
        _patterns([name for name, module in matrices.items() if module not in attention | pruned]),
    )


def probe_foreign(model: nn.Module, adapter: Adapter, records: Sequence[FFN | Experts]) -> bool:
    """Probe an adapter that pop_mm does not ship for this model's type, before a session relies on it.

    Returns
    -------
    bool
        False if it is still due: the model is on the meta device, or another session prunes it now.

    Raises
    ------
    AdapterError
        The contract is broken.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if is_shipped(model_type, adapter) or isinstance(adapter, StructuralAdapter):  # the latter probes all it finds
        return True
    if _being_pruned(records) or any(without_weights(module) for record in records for module in record.modules):
        return False
    for probed in dict.fromkeys(probe_records(model, adapter, records).values()):
        if probed.broken is not None:
            raise AdapterError(
                f"{type(adapter).__name__} does not fit this {type(model).__name__}: {probed.broken} "
                "pop_mm.adapters.check(model) shows all that it finds; docs/adapters.md says what it must promise."
            )
        if probed.skipped is not None:
            warnings.warn(
                f"pop_mm relies on {type(adapter).__name__} for {probed.name} without a probe: {probed.skipped}",
                stacklevel=2,
            )
    return True


def _being_pruned(records: Sequence[FFN | Experts]) -> bool:
    from pop_mm.session.attachment import _PRUNED_MODULES

    return any(record.modules[-1] in _PRUNED_MODULES for record in records)


# what the result says ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Row:
    record: FFN | Experts
    status: str
    reason: str
    probed: Probed

    @property
    def key(self) -> object:
        """The same for FFNs that are pruned alike."""
        record = self.record
        count = record.count if isinstance(record, Experts) else None
        name = _without_layer(record)
        reason = self.reason.replace(record.name, name) if self.probed.broken is None else self.probed
        return name, record.role, record.layout, record.size, count, self.status, reason, self.probed.skipped


def _status(backend: str, reason: str, probed: Probed) -> tuple[str, str]:
    if probed.broken is not None:
        return "refused", probed.broken
    return {"inplace": "fast", "gathered": "fast"}.get(backend, backend), reason


def _without_layer(record: FFN | Experts) -> str:
    return re.sub(rf"(?<=\.){record.layer}(?=\.|$)", "N", record.name, count=1)


def _group(rows: list[_Row]) -> Group:
    record, first = rows[0].record, rows[0]
    names = tuple(row.record.name for row in rows)
    skipped = first.probed.skipped
    return Group(
        names,
        ", ".join(_patterns(names)),
        record.role,
        record.layout,
        record.size,
        record.count if isinstance(record, Experts) else None,
        first.status,
        first.reason,
        () if skipped is not None else tuple(dict.fromkeys(row.probed.name for row in rows)),
        skipped,
    )


def _why(model: nn.Module, adapter: Adapter, given: bool) -> str:
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if given:
        return "given as adapter="
    if registered_adapters().get(str(model_type)) is type(adapter):
        whose = "" if is_shipped(model_type, adapter) else f" by {type(adapter).__module__}"
        return f"registered for the model type {model_type!r}{whose}"
    return f"no adapter is registered for the model type {model_type!r}; its FFNs were found by name and shape"


def _parts(modules: Iterable[nn.Module]) -> set[nn.Module]:
    return {part for module in modules for part in module.modules()}


def _holds_matrices(module: nn.Module) -> bool:
    return any(p.dim() >= 2 for p in module.parameters(recurse=False))


def _patterns(names: Sequence[str]) -> tuple[str, ...]:
    """Names that differ in their numbers or their last parts alone, in one: ``layers.{0-3}.self_attn.{q_proj,k_proj}``."""
    by_shape: dict[tuple[str, ...], list[list[int]]] = {}
    for name in names:
        parts = name.split(".")
        shape = tuple("" if part.isdigit() else part for part in parts)
        by_shape.setdefault(shape, []).append([int(part) for part in parts if part.isdigit()])
    merged: dict[str, list[str]] = {}
    for shape, numbers in by_shape.items():
        columns = iter([_span(sorted(set(column))) for column in zip(*numbers, strict=True)])
        *parents, last = [part or next(columns) for part in shape]
        merged.setdefault(".".join(parents), []).append(last)
    return tuple(
        f"{parent}.{last[0] if len(last) == 1 else '{' + ','.join(last) + '}'}" if parent else ", ".join(last)
        for parent, last in merged.items()
    )


def _span(numbers: list[int]) -> str:
    """``{0-3,7}``; a single number alone."""
    if len(numbers) == 1:
        return str(numbers[0])
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return "{" + ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs) + "}"


def _wrapped(text: str, indent: str) -> list[str]:
    return textwrap.wrap(
        text,
        _WIDTH,
        initial_indent=indent,
        subsequent_indent=indent + "  ",
        break_long_words=True,
        break_on_hyphens=False,
    )


__all__ = ["Check", "Group", "check", "probe_foreign"]
