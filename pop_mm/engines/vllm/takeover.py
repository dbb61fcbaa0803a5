"""Which modules of a vLLM model the planned inputs are, and how their inputs are masked. Whatever is not found is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    get_tp_group,
    tensor_model_parallel_all_reduce,
)
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, RowParallelLinear, UnquantizedLinearMethod

from ...errors import EngineError
from ...formats.norms import weight_norms
from ...settings.config import PopConfig
from .masked import MaskedChannels, MaskedEntries, MaskedInput
from .planned import Planned, PlannedInput
from .shard import Shard

Product = Callable[[Tensor, "Tensor | None"], Tensor]  # of an input and a bias


@dataclass
class Loaded:
    """What was kept of plain weights while they were loaded, by the module's name.

    Attributes
    ----------
    norms : dict of str to Tensor
        Of the columns, ``[width]`` float32.
    turned : dict of str to Tensor
        The weights on this rank, ``[in, out]``.
    """

    norms: dict[str, Tensor] = field(default_factory=dict)
    turned: dict[str, Tensor] = field(default_factory=dict)


class Masking(LinearMethodBase):  # type: ignore[misc]
    """How vLLM multiplies with a module's weight, on an input of which entries are left out.

    Parameters
    ----------
    inner : LinearMethodBase
        vLLM's own way.
    product : callable
        What is computed instead.
    """

    def __init__(self, inner: LinearMethodBase, product: Product) -> None:
        self.inner = inner
        self.product = product

    def create_weights(self, *arguments: Any, **settings: Any) -> None:
        """As ``inner``."""
        self.inner.create_weights(*arguments, **settings)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Refuse: norms and choices are those of the weights that were loaded first."""
        raise EngineError(
            "Weights cannot be loaded again under pop_mm, whose choices rest on the norms of the first ones. Start another "
            "engine."
        )

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """The product with what is left of ``x``."""
        return self.product(x, bias)


@contextmanager
def while_loading(planned: Planned, turn: bool) -> Iterator[Loaded]:
    """Within: what is needed of plain weights is kept, before vLLM packs them for its CPU kernels and drops what was loaded.

    Parameters
    ----------
    planned : Planned
        Norms are kept of its down projections.
    turn : bool
        Keep the weights of its modules, and of those that vLLM joins them to, once more.
    """
    found = Loaded()
    owners = {name.rpartition(".")[0] for each in planned.inputs for name in each.modules} if turn else set()
    process = UnquantizedLinearMethod.process_weights_after_loading

    def read(self: UnquantizedLinearMethod, layer: Any) -> None:
        name = getattr(layer, "prefix", "")
        if name in planned.downs:
            found.norms[name] = weight_norms(layer.weight.data, 0, torch.float32)
        if name.rpartition(".")[0] in owners:
            found.turned[name] = layer.weight.data.t().contiguous()
        process(self, layer)

    UnquantizedLinearMethod.process_weights_after_loading = read
    try:
        yield found
    finally:
        UnquantizedLinearMethod.process_weights_after_loading = process


def take_over(
    model: nn.Module,
    planned: Planned,
    config: PopConfig,
    norms: Mapping[str, Tensor],
    complain: Callable[[str], None],
    product_of: Callable[[MaskedInput[Any], Any], Product],
) -> list[MaskedInput[Any]]:
    """Mask every planned input of a vLLM model.

    Parameters
    ----------
    norms : mapping of str to Tensor
        From :class:`Loaded`.
    complain : callable
        As for :class:`MaskedInput`.
    product_of : callable
        From a masked input and a module that is given it to what the module computes from then on.

    Raises
    ------
    EngineError
        A module is missing, is quantised, shares its product with others, or has another width. Nothing has changed then.
    """
    modules = dict(model.named_modules())
    _refuse_experts(modules)
    packed: Mapping[str, Sequence[str]] = getattr(model, "packed_modules_mapping", None) or {}
    found = [(each, _find(each, modules, packed, type(model).__name__)) for each in planned.inputs]
    taken: set[nn.Module] = set()
    for each, own in found:
        for module in own:
            _check(each, module)
            if module in taken:
                raise EngineError(
                    f"{module.prefix} is given the inputs of two parts of the model, so nothing can be left out of it."
                )
            taken.add(module)
    masked = []
    for each, own in found:
        state = _masked(each, own[-1], config, norms, complain)
        state.entry_bytes = sum(module.output_size_per_partition * module.params_dtype.itemsize for module in own)
        for module in own:
            module.quant_method = Masking(module.quant_method, product_of(state, module))
        masked.append(state)
    return masked


def _refuse_experts(modules: Mapping[str, nn.Module]) -> None:
    for name, module in modules.items():
        if isinstance(module, RoutedExperts):  # holds the weights of experts, whatever runs or wraps it
            raise EngineError(
                f"{name} is a {type(module).__name__}: vLLM computes routed experts in one kernel, which pop_mm cannot reach "
                "into. Serve the model with transformers, or leave pop_mm's settings out."
            )


def _find(
    planned: PlannedInput, modules: Mapping[str, nn.Module], packed: Mapping[str, Sequence[str]], model: str
) -> list[Any]:
    """Modules of vLLM that are given an input: they have transformers' names, or those of several that vLLM joins."""
    found: dict[nn.Module, None] = {}
    for name in planned.modules:
        prefix, _, leaf = name.rpartition(".")
        module = modules.get(name)
        for joint, parts in packed.items():
            if module is None and leaf in parts and {f"{prefix}.{part}" for part in parts} <= set(planned.modules):
                module = modules.get(f"{prefix}.{joint}")
        if module is None:
            raise EngineError(
                f"{name} of the transformers model has no counterpart in vLLM's {model}, so {planned.record} would be served "
                "dense. Serve the model with transformers, or leave pop_mm's settings out."
            )
        found[module] = None
    return list(found)


def _check(planned: PlannedInput, module: Any) -> None:
    """Whether what a module is given is the planned input, and its product is with a plain weight."""
    name = getattr(module, "prefix", planned.record)
    if not isinstance(module, LinearBase):
        raise EngineError(
            f"{name} is a {type(module).__name__} in vLLM, and not one of its linear layers: it cannot be masked."
        )
    if type(module.quant_method) is not UnquantizedLinearMethod:
        raise EngineError(
            f"{name} is multiplied by {type(module.quant_method).__name__}, not as a plain weight (it is quantised, or wrapped), "
            "so its channels' norms are unknown. Serve plain weights, or leave pop_mm's settings out."
        )
    if module.input_size != planned.size:
        raise EngineError(
            f"{name} takes {module.input_size} inputs in vLLM and {planned.size} in transformers: they differ."
        )
    if planned.which == "h" and not isinstance(module, RowParallelLinear):
        raise EngineError(f"{name} is a {type(module).__name__} in vLLM; a down projection is a RowParallelLinear.")


def _masked(
    planned: PlannedInput,
    module: Any,
    config: PopConfig,
    norms: Mapping[str, Tensor],
    complain: Callable[[str], None],
) -> MaskedInput[Any]:
    shard = _shard(module)
    own = norms.get(module.prefix) if planned.which == "h" else None
    if planned.which == "h" and own is None:
        raise EngineError(
            f"The weights of {module.prefix} were not loaded as plain ones, so its channels' norms are unknown. Use the default "
            "--load-format, or leave pop_mm's settings out."
        )
    if planned.sizes is None:
        return MaskedEntries(module.prefix, shard, complain, planned.share, own)
    assert own is not None
    weight = torch.ones_like(own) if config.channel_method.scorer == "activation" else own
    return MaskedChannels(module.prefix, shard, complain, planned.sizes, config.channel_method, weight)


def _shard(module: Any) -> Shard:
    size = module.input_size
    width = module.input_size_per_partition if isinstance(module, RowParallelLinear) else size
    if width == size:
        return Shard(0, size, size)
    assert width * get_tensor_model_parallel_world_size() == size
    return Shard(get_tensor_model_parallel_rank() * width, width, size, _gather, _sum)


def _gather(values: Tensor) -> Tensor:
    return get_tp_group().all_gather(values, -1)


def _sum(values: Tensor) -> Tensor:
    """Sum over ranks; of integers by the group for the CPU, which knows them."""
    if values.is_floating_point():
        return tensor_model_parallel_all_reduce(values)
    found = values.to("cpu", copy=True)
    torch.distributed.all_reduce(found, group=get_tp_group().cpu_group)
    return found.to(values.device)


__all__ = ["Loaded", "Masking", "Product", "take_over", "while_loading"]
