"""Dense decoders. Each class is a row of a table: where the gate, up and down projections of a layer are."""

from __future__ import annotations

from torch import nn

from pop_mm.errors import AdapterError

from .base import Adapter, FFNPaths, RefusedAdapter
from .registry import register_adapter

__all__ = [
    "ArceeAdapter",
    "BitNetAdapter",
    "BloomAdapter",
    "DogeAdapter",
    "FalconAdapter",
    "FusedGateUpAdapter",
    "GPT2Adapter",
    "GPTJAdapter",
    "GPTNeoXAdapter",
    "Gemma3nAdapter",
    "Lfm2Adapter",
    "LlamaAdapter",
    "MptAdapter",
    "OPTAdapter",
    "PhiAdapter",
    "Starcoder2Adapter",
]


@register_adapter(
    "llama",
    "mistral",
    "ministral",
    "ministral3",
    "qwen2",
    "qwen3",
    "gemma",
    "gemma2",
    "gemma3_text",
    "olmo",
    "olmo2",
    "olmo3",
    "smollm3",
    "granite",
    "cohere",
    "cohere2",
    "stablelm",
    "cwm",
    "diffllama",
    "ernie4_5",
    "exaone4",
    "granite_swa",
    "helium",
    "hunyuan_v1_dense",
    "hyperclovax",
    "internlm3",
    "iquestcoder",
    "minicpm3",
    "seed_oss",
    "vaultgemma",
    "youtu",
    # language towers
    "emu3_text_model",
    "mllama_text_model",
    "paddleocr_vl_text",
    "qwen2_5_omni_text",
    "qwen2_5_vl_text",
    "qwen2_vl_text",
    "qwen3_5_text",
    "qwen3_vl_text",
)
class LlamaAdapter(Adapter):
    """Llama and its kin: ``layers.N.mlp.{gate_proj, up_proj, down_proj}``."""

    ffns = (FFNPaths(),)


@register_adapter("phi3", "glm", "glm4", "glm4v_text", "glm_ocr_text")
class FusedGateUpAdapter(Adapter):
    """Phi-3 and GLM: gate and up in one matrix, gate rows first: ``layers.N.mlp.{gate_up_proj, down_proj}``."""

    ffns = (FFNPaths(gate="gate_up_proj", up="gate_up_proj"),)


@register_adapter("lfm2")
class Lfm2Adapter(Adapter):
    """LFM2: ``layers.N.feed_forward.{w1, w3, w2}``, w1 being the gate."""

    ffns = (FFNPaths(holder="feed_forward", gate="w1", up="w3", down="w2"),)


@register_adapter("arcee", "apertus", "jais2", "nemotron")
class ArceeAdapter(Adapter):
    """Arcee, Apertus, Jais 2 and Nemotron: ungated ``layers.N.mlp.{up_proj, down_proj}``."""

    ffns = (FFNPaths(gate=""),)


@register_adapter("mpt")
class MptAdapter(Adapter):
    """MPT: ungated ``transformer.blocks.N.ffn.{up_proj, down_proj}``."""

    ffns = (FFNPaths(holder="ffn", gate=""),)


@register_adapter("phi", "nanochat")
class PhiAdapter(Adapter):
    """Phi 1 and 2, NanoChat: ungated ``layers.N.mlp.{fc1, fc2}``."""

    ffns = (FFNPaths(gate="", up="fc1", down="fc2"),)


@register_adapter("gptj", "codegen")
class GPTJAdapter(Adapter):
    """GPT-J and CodeGen: ungated ``transformer.h.N.mlp.{fc_in, fc_out}``."""

    ffns = (FFNPaths(gate="", up="fc_in", down="fc_out"),)


@register_adapter("starcoder2", "gpt_bigcode", "gpt_neo")
class Starcoder2Adapter(Adapter):
    """StarCoder 1 and 2, GPT-Neo: ungated ``layers.N.mlp.{c_fc, c_proj}`` (``transformer.h.N`` in the older ones)."""

    ffns = (FFNPaths(gate="", up="c_fc", down="c_proj"),)


@register_adapter("gpt2")
class GPT2Adapter(Adapter):
    """GPT-2: ungated ``transformer.h.N.mlp.{c_fc, c_proj}``, Conv1D modules that store ``[in, out]``."""

    ffns = (FFNPaths(gate="", up="c_fc", down="c_proj", transposed=True),)


@register_adapter("gpt_neox", "gpt_neox_japanese", "persimmon")
class GPTNeoXAdapter(Adapter):
    """GPT-NeoX, Pythia and Persimmon: ungated ``layers.N.mlp.{dense_h_to_4h, dense_4h_to_h}``."""

    ffns = (FFNPaths(gate="", up="dense_h_to_4h", down="dense_4h_to_h"),)


_FALCON_LINEAR = "transformers.models.falcon.modeling_falcon:FalconLinear"


@register_adapter("falcon")
class FalconAdapter(Adapter):
    """Falcon: ungated ``transformer.h.N.mlp.{dense_h_to_4h, dense_4h_to_h}``, modules of class FalconLinear."""

    ffns = (FFNPaths(gate="", up="dense_h_to_4h", down="dense_4h_to_h", plain_types=(_FALCON_LINEAR,)),)


@register_adapter("bloom")
class BloomAdapter(Adapter):
    """BLOOM: ungated ``transformer.h.N.mlp.{dense_h_to_4h, dense_4h_to_h}``."""

    ffns = (FFNPaths(gate="", up="dense_h_to_4h", down="dense_4h_to_h"),)

    def check(self, model: nn.Module) -> None:
        """Refuse the slow-but-exact mode, which reads slices of the weight instead of calling the projection."""
        config = model.config
        if getattr(config, "slow_but_exact", False) and getattr(config, "pretraining_tp", 1) > 1:
            raise AdapterError(
                "BLOOM with slow_but_exact=True slices the down projection by itself, past every hook. Load the model "
                "with slow_but_exact=False."
            )


@register_adapter("opt", "biogpt")
class OPTAdapter(Adapter):
    """OPT and BioGPT: no MLP module; ungated ``layers.N.{fc1, fc2}`` on the layer itself."""

    ffns = (FFNPaths(holder="", gate="", up="fc1", down="fc2"),)


@register_adapter("doge")
class DogeAdapter(Adapter):
    """Doge: ``layers.N.mlp.{gate_proj, up_proj, down_proj}``; its mixtures of experts are refused."""

    ffns = (FFNPaths(),)

    def check(self, model: nn.Module) -> None:
        """Refuse ``is_moe=True``: its experts are single channels, looked up in embedding tables."""
        if getattr(model.config, "is_moe", False):
            raise AdapterError(
                "pop_mm does not prune Doge with is_moe=True: its experts are single channels that it looks up in "
                "embedding tables, so there is nothing to prune inside an expert."
            )


@register_adapter("gemma3n", "gemma3n_text")
class Gemma3nAdapter(RefusedAdapter):
    """Gemma 3n is refused: ``layers.N.mlp`` cuts the gate at a threshold computed from all gate channels."""

    reason = (
        "its FFNs cut the gate at a threshold computed from the mean and deviation of all gate channels, so leaving "
        "channels out would change the ones that stay"
    )


@register_adapter("bitnet")
class BitNetAdapter(RefusedAdapter):
    """BitNet is refused: ``layers.N.mlp.ffn_sub_norm`` is a norm over all channels."""

    reason = (
        "its FFNs have a norm over all channels in front of the down projection, so leaving channels out would change "
        "the ones that stay"
    )
