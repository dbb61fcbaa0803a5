"""A small Llama, what pop_mm makes of it in transformers, and a vLLM engine of it in this process."""

from __future__ import annotations

import gc
import os
from contextlib import contextmanager
from pathlib import Path

os.environ.update(
    OMP_NUM_THREADS="1",
    HF_HUB_OFFLINE="1",
    VLLM_NO_USAGE_STATS="1",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",  # the engine runs in this process
    VLLM_LOGGING_LEVEL=os.environ.get("VLLM_LOGGING_LEVEL", "ERROR"),
)

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import pop_mm

VOCAB, BLOCK = 384, 32
V2 = os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1"  # make test-vllm runs some tests a second time so


def save_llama(folder: Path, **settings) -> str:
    """A Llama with random weights, large enough ones that greedy tokens are no matter of rounding."""
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=3,
        num_key_value_heads=3,
        head_dim=32,
        max_position_embeddings=512,
        eos_token_id=None,
        bos_token_id=1,
        tie_word_embeddings=False,
        **settings,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).float()
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            scale = 1.0 if "embed" in name else 2.0
            torch.nn.init.normal_(parameter, std=scale * parameter.shape[1] ** -0.5)
    model.save_pretrained(folder)
    return str(folder)


def prompts_of(count: int, length: int = 70, shared: int = 0, seed: int = 0) -> list[list[int]]:
    """So many prompts of different lengths, the first ``shared`` tokens of which are the same."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randint(3, VOCAB, (shared,), generator=generator).tolist()
    return [
        start + torch.randint(3, VOCAB, (length - shared + 3 * number,), generator=generator).tolist()
        for number in range(count)
    ]


def in_transformers(folder: str, settings: dict, prompts: list[list[int]], tokens: int) -> list[list[int]]:
    """Greedy tokens of pop_mm's masked reference, prompt by prompt."""
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found = []
    with pop_mm.prune(model, **{"batch": "per_sequence", "backend": "masked", **settings}):
        for prompt in prompts:
            ids = torch.tensor([prompt])
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False
            )
            found.append(out[0, len(prompt) :].tolist())
    return found


@contextmanager
def engine(folder: str, settings: dict | None, **vllm):
    """vLLM's offline engine on a CPU; ``settings`` are pop_mm's."""
    from vllm import LLM

    defaults = dict(
        dtype="float32",
        max_model_len=512,
        max_num_seqs=16,
        block_size=BLOCK,
        enforce_eager=True,
        skip_tokenizer_init=True,
        disable_log_stats=False,
        enable_prefix_caching=True,
        max_num_batched_tokens=2048,
        kv_cache_memory_bytes=256 * 2**20,
        additional_config={} if settings is None else {"pop_mm": settings},
    )
    llm = LLM(model=folder, **{**defaults, **vllm})
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()


def answers(llm, prompts: list[list[int]], tokens: int, **sampling) -> list[list[int]]:
    """Greedy tokens of all prompts, asked at once."""
    from vllm import SamplingParams

    params = SamplingParams(**{"temperature": 0, "max_tokens": tokens, "min_tokens": 0, "ignore_eos": True, **sampling})
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def metric(llm, name: str) -> float:
    """The sum of one of vLLM's counters."""
    return sum(found.value for found in llm.get_metrics() if found.name == name)
