"""vLLM's V2 model runner, with the inputs of its model masked.

It was run on a CPU only, with its Triton kernels interpreted (``tests/vllm/test_vllm_v2.py``), and never on a GPU.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.v1.worker.gpu.model_states.default import DefaultModelState

from ...errors import EngineError
from .runner import MaskedRunner, logger, reserve
from .running import Running
from .tokens import tokens_of

NOT_RUN = (
    "pop_mm: with vLLM's V2 model runner the plug-in was run on a CPU only, never on a GPU. Compare some answers with those of "
    "transformers (pop_mm.prune) before you rely on it."
)


class MaskedModelState(DefaultModelState):  # type: ignore[misc]
    """What vLLM tells a model of its requests and batches, told to the masked inputs.

    Parameters
    ----------
    running : Running
        Its tokens are set before each forward of requests; who runs the forward takes them away.
    """

    def __init__(
        self, vllm_config: Any, model: torch.nn.Module, encoder_cache: Any, device: torch.device, running: Running
    ) -> None:
        super().__init__(vllm_config, model, encoder_cache, device)
        self._running = running
        self._prompts: dict[str, int] = {}  # their lengths
        self._group, self._block_size = 0, 1

    def add_request(self, req_index: int, new_req_data: Any) -> None:
        """As vLLM. A request that was preempted comes back with its answer so far, behind the same prompt."""
        super().add_request(req_index, new_req_data)
        self._prompts[new_req_data.req_id] = new_req_data.prompt_len

    def remove_request(self, req_id: str) -> None:
        """As vLLM, and forget what was decided for it."""
        super().remove_request(req_id)
        self._prompts.pop(req_id, None)
        self._running.forget(req_id)

    def initialize_kv_cache(self, kv_cache_config: Any, block_tables: Any) -> None:
        """As vLLM, with statistics beside the KV blocks."""
        super().initialize_kv_cache(kv_cache_config, block_tables)
        self._group = reserve(self._running, kv_cache_config, block_tables.block_sizes, self.device)
        self._block_size = block_tables.block_sizes[self._group]

    def preprocess_state(
        self, input_batch: Any, block_tables: tuple[Tensor, ...], kv_cache_config: Any, num_computed_tokens: Tensor
    ) -> None:
        """As vLLM, which calls it before each forward of requests, and not before those of made-up tokens."""
        super().preprocess_state(input_batch, block_tables, kv_cache_config, num_computed_tokens)
        requests = input_batch.num_reqs
        self._running.tokens = tokens_of(
            input_batch.req_ids,
            input_batch.num_scheduled_tokens,
            input_batch.num_computed_tokens_np,
            np.array([self._prompts[request] for request in input_batch.req_ids], dtype=np.int64),
            block_tables[self._group][:requests].cpu().numpy(),
            self._block_size,
        )


class MaskedV2Runner(MaskedRunner):
    """In front of a V2 runner: its model state is the masked one."""

    model: torch.nn.Module
    encoder_cache: Any
    model_state: Any

    def load_model(self, *arguments: Any, **settings: Any) -> None:
        """As vLLM; then mask what was planned, or raise."""
        super().load_model(*arguments, **settings)
        if type(self.model_state) is not DefaultModelState:
            raise EngineError(
                f"The model keeps its requests in a {type(self.model_state).__name__}, which the plug-in does not know: it would "
                "be served dense. Leave pop_mm's settings out."
            )
        self.model_state = MaskedModelState(self.vllm_config, self.model, self.encoder_cache, self.device, self.pop_mm)
        if self.device.type != "cpu":
            logger.warning(NOT_RUN)

    def execute_model(self, *arguments: Any, **settings: Any) -> Any:
        """As vLLM."""
        with self.pop_mm.forward():
            return super().execute_model(*arguments, **settings)  # type: ignore[misc]


@cache
def masked_v2(runner: type) -> type[MaskedV2Runner]:
    """A V2 runner, a GPU's or a CPU's, that masks."""
    return type(f"Masked{runner.__name__}", (MaskedV2Runner, runner), {})


__all__ = ["NOT_RUN", "MaskedModelState", "MaskedV2Runner", "masked_v2"]
