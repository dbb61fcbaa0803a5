"""What pop_mm would leave out of a model, from its transformers config alone. Knows no vLLM.

The transformers model is built on the meta device, without weights, and planned as a session would plan it. So an engine with
model classes of its own has the same sizes and shares, and the same refusals.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ...adapters import adapter_for
from ...errors import EngineError, one_line
from ...partition import Sizes
from ...session.planning import plan_ffns
from ...session.threshold_session import plan_thresholds
from ...settings.config import PopConfig
from ...weights.groups import InputGroup
from ...weights.layout import FFN


@dataclass(frozen=True)
class PlannedInput:
    """One input, of which decode steps leave out entries.

    Attributes
    ----------
    record : str
        Name of the FFN, or of the attention modules.
    which : {"x", "h"}
        The input of gate and up (or of attention), or of down.
    modules : tuple of str
        Names of the modules that are given it, in the transformers model.
    size : int
        Entries of it.
    sizes : Sizes or None
        Of R, C and P. None for thresholds.
    share : float
        Of its entries, that is kept.
    """

    record: str
    which: str
    modules: tuple[str, ...]
    size: int
    sizes: Sizes | None
    share: float


@dataclass(frozen=True)
class Planned:
    """What is to be taken over of a model.

    Attributes
    ----------
    inputs : tuple of PlannedInput
        Those that leave out something.
    ffns : tuple of str
        Names of all FFNs, also of those that the settings keep dense.
    downs : tuple of str
        Names of their down projections.
    """

    inputs: tuple[PlannedInput, ...]
    ffns: tuple[str, ...]
    downs: tuple[str, ...]

    @property
    def pruned_ffns(self) -> int:
        """FFNs of which something is left out."""
        return len({found.record for found in self.inputs} & set(self.ffns))


def plan_inputs(hf_config: Any, config: PopConfig) -> Planned:
    """The inputs of a model that are to be masked.

    Parameters
    ----------
    hf_config : PretrainedConfig
        Of a language model.
    config : PopConfig

    Raises
    ------
    EngineError
        transformers does not know the model, or it is one that this engine has no way for: pictures, routed experts.
    AdapterError, ConfigError
        As :func:`pop_mm.prune`.
    """
    model = _skeleton(hf_config)
    adapter = adapter_for(model)
    if adapter.modality_token_ids(model):
        raise EngineError(
            f"pop_mm does not prune {type(model).__name__} in this engine: it takes pictures, and which tokens are text is "
            "not known here. Serve it with transformers (pop_mm.prune)."
        )
    names = {module: name for name, module in model.named_modules()}
    plans: list[Any]
    if config.chosen_method == "thresholds":
        plans = plan_thresholds(model, config, adapter)
    else:
        plans = list(plan_ffns(model, config, adapter))
    records = [plan.ffn for plan in plans if not isinstance(plan.ffn, InputGroup)]
    experts = next((record for record in records if not isinstance(record, FFN)), None)
    if experts is not None:
        raise EngineError(
            f"pop_mm does not prune {type(model).__name__} in this engine: its routed experts ({experts.name}) are computed by "
            "fused kernels that keep their channels to themselves. Serve it with transformers (pop_mm.prune)."
        )
    inputs = [found for plan in plans if plan.backend != "dense" for found in _inputs(plan, names)]
    downs = tuple(names[record.down.module] for record in records)
    return Planned(tuple(inputs), tuple(record.name for record in records), downs)


def _inputs(plan: Any, names: dict[nn.Module, str]) -> list[PlannedInput]:
    record, sizes = plan.ffn, getattr(plan, "sizes", None)
    by_input = {which: tuple(names[module] for module in modules) for which, modules in record.by_input.items()}
    if sizes is not None:
        return [PlannedInput(record.name, "h", by_input["h"], record.size, sizes, sizes.kept / sizes.channels)]
    return [
        PlannedInput(record.name, which, modules, _entries(record, which), None, plan.shares[which])
        for which, modules in by_input.items()
    ]


def _entries(record: FFN | InputGroup, which: str) -> int:
    return record.hidden_size if isinstance(record, FFN) and which == "x" else record.size


def _skeleton(hf_config: Any) -> nn.Module:
    """The transformers model without weights."""
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(hf_config)
    except Exception as error:  # whatever a model's own code raises
        raise EngineError(
            f"pop_mm plans a model by its transformers twin, which cannot be built from {type(hf_config).__name__}: "
            f"{one_line(error)}. Leave pop_mm's settings out to serve it dense."
        ) from error


__all__ = ["Planned", "PlannedInput", "plan_inputs"]
