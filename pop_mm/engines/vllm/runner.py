"""vLLM's model runner for CPUs, with the inputs of its model masked."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from vllm.forward_context import get_forward_context
from vllm.logger import init_logger
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.worker.cpu_model_runner import CPUModelRunner

from ...config import PopConfig
from ...errors import EngineError
from .masked import MaskedEntries, MaskedInput
from .planned import plan_inputs
from .rows import ChosenRows, Room
from .running import Running
from .takeover import Product, take_over, while_loading
from .tokens import Tokens, tokens_of

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


class MaskedCPUModelRunner(CPUModelRunner):  # type: ignore[misc]
    """The V1 runner: a step's tokens are told to the masked inputs, and requests that end are forgotten.

    Attributes
    ----------
    pop_mm : Running
    """

    def __init__(self, config: PopConfig, vllm_config: Any, device: torch.device) -> None:
        super().__init__(vllm_config, device)
        planned = plan_inputs(copy.deepcopy(vllm_config.model_config.hf_config), config)
        self.pop_mm = Running(config, planned, logger.warning)
        self._pop_mm_group = 0

    def load_model(self, load_dummy_weights: bool = False) -> None:
        """As vLLM; then mask what was planned, or raise."""
        running, config = self.pop_mm, self.pop_mm.config
        by_rows = config.chosen_method == "thresholds" and config.backend == "auto" and config.kernels == "auto"
        with while_loading(running.planned, by_rows) as loaded:
            super().load_model(load_dummy_weights)
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

    def memory_for_cache(self, memory: int) -> int:
        """Bytes of the KV cache, if it and its statistics take ``memory`` bytes together."""
        cache = sum(spec.page_size_bytes for spec in self.get_kv_cache_spec().values())
        return memory * cache // (cache + self.pop_mm.block_bytes)

    def initialize_kv_cache(self, kv_cache_config: Any, *arguments: Any, **settings: Any) -> None:
        """As vLLM, with statistics beside the KV blocks."""
        super().initialize_kv_cache(kv_cache_config, *arguments, **settings)
        groups = self.kv_cache_config.kv_cache_groups
        whole = [number for number, group in enumerate(groups) if isinstance(group.kv_cache_spec, FullAttentionSpec)]
        if not whole:
            raise EngineError(
                "The model has no layer that attends to the whole prompt, so its KV blocks are given up while it decodes, and "
                "pop_mm's statistics with them. Leave pop_mm's settings out."
            )
        self._pop_mm_group = whole[0]
        tokens = self.input_batch.block_table[whole[0]].block_size
        blocks = self.kv_cache_config.num_blocks * (groups[whole[0]].kv_cache_spec.block_size // tokens)
        total = self.pop_mm.reserve(blocks, self.device)
        cache = sum(group.kv_cache_spec.page_size_bytes * len(group.layer_names) for group in groups)
        logger.info(
            "pop_mm: statistics take %d bytes for each %d tokens of KV cache, %.1f MiB in all: %.1f%% of the cache's own",
            self.pop_mm.block_bytes,
            tokens,
            total / 2**20,
            100 * total / max(1, cache * self.kv_cache_config.num_blocks),
        )

    def _update_states(self, scheduler_output: Any, *arguments: Any, **settings: Any) -> Any:
        for request in scheduler_output.finished_req_ids:
            self.pop_mm.forget(request)
        return super()._update_states(scheduler_output, *arguments, **settings)

    def _model_forward(self, *arguments: Any, **settings: Any) -> Any:
        with self.pop_mm.forward(self._pop_mm_tokens()):
            return super()._model_forward(*arguments, **settings)

    def _pop_mm_tokens(self) -> Tokens:
        batch = self.input_batch
        requests, starts = batch.num_reqs, self.query_start_loc.np
        table = batch.block_table[self._pop_mm_group]
        return tokens_of(
            batch.req_ids[:requests],
            starts[1 : requests + 1] - starts[:requests],
            batch.num_computed_tokens_cpu[:requests],
            batch.num_prompt_tokens[:requests],
            table.get_numpy_array()[:requests],
            table.block_size,
        )

    def reload_weights(self, *arguments: Any, **settings: Any) -> None:
        """Refuse: choices rest on the norms of the weights that were loaded first."""
        raise EngineError("Weights cannot be loaded again under pop_mm. Start another engine.")


__all__ = ["MaskedCPUModelRunner"]
