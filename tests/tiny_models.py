"""Tiny random causal language models, one for each dense model type: a few milliseconds to build, the same for a seed.

Every parameter is random, biases and norms too, so that a forgotten bias shows; the FFNs weigh enough in the logits that
a wrong channel shows. ``tiny("llama", num_hidden_layers=3)`` changes the config.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCAB = 96

_COMMON: dict[str, Any] = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=128,
    tie_word_embeddings=False,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=None,  # generation always runs its full length
)
_GATED = dict(intermediate_size=64, num_key_value_heads=2, head_dim=8)
_LAYER_TYPES = ["sliding_attention", "full_attention"]
_SLIDING = dict(**_GATED, sliding_window=64, layer_types=_LAYER_TYPES)
_WIDE = dict(intermediate_size=64)

# What each model type needs beyond _COMMON.
_SETTINGS: dict[str, dict[str, Any]] = {
    # gate_proj, up_proj, down_proj
    "llama": dict(**_GATED, mlp_bias=True, attention_bias=True),
    "mistral": _GATED,
    "ministral": _SLIDING,
    "ministral3": _GATED,
    "qwen2": dict(intermediate_size=64, num_key_value_heads=2),
    "qwen3": _GATED,
    "gemma": _GATED,
    "gemma2": dict(**_SLIDING, query_pre_attn_scalar=8),
    "gemma3_text": dict(**_SLIDING, query_pre_attn_scalar=8),
    "olmo": dict(**_WIDE, num_key_value_heads=2),
    "olmo2": dict(**_WIDE, num_key_value_heads=2),
    "olmo3": dict(**_WIDE, num_key_value_heads=2, sliding_window=64, layer_types=_LAYER_TYPES),
    "smollm3": dict(**_WIDE, num_key_value_heads=2, mlp_bias=True),
    "granite": dict(**_WIDE, num_key_value_heads=2, mlp_bias=True),
    "cohere": dict(**_WIDE, num_key_value_heads=2, use_qk_norm=True, logit_scale=1.0),
    "cohere2": dict(**_WIDE, num_key_value_heads=2, sliding_window=64, layer_types=_LAYER_TYPES, logit_scale=1.0),
    "stablelm": dict(**_WIDE, num_key_value_heads=2, use_qkv_bias=True, qk_layernorm=True),
    # gate_up_proj, down_proj
    "phi3": dict(**_WIDE, num_key_value_heads=2),
    "glm": _GATED,
    "glm4": _GATED,
    # ungated
    "starcoder2": dict(**_WIDE, num_key_value_heads=2),
    "falcon": dict(ffn_hidden_size=64, new_decoder_architecture=True, num_kv_heads=2, bias=True),
    "gpt_neox": _WIDE,
    "gpt2": dict(n_inner=64),
    "opt": dict(ffn_dim=64, word_embed_proj_dim=32),
    "bloom": {},
}
