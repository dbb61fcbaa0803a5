"""Tiny random causal language models, one for each model type: a few milliseconds to build, the same for a seed.

Every parameter is random, biases and norms too, so that a forgotten bias shows; the FFNs weigh enough in the logits
that a wrong channel shows, and routers send tokens to all experts. ``tiny("llama", num_hidden_layers=3)`` changes the
config.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import transformers
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

# What each dense model type needs beyond _COMMON.
_DENSE: dict[str, dict[str, Any]] = {
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
    "doge": dict(**_GATED, mlp_bias=True),
}

# Mixtures of experts: 4 experts of 24 channels, 2 for a token; dense FFNs of 48, shared experts of 40 or 48 channels.
_THREE = {"num_hidden_layers": 3}
_HEADS = {"num_key_value_heads": 2, "head_dim": 8}
_WINDOW = {"sliding_window": 64}
_MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
_LINEAR = ["linear_attention", "full_attention", "linear_attention"]
_DELTA = dict(linear_key_head_dim=8, linear_value_head_dim=8, linear_num_key_heads=2, linear_num_value_heads=4)
_LATENT = dict(kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8, num_key_value_heads=4)
_LATENTS = dict(**_LATENT, q_lora_rank=16)
_INDEXED = dict(**_LATENTS, index_head_dim=8, index_n_heads=2, index_topk=8)
_SMALL = {"moe_intermediate_size": 24}
_FIRST = dict(**_THREE, **_SMALL, intermediate_size=48, first_k_dense_replace=1)
_LISTED = dict(**_THREE, **_SMALL, intermediate_size=48, mlp_layer_types=["dense", "sparse", "sparse"])
_ONLY = dict(**_THREE, **_SMALL, intermediate_size=48, mlp_only_layers=[0])
_ONE_GROUP = {"n_group": 1, "topk_group": 1}


def _experts(name: str = "num_experts", **shared: int) -> dict[str, int]:
    """4 experts under the name that the config has for their number, and settings of the shared ones."""
    return {name: 4, "num_experts_per_tok": 2, **shared}


_LOCAL = dict(**_experts("num_local_experts"), intermediate_size=24)
_ROUTED = _experts("n_routed_experts", n_shared_experts=2)
_SHARED = _experts(shared_expert_intermediate_size=40)
_GRANITE = dict(**_LOCAL, num_key_value_heads=2, shared_intermediate_size=40)

_MOE: dict[str, dict[str, Any]] = {
    # experts only
    "mixtral": dict(**_HEADS, **_LOCAL),
    "minimax": dict(**_HEADS, **_LOCAL, layer_types=_LINEAR[:2], block_size=16),
    "minimax_m2": dict(**_HEADS, **_LOCAL),
    "phimoe": dict(**_LOCAL, num_key_value_heads=2, attention_bias=True),
    "olmoe": dict(**_experts(), intermediate_size=24, num_key_value_heads=2),
    "flex_olmo": dict(**_experts(), intermediate_size=24, num_key_value_heads=2),
    "gpt_oss": dict(**_HEADS, **_WINDOW, **_LOCAL),
    # experts or dense
    "qwen3_moe": dict(**_HEADS, **_ONLY, **_experts()),
    "mellum": dict(**_HEADS, **_WINDOW, **_LISTED, **_experts(), layer_types=_MIXED),
    "mimo_v2_flash": dict(
        **_HEADS, **_WINDOW, **_LISTED, **_experts("n_routed_experts"), layer_types=_MIXED, v_head_dim=8
    ),
    "beam": dict(**_HEADS, **_WINDOW, **_LISTED, **_ONE_GROUP, **_experts()),
    "jamba": dict(
        **_experts(),
        **_THREE,
        intermediate_size=24,
        num_key_value_heads=2,
        attn_layer_period=3,
        attn_layer_offset=1,
        mamba_d_state=4,
    ),
    "lfm2_moe": dict(
        **_experts(),
        **_THREE,
        **_SMALL,
        intermediate_size=48,
        num_key_value_heads=2,
        num_dense_layers=1,
        layer_types=["conv", "full_attention", "conv"],
    ),
    # with a shared expert
    "qwen2_moe": dict(**_ONLY, **_SHARED, num_key_value_heads=2),
    "flint": dict(**_HEADS, **_ONLY, **_SHARED),
    "qwen3_next": dict(**_HEADS, **_ONLY, **_SHARED, **_DELTA, layer_types=_LINEAR),
    "qwen3_5_moe_text": dict(**_HEADS, **_SMALL, **_SHARED, **_DELTA, layer_types=_LINEAR[:2]),
    "qwen4_exp_text": dict(
        **_HEADS,
        **_SMALL,
        **_SHARED,
        **_DELTA,
        layer_types=_LINEAR[:2],
        hc_lowrank=8,
        indexer_n_heads=2,
        indexer_kv_heads=1,
        indexer_head_dim=8,
        indexer_budget=8,
        indexer_compress_ratio=2,
    ),
    "granitemoe": dict(**_LOCAL, num_key_value_heads=2),
    "granitemoeshared": _GRANITE,
    "granitemoe_swa": dict(**_GRANITE, **_WINDOW),
    "granitemoehybrid": dict(
        **_GRANITE, layer_types=_LINEAR[:2], mamba_n_heads=4, mamba_d_state=8, mamba_d_head=16, mamba_chunk_size=16
    ),
    "hunyuan_v1_moe": dict(**_HEADS, num_experts=4, moe_topk=2, intermediate_size=24),
    "aria_text": dict(
        moe_num_experts=4, moe_topk=2, moe_num_shared_experts=2, intermediate_size=24, num_key_value_heads=2
    ),
    "gemma4_text": dict(
        **_HEADS,
        **_SMALL,
        **_WINDOW,
        intermediate_size=48,
        num_experts=4,
        top_k_experts=2,
        enable_moe_block=True,
        hidden_size_per_layer_input=0,
        global_head_dim=8,
        layer_types=_LAYER_TYPES,
    ),
    # dense first, then experts with a shared one
    "deepseek_v2": dict(**_LATENTS, **_FIRST, **_ROUTED),
    "deepseek_v3": dict(**_LATENTS, **_FIRST, **_ROUTED, **_ONE_GROUP),
    "deepseek_v32": dict(**_INDEXED, **_LISTED, **_ROUTED, **_ONE_GROUP, head_dim=8),
    "deepseek_v4": dict(
        **_SMALL,
        **_experts("n_routed_experts"),
        head_dim=16,
        q_lora_rank=16,
        o_groups=2,
        o_lora_rank=8,
        index_n_heads=2,
        index_head_dim=8,
        index_topk=4,
        sliding_window=64,
        mlp_layer_types=["hash_moe", "moe"],
        hc_mult=2,
    ),
    "glm4_moe": dict(**_HEADS, **_FIRST, **_ROUTED),
    "glm4_moe_lite": dict(**_LATENTS, **_LISTED, **_ROUTED),
    "glm_moe_dsa": dict(**_INDEXED, **_LISTED, **_ROUTED, head_dim=8),
    "dots1": dict(**_HEADS, **_WINDOW, **_FIRST, **_ROUTED),
    "dots3_note_text": dict(
        **_INDEXED,
        **_LISTED,
        **_ROUTED,
        head_dim=8,
        shared_experts_intermediate_size=20,
        layer_types=["full_attention"] * 3,
    ),
    "mistral4": dict(**_LATENTS, **_FIRST, **_ROUTED),
    "solar_open": dict(**_HEADS, **_SMALL, **_ROUTED),
    "axk1": dict(**_LATENTS, **_LISTED, **_ROUTED, **_ONE_GROUP),
    "axk2": dict(**_INDEXED, **_LISTED, **_ROUTED, head_dim=8, gated_norm_rank=4),
    "kimi_linear": dict(
        **_LATENT,
        **_LISTED,
        **_experts("num_local_experts", n_shared_experts=2),
        layer_types=_LINEAR,
        linear_head_dim=8,
        linear_num_heads=4,
    ),
    "bailing_hybrid": dict(
        **_LATENT,
        **_LISTED,
        **_ONE_GROUP,
        **_experts("num_local_experts", n_shared_experts=2),
        layer_types=_LINEAR,
        head_dim=8,
    ),
    "hy_v3": dict(**_HEADS, **_LISTED, **_experts(num_shared_experts=2)),
    "hy_v4": dict(**_INDEXED, **_LISTED, **_ROUTED, head_dim=16, hc_mult=2),
    "afmoe": dict(
        **_HEADS,
        **_THREE,
        **_SMALL,
        **_WINDOW,
        **_experts(num_shared_experts=2),
        intermediate_size=48,
        num_dense_layers=1,
        layer_types=_MIXED,
    ),
    "exaone_moe": dict(**_HEADS, **_LISTED, **_WINDOW, **_experts(num_shared_experts=2), layer_types=_MIXED),
    "cohere2_moe": dict(
        **_HEADS,
        **_THREE,
        **_WINDOW,
        **_experts(num_shared_experts=2),
        intermediate_size=24,
        prefix_dense_intermediate_size=48,
        mlp_layer_types=["dense", "sparse", "sparse"],
        layer_types=_MIXED,
        logit_scale=1.0,
    ),
    "ernie4_5_moe": dict(
        **_THREE,
        **_SMALL,
        intermediate_size=48,
        num_key_value_heads=2,
        moe_k=2,
        moe_num_experts=4,
        moe_num_shared_experts=2,
        moe_layer_start_index=1,
        use_bias=True,
    ),
    "kolibri1": dict(**_HEADS, **_SMALL, **_WINDOW, **_SHARED),
    "laguna": dict(**_HEADS, **_LISTED, **_WINDOW, **_SHARED, layer_types=_MIXED),
    "minimax_m3_vl_text": dict(
        **_HEADS,
        **_THREE,
        **_LOCAL,
        dense_intermediate_size=48,
        shared_intermediate_size=40,
        rotary_dim=4,
        mlp_layer_types=["dense", "sparse", "sparse"],
        index_n_heads=2,
        index_head_dim=8,
    ),
    "nemotron_h": dict(
        **_HEADS,
        **_SMALL,
        **_experts("n_routed_experts"),
        num_hidden_layers=5,
        layers_block_type=["mamba", "moe", "attention", "mlp", "moe"],
        intermediate_size=48,
        moe_shared_expert_intermediate_size=40,
        mlp_bias=True,
        mamba_num_heads=4,
        mamba_head_dim=8,
        ssm_state_size=8,
        n_groups=2,
        chunk_size=16,
    ),
}
_CLASSES = {"mistral4": "Mistral4ForCausalLM"}  # model types that AutoModelForCausalLM does not know


def tiny(
    model_type: str,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    experts_implementation: str | None = None,
    **overrides: Any,
) -> PreTrainedModel:
    """A tiny random causal LM in eval mode, the same for the same arguments; the global random state stays as it is.

    Experts run on ``experts_implementation``; by default the one of transformers, and "eager" in float64, for which
    "grouped_mm" has no CPU kernel.
    """
    settings = _MOE.get(model_type) or _DENSE.get(model_type, _GATED)
    config = AutoConfig.for_model(model_type, **{**_COMMON, **settings, **overrides})
    if experts_implementation is None and dtype == torch.float64:
        experts_implementation = "eager"
    experts = {"experts_implementation": experts_implementation} if model_type in _MOE else {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if model_type in _CLASSES:
            model = getattr(transformers, _CLASSES[model_type])._from_config(config, **experts)
        else:
            model = AutoModelForCausalLM.from_config(config, **experts)
        randomise(model)
    model.generation_config.do_sample = False
    return model.to(dtype).eval()


@torch.no_grad()
def randomise(model: nn.Module) -> None:
    """Weights at unit gain; norms, biases and the like around their initial values."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            noise = torch.randn(parameter.shape)
            if name in ("expert_bias", "e_score_correction_bias"):
                parameter.add_(0.02 * noise)  # in front of a top-k over probabilities
            elif parameter.dim() < 2 or "Norm" in type(module).__name__:
                parameter.add_(0.3 * noise)
            elif isinstance(module, nn.Embedding):
                parameter.copy_(noise)
            else:
                parameter.copy_(noise * 1.5 * _fan_in(module, parameter) ** -0.5)
        if hasattr(module, "tid2eid"):  # experts by token id
            module.tid2eid.copy_(torch.rand(len(module.tid2eid), 4).topk(module.tid2eid.shape[1])[1])


def _fan_in(module: nn.Module, parameter: nn.Parameter) -> int:
    if type(module).__name__ == "Conv1D":
        return parameter.shape[0]
    if hasattr(module, "is_transposed"):  # experts
        return parameter.shape[1 if module.is_transposed else -1]
    return parameter[0].numel()


DENSE_MODELS: dict[str, Callable[..., PreTrainedModel]] = {name: partial(tiny, name) for name in _DENSE}
MOE_MODELS: dict[str, Callable[..., PreTrainedModel]] = {name: partial(tiny, name) for name in _MOE}
