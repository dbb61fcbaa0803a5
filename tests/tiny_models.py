"""Tiny random causal language models, one for each dense model type: a few milliseconds to build, the same for a seed.

Every parameter is random, biases and norms too, so that a forgotten bias shows; the FFNs weigh enough in the logits
that a wrong channel shows. ``tiny("llama", num_hidden_layers=3)`` changes the config.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCAB = 96

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,  # generation always runs its full length
}
_GATED = {"intermediate_size": 64, "num_key_value_heads": 2, "head_dim": 8}
_LAYER_TYPES = ["sliding_attention", "full_attention"]
_SLIDING = dict(**_GATED, sliding_window=64, layer_types=_LAYER_TYPES)
_WIDE = {"intermediate_size": 64}

_KV = dict(**_WIDE, num_key_value_heads=2)
_MLA = dict(**_WIDE, q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8, head_dim=8)

# What each model type needs beyond _COMMON.
_SETTINGS: dict[str, dict[str, Any]] = {
    # gate_proj, up_proj, down_proj
    "llama": dict(**_GATED, mlp_bias=True, attention_bias=True),
    "mistral": _GATED,
    "ministral": _SLIDING,
    "ministral3": _GATED,
    "qwen2": _KV,
    "qwen3": _GATED,
    "gemma": _GATED,
    "gemma2": dict(**_SLIDING, query_pre_attn_scalar=8),
    "gemma3_text": dict(**_SLIDING, query_pre_attn_scalar=8),
    "vaultgemma": dict(**_SLIDING, query_pre_attn_scalar=8),
    "olmo": _KV,
    "olmo2": _KV,
    "olmo3": dict(**_KV, sliding_window=64, layer_types=_LAYER_TYPES),
    "smollm3": dict(**_KV, mlp_bias=True),
    "granite": dict(**_KV, mlp_bias=True),
    "granite_swa": dict(**_SLIDING, mlp_bias=True),
    "cohere": dict(**_KV, use_qk_norm=True, logit_scale=1.0),
    "cohere2": dict(**_KV, sliding_window=64, layer_types=_LAYER_TYPES, logit_scale=1.0),
    "stablelm": dict(**_KV, use_qkv_bias=True, qk_layernorm=True),
    "helium": dict(**_GATED, mlp_bias=True),
    "hunyuan_v1_dense": _GATED,
    "hyperclovax": dict(**_GATED, mlp_bias=True),
    "internlm3": _GATED,
    "iquestcoder": _GATED,
    "exaone4": dict(**_SLIDING),
    "ernie4_5": dict(**_GATED, use_bias=True),
    "seed_oss": dict(**_GATED, mlp_bias=True),
    "cwm": _SLIDING,
    "diffllama": _KV,
    "minicpm3": dict(**_MLA, num_key_value_heads=4, dim_model_base=32),
    "youtu": dict(**_MLA, num_key_value_heads=4),
    # gate_up_proj, down_proj
    "phi3": _KV,
    "glm": _GATED,
    "glm4": _GATED,
    # w1, w3, w2
    "lfm2": dict(**_KV, block_auto_adjust_ff_dim=False, layer_types=["conv", "full_attention"]),
    # up_proj, down_proj
    "arcee": dict(**_GATED, mlp_bias=True),
    "apertus": _GATED,
    "nemotron": dict(**_GATED, mlp_bias=True),
    "jais2": dict(**_GATED, mlp_bias=True),
    "mpt": {},
    # other ungated names
    "starcoder2": _KV,
    "gpt_bigcode": {"n_inner": 64},
    "gpt_neo": dict(**_WIDE, attention_types=[[["global", "local"], 1]], window_size=64),
    "gpt2": {"n_inner": 64},
    "gpt_neox": _WIDE,
    "gpt_neox_japanese": {"intermediate_multiple_size": 2},
    "persimmon": _WIDE,
    "falcon": {"ffn_hidden_size": 64, "new_decoder_architecture": True, "num_kv_heads": 2, "bias": True},
    "bloom": {},
    "phi": dict(**_KV, qk_layernorm=True),
    "nanochat": _KV,
    "codegen": {"n_inner": 64, "rotary_dim": 8},
    "gptj": {"n_inner": 64, "rotary_dim": 8},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "biogpt": _WIDE,
}


def tiny(model_type: str, dtype: torch.dtype = torch.float32, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A tiny random causal LM in eval mode, the same for the same arguments; the global random state stays as it is."""
    config = AutoConfig.for_model(model_type, **{**_COMMON, **_SETTINGS.get(model_type, _GATED), **overrides})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        _randomise(model)
    model.generation_config.do_sample = False
    return model.to(dtype).eval()


@torch.no_grad()
def _randomise(model: nn.Module) -> None:
    """Weights at unit gain; norms, biases and the like around their initial values."""
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            noise = torch.randn(parameter.shape)
            if parameter.dim() < 2 or "Norm" in type(module).__name__:
                parameter.add_(0.3 * noise)
            elif isinstance(module, nn.Embedding):
                parameter.copy_(noise)
            else:
                fan_in = parameter.shape[0] if type(module).__name__ == "Conv1D" else parameter[0].numel()
                parameter.copy_(noise * 1.5 * fan_in**-0.5)


DENSE_MODELS: dict[str, Callable[..., PreTrainedModel]] = {name: partial(tiny, name) for name in _SETTINGS}
