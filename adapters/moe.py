"""Mixture-of-experts decoders. Each class is a row of a table: where routed experts, shared experts and dense FFNs are.

A path that a layer does not have is skipped, so one row serves a model whose first layers are dense, and models of one
family with and without shared experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import nn

from pop_mm.errors import AdapterError

from .base import Adapter, ExpertPaths, FFNPaths, RefusedAdapter
from .inputs import IN_NAMES, InputPaths
from .registry import register_adapter

__all__ = [
    "AriaTextAdapter",
    "DeepseekV3Adapter",
    "Gemma4TextAdapter",
    "GptOssAdapter",
    "GraniteMoeAdapter",
    "HunYuanMoEAdapter",
    "JambaAdapter",
    "Lfm2MoeAdapter",
    "Llama4Adapter",
    "MiniMaxM3Adapter",
    "MixtralAdapter",
    "NemotronHAdapter",
    "OwnExpertsAdapter",
    "Qwen2MoeAdapter",
    "Qwen3MoeAdapter",
]


class _MoEAdapter(Adapter):
    """What most of them have in common: experts and router at ``layers.N.mlp``."""

    kind = "moe"
    experts: ClassVar[Sequence[ExpertPaths]] = (ExpertPaths(),)
    not_weights: ClassVar[Sequence[str]] = ("mlp.gate", "mlp.router", "mlp.shared_expert_gate")


@register_adapter("mixtral", "olmoe", "phimoe", "flex_olmo", "minimax", "minimax_m2")
class MixtralAdapter(_MoEAdapter):
    """Mixtral and its kin, all layers alike: ``layers.N.mlp.experts``."""


@register_adapter("gpt_oss")
class GptOssAdapter(_MoEAdapter):
    """GPT-OSS: ``layers.N.mlp.experts``, stored ``[in, out]``, gate and up columns taking turns, with biases."""

    experts = (ExpertPaths(layout="experts.{gate_up_proj, down_proj} (3-D, interleaved, transposed, biased)"),)

    def check(self, model: nn.Module) -> None:
        """Refuse kernels of the hub, which replace router and experts by one call past the ExpertsInterface."""
        if getattr(model, "use_kernels", False):
            raise AdapterError(
                "GPT-OSS with use_kernels=True computes router and experts in one kernel, past transformers' "
                "ExpertsInterface. Load the model with use_kernels=False."
            )


@register_adapter("qwen3_moe", "beam", "mellum", "mimo_v2_flash", "qwen3_omni_moe_text", "qwen3_vl_moe_text")
class Qwen3MoeAdapter(_MoEAdapter):
    """Qwen3-MoE and others: ``layers.N.mlp.experts``, or a dense ``layers.N.mlp.{gate_proj, up_proj, down_proj}``."""

    ffns = (FFNPaths(),)


@register_adapter("qwen2_moe", "qwen3_next", "qwen3_5_moe_text", "qwen4_exp_text", "flint")
class Qwen2MoeAdapter(_MoEAdapter):
    """Qwen2-MoE to Qwen3.5-MoE: ``layers.N.mlp.{experts, shared_expert}``, or a dense ``layers.N.mlp``."""

    ffns = (FFNPaths("mlp.shared_expert", role="shared_expert"), FFNPaths())


@register_adapter(
    "deepseek_v3",
    "deepseek_v2",
    "deepseek_v32",
    "deepseek_v4",
    "afmoe",
    "axk1",
    "axk2",
    "bailing_hybrid",
    "cohere2_moe",
    "dots1",
    "dots3_note_text",
    "ernie4_5_moe",
    "exaone_moe",
    "glm4_moe",
    "glm4_moe_lite",
    "glm4v_moe_text",
    "glm_moe_dsa",
    "hy_v3",
    "hy_v4",
    "kimi_linear",
    "kolibri1",
    "laguna",
    "mistral4",
    "solar_open",
)
class DeepseekV3Adapter(_MoEAdapter):
    """DeepSeek, GLM-4-MoE, Kimi and many more: ``layers.N.mlp.{experts, shared_experts}``, or a dense ``layers.N.mlp``."""

    ffns = (FFNPaths("mlp.shared_experts", role="shared_expert"), FFNPaths())
    not_weights = (
        *_MoEAdapter.not_weights,
        "input_layernorm.mlp",
        "post_attention_layernorm.mlp",
    )  # gates of AXK2's norms


@register_adapter("aria_text")
class AriaTextAdapter(_MoEAdapter):
    """Aria's text model: ``layers.N.mlp.{experts, shared_experts}``, experts stored ``[in, out]``."""

    experts = (ExpertPaths(top_k="moe_topk", layout="experts.{gate_up_proj, down_proj} (3-D, transposed)"),)
    ffns = (FFNPaths("mlp.shared_experts", role="shared_expert"),)


@register_adapter("minimax_m3_vl_text")
class MiniMaxM3Adapter(_MoEAdapter):
    """MiniMax-M3's text model: ``layers.N.mlp.{experts, shared_experts}``, or a dense ``layers.N.mlp``; gate and up fused."""

    ffns = (
        FFNPaths("mlp.shared_experts", "gate_up_proj", "gate_up_proj", role="shared_expert"),
        FFNPaths("mlp", "gate_up_proj", "gate_up_proj"),
    )


@register_adapter("hunyuan_v1_moe")
class HunYuanMoEAdapter(_MoEAdapter):
    """Hunyuan-A13B: ``layers.N.mlp.{experts, shared_mlp}``."""

    ffns = (FFNPaths("mlp.shared_mlp", role="shared_expert"),)


@register_adapter("granitemoe", "granitemoeshared", "granitemoehybrid", "granitemoe_swa")
class GraniteMoeAdapter(_MoEAdapter):
    """Granite 3 and 4: ``layers.N.block_sparse_moe.experts`` and ``layers.N.shared_mlp.{input_linear, output_linear}``.

    In Granite 4 models without routed experts (``num_local_experts=0``) ``shared_mlp`` is a dense FFN.
    """

    experts = (ExpertPaths("block_sparse_moe.experts"),)
    ffns = (
        FFNPaths(
            "shared_mlp",
            "input_linear",
            "input_linear",
            "output_linear",
            role="shared_expert",
            activation=("activation",),
        ),
    )
    not_weights = ("block_sparse_moe.router",)


@register_adapter("jamba")
class JambaAdapter(_MoEAdapter):
    """Jamba: ``layers.N.feed_forward.experts``, or a dense ``layers.N.feed_forward.{gate_proj, up_proj, down_proj}``."""

    experts = (ExpertPaths("feed_forward.experts"),)
    ffns = (FFNPaths("feed_forward"),)
    not_weights = ("feed_forward.router",)


@register_adapter("lfm2_moe")
class Lfm2MoeAdapter(_MoEAdapter):
    """LFM2-MoE: ``layers.N.feed_forward.experts``, or a dense ``layers.N.feed_forward.{w1, w3, w2}``, w1 being the gate."""

    experts = (ExpertPaths("feed_forward.experts"),)
    ffns = (FFNPaths("feed_forward", "w1", "w3", "w2"),)
    not_weights = ("feed_forward.gate",)


@register_adapter("nemotron_h")
class NemotronHAdapter(_MoEAdapter):
    """Nemotron-H: ungated ``layers.N.mixer.{experts, shared_experts}``, or a dense ``layers.N.mixer.{up_proj, down_proj}``.

    A layer is one of Mamba, attention, a dense FFN or experts.
    """

    experts = (ExpertPaths("mixer.experts", layout="experts.{up_proj, down_proj} (3-D, ungated)"),)
    ffns = (FFNPaths("mixer.shared_experts", gate="", role="shared_expert"), FFNPaths("mixer", gate=""))
    not_weights = ("mixer.gate",)
    inputs = (InputPaths("attention_in", ("mixer",), IN_NAMES), InputPaths("attention_out", ("mixer",), ("o_proj",)))


@register_adapter("gemma4_text")
class Gemma4TextAdapter(_MoEAdapter):
    """Gemma 4: ``layers.N.mlp`` and, with ``enable_moe_block``, ``layers.N.experts`` beside it: then mlp is their shared one.

    Without that block the model is dense.
    """

    experts = (ExpertPaths("experts", top_k="top_k_experts"),)
    ffns = (FFNPaths(role="shared_expert"),)
    not_weights = ("router",)


@register_adapter("llama4", "llama4_text")
class Llama4Adapter(RefusedAdapter):
    """Llama 4 is refused: ``layers.N.feed_forward.experts`` are not dispatched."""

    kind = "moe"
    reason = (
        "its experts are not dispatched through transformers' ExpertsInterface: every expert runs on every token in one "
        "batched product"
    )


@register_adapter("dbrx", "jetmoe", "longcat_flash")
class OwnExpertsAdapter(RefusedAdapter):
    """DBRX, JetMoE and LongCat-Flash are refused: they compute their experts by code of their own."""

    kind = "moe"
    reason = "its experts are computed by code of its own, not dispatched through transformers' ExpertsInterface"
