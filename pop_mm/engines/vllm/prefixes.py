"""Which blocks of the prefix cache other requests may use: those that hold nothing but prompt.

The KV entries of generated tokens come from a pruned model, and their statistics were never counted. A prompt that repeats an
answer would find them in the cache and go on from there, so what it gets would hang on which requests came before. So a block
with a generated token in it is cached for its own request alone, which finds it again after a preemption.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.core import block_pool, kv_cache_utils
from vllm.v1.core.sched.scheduler import Scheduler

from .settings import settings_of

_KEY = "pop_mm_generated_by"
_MARK = "_pop_mm"


def install() -> None:
    """Give blocks with generated tokens a key of their request, in engines with pop_mm's settings."""
    keys_of, add_request = kv_cache_utils.generate_block_hash_extra_keys, Scheduler.add_request

    def generate_block_hash_extra_keys(
        request: Any, start_token_idx: int, end_token_idx: int, start_mm_idx: int
    ) -> Any:
        keys, index = keys_of(request, start_token_idx, end_token_idx, start_mm_idx)
        if end_token_idx > request.num_prompt_tokens and getattr(request, _MARK, False):
            keys = (*(keys or ()), (_KEY, request.request_id))
        return keys, index

    def marked(self: Scheduler, request: Any) -> None:
        if settings_of(self.vllm_config) is not None:
            setattr(request, _MARK, True)
        add_request(self, request)

    kv_cache_utils.generate_block_hash_extra_keys = generate_block_hash_extra_keys
    block_pool.generate_block_hash_extra_keys = generate_block_hash_extra_keys
    Scheduler.add_request = marked


__all__ = ["install"]
