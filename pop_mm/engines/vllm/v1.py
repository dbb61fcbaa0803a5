"""vLLM's V1 model runner for CPUs, with the inputs of its model masked."""

from __future__ import annotations

from typing import Any

from vllm.v1.worker.cpu_model_runner import CPUModelRunner

from .runner import MaskedRunner, reserve
from .tokens import Tokens, tokens_of


class MaskedCPUModelRunner(MaskedRunner, CPUModelRunner):  # type: ignore[misc]
    """A step's tokens are told to the masked inputs, and requests that end are forgotten."""

    _pop_mm_group = 0

    def initialize_kv_cache(self, kv_cache_config: Any, *arguments: Any, **settings: Any) -> None:
        """As vLLM, with statistics beside the KV blocks."""
        super().initialize_kv_cache(kv_cache_config, *arguments, **settings)
        sizes = [table.block_size for table in self.input_batch.block_table.block_tables]
        self._pop_mm_group = reserve(self.pop_mm, self.kv_cache_config, sizes, self.device)

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


__all__ = ["MaskedCPUModelRunner"]
