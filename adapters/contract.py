"""One probe for each kind of FFN that an adapter finds in a model, with the model left as it was."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pop_mm.errors import AdapterError, one_line
from pop_mm.weights.experts import Experts
from pop_mm.weights.layout import FFN
from pop_mm.weights.shards import is_spread

from .base import Adapter
from .probe import CannotProbe, device_of, probe_experts, probe_ffn

_LARGEST_BUFFER = 1 << 20  # larger ones are packed weights, which no forward changes
Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Probed:
    """What the probe of one kind of FFN found.

    Attributes
    ----------
    name : str
        The FFN that was run, for all of its kind.
    broken, skipped : str or None
        How it breaks the contract; why it could not be run. Neither: the contract holds.
    """

    name: str
    broken: str | None = None
    skipped: str | None = None


def probe_records(
    model: nn.Module, adapter: Adapter, records: Sequence[FFN | Experts], capture: bool = True
) -> dict[FFN | Experts, Probed]:
    """Probe one FFN of each kind: class, sizes, layout and scalar settings (a threshold may apply to some layers only).

    Parameters
    ----------
    records : sequence
        What the adapter found in the model.
    capture : bool
        An FFN that does not run on ``[1, T, H]`` alone is run on what a forward of the model on a few tokens gives it.

    Returns
    -------
    dict
        For every record, what was found for its kind.

    Raises
    ------
    AdapterError
        Weights are spread over processes.
    """
    if any(is_spread(weight) for record in records for module in record.modules for weight in module.parameters()):
        raise AdapterError(
            f"{type(adapter).__name__} must be probed on this {type(model).__name__}, whose weights are spread over processes. "
            "Load the model in one process, or give its type an adapter that pop_mm ships."
        )
    homes = _homes(model, adapter, records)
    kinds = {record: _kind(record, homes[record]) for record in records}
    found: dict[object, Probed] = {}
    with _untouched(model):
        for record in records:
            if kinds[record] not in found:
                feed = partial(_arguments, model, adapter, homes[record]) if capture else None
                found[kinds[record]] = _probe(record, homes[record], feed)
    return {record: found[kinds[record]] for record in records}


def _probe(record: FFN | Experts, home: nn.Module, feed: partial[Arguments] | None) -> Probed:
    device = device_of(home)
    try:
        with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
            home.eval()
            if isinstance(record, Experts):
                probe_experts(record)
            else:
                probe_ffn(record, home, feed)
    except CannotProbe as error:
        return Probed(record.name, skipped=str(error))
    except AdapterError as error:
        return Probed(record.name, broken=str(error))
    return Probed(record.name)


def _homes(model: nn.Module, adapter: Adapter, records: Sequence[FFN | Experts]) -> dict[FFN | Experts, nn.Module]:
    """The module whose forward runs each FFN: its own, or else its decoder layer."""
    homes: dict[FFN | Experts, nn.Module] = {}
    for record in records:
        if isinstance(record, Experts):
            homes[record] = record.module
        elif record.holder is not None:
            homes[record] = record.holder
        else:
            homes[record] = adapter.layers(model)[1][record.layer]
    return homes


def _kind(record: FFN | Experts, home: nn.Module) -> object:
    """What FFNs have in common that are probed together."""
    settings = tuple(
        (type(module), *((k, v) for k, v in sorted(vars(module).items()) if isinstance(v, int | float | str)))
        for module in home.modules()
    )
    return record.role, record.layout, record.size, record.why_not_plain() is None, settings


def _arguments(model: nn.Module, adapter: Adapter, home: nn.Module) -> Arguments:
    """What a forward of the model on a few tokens calls a module with."""
    embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
    avoided = set(adapter.modality_token_ids(model).values())
    ids = [token for token in range(min(64, int(embeddings.weight.shape[0]))) if token not in avoided][-6:]
    found: list[Arguments] = []

    def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append((args, kwargs))
        raise _Enough

    hook = home.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        model.eval()
        model(input_ids=torch.tensor([ids], device=device_of(embeddings)), use_cache=False)
    except _Enough:
        return found[0]
    except Exception as error:
        raise CannotProbe(
            f"the model does not run on {len(ids)} token ids alone ({type(error).__name__}: {one_line(error)})."
        ) from error
    finally:
        hook.remove()
    raise CannotProbe(f"a forward of the model does not call the {type(home).__name__}.")


class _Enough(Exception):
    """The forward has come as far as it had to."""


@contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """Within, forwards may set attributes of modules and write into buffers: afterwards all is as before."""
    with ExitStack() as undo:
        for module in model.modules():
            undo.callback(_restore, module.__dict__, dict(module.__dict__))
            for value in module.__dict__.values():
                if isinstance(value, dict):
                    undo.callback(_restore, value, dict(value))
            for buffer in module.buffers(recurse=False):
                if buffer.device.type != "meta" and buffer.numel() < _LARGEST_BUFFER and not buffer.is_inference():
                    undo.callback(_refill, buffer, buffer.detach().clone(), buffer._version)
        if "torch._dynamo.eval_frame" in sys.modules:  # a compiled forward would keep what it saw of the probe
            undo.enter_context(torch.compiler.set_stance("force_eager"))
        yield


def _restore(now: dict[str, Any], before: dict[str, Any]) -> None:
    if list(now) != list(before) or any(now[key] is not value for key, value in before.items()):
        now.clear()
        now.update(before)


@torch.no_grad()
def _refill(buffer: Tensor, before: Tensor, version: int) -> None:
    if buffer._version != version:
        buffer.copy_(before)
