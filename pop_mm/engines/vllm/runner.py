"""vLLM's model runner for CPUs, with the inputs of its model masked."""

from __future__ import annotations

import copy
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
from .masked import MaskedInput
from .planned import plan_inputs
from .running import Running
from .takeover import Mask, column_norms, take_over
from .tokens import Tokens, tokens_of

logger = init_logger("vllm.pop_mm")
_PREFIX = "pop_mm."  # of names in the forward context


def _leave_out(values: Tensor, name: str) -> Tensor:
    mask = get_forward_context().no_compile_layers[name]
    found = mask(values)
    return found.clone() if found is values else found


_library = torch.library.Library("pop_mm", "FRAGMENT")
_library.define("leave_out(Tensor values, str name) -> Tensor")
_library.impl("leave_out", _leave_out, "CompositeExplicitAutograd")
torch.library.register_fake("pop_mm::leave_out", lambda values, name: torch.empty_like(values), lib=_library)


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
        running = self.pop_mm
        with column_norms(running.planned.downs) as norms:
            super().load_model(load_dummy_weights)
        model = self.get_model()
        running.inputs = take_over(model, running.planned, running.config, norms, running.complain, self._masker)
        logger.info("pop_mm: %s", running.summary)

    def _masker(self, masked: MaskedInput[Any]) -> Mask:
        """What is done with an input: in a compiled model through an operator that the compiler does not look into."""
        name, mask = _PREFIX + masked.name, partial(self.pop_mm.mask, masked)
        self.compilation_config.static_forward_context[name] = mask

        def apply(values: Tensor) -> Tensor:
            if torch.compiler.is_compiling():
                return torch.ops.pop_mm.leave_out(values, name)
            return mask(values)

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
