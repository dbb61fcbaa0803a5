"""Vision-language models: the language tower alone is pruned. Each class is a row of a table: where that tower is.

What a layer of the tower looks like says the adapter of the text model in it: a fixed one where the architecture brings its
own, else whichever serves the tower's model type, so that LLaVA over Mistral is served as Mistral is.
"""

from __future__ import annotations

from .base import RefusedAdapter
from .dense import FusedGateUpAdapter, LlamaAdapter
from .moe import AriaTextAdapter, DeepseekV3Adapter, Gemma4TextAdapter, Qwen2MoeAdapter, Qwen3MoeAdapter
from .registry import register_adapter
from .tower import IMAGE_AND_VIDEO, VisionLanguageAdapter

__all__ = [
    "AriaAdapter",
    "ChameleonAdapter",
    "Emu3Adapter",
    "ErnieVLMoeAdapter",
    "Gemma4Adapter",
    "Glm4vAdapter",
    "Glm4vMoeAdapter",
    "IdeficsAdapter",
    "InnerGenerateAdapter",
    "KosmosAdapter",
    "LlavaAdapter",
    "LlavaVideoAdapter",
    "MllamaAdapter",
    "PaddleOCRVLAdapter",
    "Phi4MultimodalAdapter",
    "Qwen2VLAdapter",
    "Qwen3VLAdapter",
    "Qwen3VLMoeAdapter",
    "Qwen35MoeAdapter",
    "SmolVLMAdapter",
    "VisionLanguageAdapter",
]

# whatever text model is in it ---------------------------------------------------------------------------------------


@register_adapter(
    "llava",
    "aya_vision",
    "cohere2_vision",
    "deepseek_vl",
    "deepseek_vl_hybrid",
    "fast_vlm",
    "fuyu",
    "gemma3",
    "got_ocr2",
    "internvl",
    "janus",
    "lfm2_vl",
    "lighton_ocr",
    "llava_next",
    "mistral3",
    "ovis2",
    "paligemma",
    "pp_chart2table",
    "qianfan_ocr",
    "vipllava",
)
class LlavaAdapter(VisionLanguageAdapter):
    """LLaVA and its kin, over any text model: ``model.language_model.layers.N``."""


@register_adapter(
    "llava_onevision",
    "dots3_note",
    "exaone4_5",
    "hyperclovax_vision_v2",
    "kimi_k25",
    "llava_next_video",
    "minimax_m3_vl",
    "video_llama_3",
    "video_llava",
)
class LlavaVideoAdapter(VisionLanguageAdapter):
    """LLaVA-OneVision and others that take videos too, over any text model: ``model.language_model.layers.N``."""

    placeholders = IMAGE_AND_VIDEO


@register_adapter("smolvlm", "idefics2", "idefics3")
class SmolVLMAdapter(VisionLanguageAdapter):
    """SmolVLM, Idefics 2 and 3, over any text model: ``model.text_model.layers.N``."""

    tower = ("model.text_model", "text_model")


# over a text model of their own -------------------------------------------------------------------------------------


@register_adapter("qwen2_vl", "qwen2_5_vl", "qwen2_5_omni_thinker")
class Qwen2VLAdapter(VisionLanguageAdapter):
    """Qwen2-VL and Qwen2.5-VL: ``model.language_model.layers.N.mlp.{gate_proj, up_proj, down_proj}``."""

    text = LlamaAdapter
    placeholders = IMAGE_AND_VIDEO


@register_adapter("qwen3_vl", "cosmos3_omni", "qwen3_5")
class Qwen3VLAdapter(VisionLanguageAdapter):
    """Qwen3-VL and Qwen3.5: ``model.language_model.layers.N.mlp.{gate_proj, up_proj, down_proj}``."""

    text = LlamaAdapter
    placeholders = IMAGE_AND_VIDEO


@register_adapter("qwen3_vl_moe", "qwen3_omni_moe_thinker")
class Qwen3VLMoeAdapter(VisionLanguageAdapter):
    """Qwen3-VL-MoE: ``model.language_model.layers.N.mlp.experts``, or a dense ``mlp``."""

    text = Qwen3MoeAdapter
    placeholders = IMAGE_AND_VIDEO


@register_adapter("qwen3_5_moe", "qwen4_exp")
class Qwen35MoeAdapter(VisionLanguageAdapter):
    """Qwen3.5-MoE: ``model.language_model.layers.N.mlp.{experts, shared_expert}``."""

    text = Qwen2MoeAdapter
    placeholders = IMAGE_AND_VIDEO


@register_adapter("glm4v", "glm46v", "glm_ocr", "glmga")
class Glm4vAdapter(VisionLanguageAdapter):
    """GLM-4.1V to 4.6V: ``model.language_model.layers.N.mlp.{gate_up_proj, down_proj}``, gate rows first.

    Frames of a video stand under the image's id; only ``mm_token_type_ids`` tells them apart.
    """

    text = FusedGateUpAdapter


@register_adapter("glm4v_moe")
class Glm4vMoeAdapter(VisionLanguageAdapter):
    """GLM-4.5V: ``model.language_model.layers.N.mlp.{experts, shared_experts}``, or a dense ``mlp``; ids as GLM-4.1V's."""

    text = DeepseekV3Adapter


@register_adapter("gemma4")
class Gemma4Adapter(VisionLanguageAdapter):
    """Gemma 4: ``model.language_model.layers.N.mlp`` and, in mixtures of experts, ``layers.N.experts`` beside it."""

    text = Gemma4TextAdapter
    placeholders = IMAGE_AND_VIDEO


@register_adapter("paddleocr_vl")
class PaddleOCRVLAdapter(VisionLanguageAdapter):
    """PaddleOCR-VL: ``model.language_model.layers.N.mlp.{gate_proj, up_proj, down_proj}``."""

    text = LlamaAdapter


@register_adapter("mllama")
class MllamaAdapter(VisionLanguageAdapter):
    """Llama 3.2 Vision: ``model.language_model.layers.N.mlp``, in cross-attention layers too.

    Images are looked at by cross-attention, so that no position of the prompt holds one.
    """

    text = LlamaAdapter
    placeholders = {}


@register_adapter("aria")
class AriaAdapter(VisionLanguageAdapter):
    """Aria: ``model.language_model.layers.N.mlp.{experts, shared_experts}``, experts stored ``[in, out]``."""

    text = AriaTextAdapter


@register_adapter("phi4_multimodal")
class Phi4MultimodalAdapter(VisionLanguageAdapter):
    """Phi-4 multimodal: ``model.layers.N.mlp.{gate_up_proj, down_proj}``; its towers are in ``model.embed_tokens_extend``."""

    tower = ("model.layers", "layers")
    text = FusedGateUpAdapter
    placeholders = {"image": ("vision_config.image_token_id",)}


@register_adapter("chameleon")
class ChameleonAdapter(VisionLanguageAdapter):
    """Chameleon: ``model.layers.N.mlp.{gate_proj, up_proj, down_proj}``; its image tokenizer is ``model.vqmodel``."""

    tower = ("model.layers", "layers")
    text = LlamaAdapter
    placeholders = {"image": ("vocabulary_map.<image>",)}


@register_adapter("emu3")
class Emu3Adapter(VisionLanguageAdapter):
    """Emu3: ``model.text_model.layers.N.mlp.{gate_proj, up_proj, down_proj}``; its image tokenizer is ``model.vqmodel``."""

    tower = ("model.text_model", "text_model")
    text = LlamaAdapter
    placeholders = {"image": ("vocabulary_map.<image>",)}


# refused ------------------------------------------------------------------------------------------------------------


@register_adapter("ernie4_5_vl_moe", "ernie4_5_vl_moe_text")
class ErnieVLMoeAdapter(RefusedAdapter):
    """ERNIE 4.5 VL is refused: ``layers.N.mlp.{text_moe, vision_moe}`` are called on subsets of the positions."""

    kind = "vlm"
    reason = (
        "its experts are called on the text positions and on the image positions apart, cut out of the batch by a mask, so "
        "which position an activation belongs to is lost"
    )


@register_adapter("blip-2", "instructblip", "instructblipvideo")
class InnerGenerateAdapter(RefusedAdapter):
    """BLIP-2 and InstructBLIP are refused: their ``generate`` calls that of ``language_model``."""

    kind = "vlm"
    reason = (
        "its generate calls that of the language model in it, past the forward of the whole. Prune model.language_model and "
        "call generate of the whole as before"
    )


@register_adapter("kosmos-2", "kosmos-2.5")
class KosmosAdapter(RefusedAdapter):
    """Kosmos-2 is refused: ``layers.N.ffn.ffn_layernorm`` is a norm over all channels."""

    kind = "vlm"
    reason = (
        "its FFNs have a norm over all channels in front of the down projection, so leaving channels out would change "
        "the ones that stay"
    )


@register_adapter("idefics")
class IdeficsAdapter(RefusedAdapter):
    """Idefics 1 is refused: its FFNs are in two lists of layers, ``model.layers`` and ``model.gated_cross_attn_layers``."""

    kind = "vlm"
    reason = (
        "the FFNs of its gated cross-attention layers are in a list of layers of their own, and would stay unpruned"
    )
