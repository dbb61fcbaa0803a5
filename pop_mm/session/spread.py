"""Models that are spread over processes: which are pruned, and what this process has of each FFN.

Taken over are tensor and expert parallelism as ``from_pretrained(..., tp_plan="auto")`` of transformers makes them. Every
process runs the same session, and each forward at the same time.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, TypeVar

from torch import nn

from ..classes import is_a
from ..errors import AdapterError
from ..weights.experts import Experts
from ..weights.groups import InputGroup
from ..weights.layout import FFN
from ..weights.shards import Shard, is_spread, shard_of

Record = TypeVar("Record", bound=FFN | Experts | InputGroup)

_NO_STAGE = "transformers.distributed.pipeline_parallel:PipelineIdentityLayer"
_KINDS = {"tp": "tensor parallelism", "ep": "expert parallelism", "pp": "pipeline parallelism", "fsdp": "FSDP"}
_STYLES = frozenset(  # of which a hook on a module sees what this process multiplies with
    (
        *("colwise", "rowwise", "packed_colwise", "colwise_gather_output", "colwise_rep", "replicate", "local_params"),
        *("embedding_rowwise", "embedding_colwise", "moe_tp_experts", "all_reduce", "replicated_with_grad_allreduce"),
        *("grouped_gemm", "ep_dispatch_experts"),
    )
)
_EXCHANGES = ("auto", "all_reduce")  # of expert parallelism: every process sees every token


def refuse_spread(model: nn.Module) -> None:
    """Refuse a model that is spread over processes in another way than this package knows.

    Raises
    ------
    AdapterError
        Pipeline parallelism, FSDP, weights that somebody else has spread, or a plan with other parts.
    """
    spread = next((name for name, parameter in model.named_parameters() if is_spread(parameter)), None)
    stage = next((name for name, module in model.named_modules() if is_a(type(module), _NO_STAGE)), None)
    asked: Any = getattr(getattr(model, "config", None), "distributed_config", None)
    sizes = {kind: getattr(asked, f"{kind}_size", None) or 1 for kind in _KINDS}
    if spread is None and stage is None and sizes["tp"] == sizes["ep"] == 1:
        return
    why = _why_not(model, sizes, spread, stage)
    if why is None:
        return
    kinds = ", ".join(f"{_KINDS[kind]}, {kind}_size={size}" for kind, size in sizes.items() if size > 1)
    raise AdapterError(
        f"This {type(model).__name__} is spread over processes{f' ({kinds})' if kinds else ''}: {why}. Load the model with "
        "tp_plan='auto' alone, or in one process; device_map spreads it over the devices of one process."
    )


def _why_not(model: Any, sizes: dict[str, int], spread: str | None, stage: str | None) -> str | None:
    if stage is not None:
        return f"{stage} is another process's, and pop_mm chooses from what one process holds"
    if spread is None:
        return "its weights do not say how (this version of transformers keeps them otherwise)"
    by_transformers = getattr(model, "_is_distributed_loading_by_transformers", False)
    if not by_transformers or max(sizes["pp"], sizes["fsdp"]) > 1 or sizes["ep"] not in (1, sizes["tp"]):
        return f"the weight {spread} is a shard (DTensor), and pop_mm chooses from what one process holds"
    plans = {**(model.tp_plan or {}), **((model.ep_plan or {}) if sizes["ep"] > 1 else {})}
    other = next((name for name, style in plans.items() if style not in _STYLES), None)
    if other is not None:
        return f"its plan has {other} as {plans[other]!r}, which pop_mm does not know"
    exchange = getattr(model.config.distributed_config, "ep_implementation", "auto")
    if sizes["ep"] > 1 and exchange not in _EXCHANGES:
        return f"ep_implementation={exchange!r} sends tokens away, so it is unknown which token an expert sees"
    return None


def on_process(record: Record, together: bool) -> Record:
    """A record with the part of its channels that this process has; the very same if it is not spread.

    Parameters
    ----------
    together : bool
        See :attr:`Shard.together`.

    Raises
    ------
    AdapterError
        Its weights are not spread by channels.
    """
    if isinstance(record, InputGroup):
        return replace(record, shard=_shard(record, record.modules[0], "weight", 1, together))
    if isinstance(record, Experts):
        shard = _shard(record, record.module, "down_proj", record.channel_axis, together)
        return replace(record, shard=shard or _by_expert(record))
    shard = _shard(record, record.down.module, "weight", record.down.axis, together)
    return record if shard is None else replace(record, shard=shard, size=shard.channels)


def _shard(record: Any, module: nn.Module, name: str, axis: int, together: bool) -> Shard | None:
    weight = module._parameters.get(name)
    if not is_spread(weight) and getattr(module, "_is_hooked", False):
        raise AdapterError(
            f"{record.name} is spread over processes, but its {name} is a {type(weight).__name__}, not a DTensor, so it is "
            "unknown which channels are here. Load the model without quantisation and adapters, or in one process."
        )
    try:
        return shard_of(weight, axis, together)
    except ValueError as error:
        raise AdapterError(
            f"The {name} of {record.name} {error} over the processes, so its channels do not lie together. Load the model in one "
            "process."
        ) from None


def fixed_in(model: nn.Module, names: Iterable[str], fixed: Mapping[str, str]) -> Mapping[str, str]:
    """Why the weights of records cannot be moved: ``fixed``, or of a spread model one reason for all, what is whole included."""
    if not any(map(is_spread, model.parameters())):
        return fixed
    return dict.fromkeys(names, "the model is spread over processes")


def notes_of(records: Iterable[FFN | Experts | InputGroup]) -> list[str]:
    """What a report has to say of records of a spread model."""
    shard = next((record.shard for record in records if record.shard is not None), None)
    if shard is None:
        return []
    return [
        f"The model is spread over {shard.group.size()} processes; what was kept and chosen is that of this one's part."
    ]


def _by_expert(record: Experts) -> Shard | None:
    """All channels, of some of the experts."""
    found = shard_of(record.down, 0, False)
    return None if found is None else Shard(0, record.size, record.size, found.group)


__all__ = ["fixed_in", "notes_of", "on_process", "refuse_spread"]
