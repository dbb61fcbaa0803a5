"""What vLLM's model runners, of :mod:`.v1` and :mod:`.v2`, have in common: they load weights, mask inputs and share memory."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from vllm.forward_context import get_forward_context
from vllm.logger import init_logger
from vllm.v1.kv_cache_interface import FullAttentionSpec

from ...errors import EngineError
from ...settings.config import PopConfig
from .carried import with_counts
from .masked import MaskedEntries, MaskedInput
from .planned import plan_inputs
from .rows import ChosenRows, Room
from .running import Running
from .takeover import Product, take_over, while_loading

logger = init_logger("vllm.pop_mm")
_PREFIX = "pop_mm."  # of names in the forward context


def _product(x: Tensor, bias: Tensor | None, name: str, outputs: int) -> Tensor:
    return get_forward_context().no_compile_layers[name](x, bias)


def _like_product(x: Tensor, bias: Tensor | None, name: str, outputs: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], outputs)


_library = torch.library.Library("pop_mm", "FRAGMENT")
_library.define("product(Tensor x, Tensor? bias, str name, int outputs) -> Tensor")
_library.impl("product", _product, "CompositeExplicitAutograd")
torch.library.register_fake("pop_mm::product", _like_product, lib=_library)


class MaskedRunner:
    """Goes in front of a model runner of vLLM among the bases of a class.

    A subclass tells ``pop_mm`` which tokens a forward has, and which requests have ended.

    Attributes
    ----------
    pop_mm : Running
    """

    vllm_config: Any
    compilation_config: Any
    device: torch.device
    get_model: Any
    get_kv_cache_spec: Any

    def __init__(self, config: PopConfig, vllm_config: Any, device: torch.device) -> None:
        super().__init__(vllm_config, device)  # type: ignore[call-arg]
        planned = plan_inputs(copy.deepcopy(vllm_config.model_config.hf_config), config)
        self.pop_mm = Running(config, planned, logger.warning)

    def load_model(self, *arguments: Any, **settings: Any) -> None:
        """As vLLM; then mask what was planned, or raise."""
        running, config = self.pop_mm, self.pop_mm.config
        by_rows = config.chosen_method == "thresholds" and config.backend == "auto" and config.kernels == "auto"
        with while_loading(running.planned, by_rows and self.device.type == "cpu") as loaded:
            super().load_model(*arguments, **settings)  # type: ignore[misc]
        product_of = partial(self._product_of, loaded.turned, Room())
        running.inputs = take_over(
            self.get_model(), running.planned, config, loaded.norms, running.complain, product_of
        )
        logger.info("pop_mm: %s", running.summary)

    def _product_of(self, turned: Mapping[str, Tensor], room: Room, masked: MaskedInput[Any], module: Any) -> Product:
        """What a module computes: in a compiled model through an operator that the compiler does not look into."""
        running, inner, weight = self.pop_mm, module.quant_method, turned.get(module.prefix)
        rows: ChosenRows | None = None
        if weight is not None and isinstance(masked, MaskedEntries):
            reason = ChosenRows.why_not(weight)
            rows = ChosenRows(masked, weight, room) if reason is None else None
            running.note_rows(rows, reason)

        def product(x: Tensor, bias: Tensor | None) -> Tensor:
            tokens = running.tokens
            if rows is not None and tokens is not None and rows.takes(x, tokens):
                return rows(x, bias, tokens)
            return inner.apply(module, running.mask(masked, x), bias)

        name, outputs = _PREFIX + module.prefix, module.output_size_per_partition
        self.compilation_config.static_forward_context[name] = product

        def apply(x: Tensor, bias: Tensor | None) -> Tensor:
            if torch.compiler.is_compiling():
                return torch.ops.pop_mm.product(x, bias, name, outputs)
            return product(x, bias)

        return apply

    def sample_tokens(self, *arguments: Any, **settings: Any) -> Any:
        """As vLLM, which asks for it after each forward; its answer brings along what decode steps kept."""
        return with_counts(super().sample_tokens(*arguments, **settings), self.pop_mm.counts)  # type: ignore[misc]

    def memory_for_cache(self, memory: int) -> int:
        """Bytes of the KV cache, if it and its statistics take ``memory`` bytes together."""
        cache = sum(spec.page_size_bytes for spec in self.get_kv_cache_spec().values())
        return memory * cache // (cache + self.pop_mm.block_bytes)

    def reload_weights(self, *arguments: Any, **settings: Any) -> None:
        """Refuse: choices rest on the norms of the weights that were loaded first."""
        raise EngineError("Weights cannot be loaded again under pop_mm. Start another engine.")


def reserve(running: Running, kv_cache_config: Any, block_sizes: Sequence[int], device: torch.device) -> int:
    """Make room for statistics beside the KV blocks.

    Parameters
    ----------
    block_sizes : sequence of int
        Tokens of a block in the block tables of each group of KV caches.

    Returns
    -------
    int
        The group whose block tables say where a prompt's statistics are.

    Raises
    ------
    EngineError
        No group keeps the blocks of a whole prompt.
    """
    groups = kv_cache_config.kv_cache_groups
    whole = [number for number, group in enumerate(groups) if isinstance(group.kv_cache_spec, FullAttentionSpec)]
    if not whole:
        raise EngineError(
            "The model has no layer that attends to the whole prompt, so its KV blocks are given up while it decodes, and "
            "pop_mm's statistics with them. Leave pop_mm's settings out."
        )
    tokens = block_sizes[whole[0]]
    blocks = kv_cache_config.num_blocks * (groups[whole[0]].kv_cache_spec.block_size // tokens)
    total = running.reserve(blocks, device)
    cache = sum(group.kv_cache_spec.page_size_bytes * len(group.layer_names) for group in groups)
    logger.info(
        "pop_mm: statistics take %d bytes for each %d tokens of KV cache, %.1f MiB in all: %.1f%% of the cache's own",
        running.block_bytes,
        tokens,
        total / 2**20,
        100 * total / max(1, cache * kv_cache_config.num_blocks),
    )
    return whole[0]


__all__ = ["MaskedRunner", "logger", "reserve"]
