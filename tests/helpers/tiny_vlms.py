"""Tiny random vision-language models, one for each registered type, and inputs for them made without processors.

``tiny_vlm("qwen2_vl")`` is the same model for a seed; ``image_inputs("qwen2_vl", model, images=[2, 0])`` is a left-padded
batch of a row with two images and one of plain text, ready for the model and its ``generate``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

from helpers.tiny_models import randomise
from helpers.vlm_images import (
    IMAGE,
    MARKS,
    VIDEO,
    Encode,
    assemble,
    by_row,
    crops,
    crossed,
    fixed,
    grid,
    merged_grid,
    packed,
    positioned,
    sized,
    tiles,
)
from pop_mm.adapters import adapter_for

VOCAB = 128


class Vlm(NamedTuple):
    """How to build a model type, and inputs for it."""

    text: dict[str, Any]
    vision: dict[str, Any]
    own: dict[str, Any]  # of the config of the whole
    encode: Encode
    kinds: str = ""  # name of the input that says which positions are images


# language towers: hidden 32, FFN 64; 4 experts of 24 channels, 2 for a token -----------------------------------------

_TEXT: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,  # generation always runs its full length
}
_LLAMA = {"model_type": "llama"}
_QWEN2 = {"model_type": "qwen2"}
_QWEN3 = {"model_type": "qwen3"}
_MISTRAL = {"model_type": "mistral"}
_SLIDING = {"sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"]}
_COHERE2 = {"model_type": "cohere2", "logit_scale": 1.0, **_SLIDING}
_ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1], "partial_rotary_factor": 1.0}
_MROPE = {"rope_parameters": _ROPE}
_GLM4V = {"model_type": "glm4v_text", **_MROPE}
_EXPERTS = {"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2}
_ROUTED = {"moe_intermediate_size": 24, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 2}
_DENSE_FIRST = {**_ROUTED, "first_k_dense_replace": 1}
_DELTA = dict(
    linear_key_head_dim=8,
    linear_value_head_dim=8,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    layer_types=["linear_attention", "full_attention"],
)
_SHARED = {**_MROPE, **_DELTA, **_EXPERTS, "shared_expert_intermediate_size": 40}
_LATENTS = dict(
    q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8, num_key_value_heads=4
)
_DOTS = dict(
    **_ROUTED,
    **_LATENTS,
    model_type="dots3_note_text",
    index_head_dim=8,
    index_n_heads=2,
    index_topk=8,
    shared_experts_intermediate_size=20,
    mlp_layer_types=["dense", "sparse"],
    layer_types=["full_attention"] * 2,
)
_MINIMAX = dict(
    model_type="minimax_m3_vl_text",
    num_local_experts=4,
    num_experts_per_tok=2,
    intermediate_size=24,
    dense_intermediate_size=48,
    shared_intermediate_size=40,
    rotary_dim=4,
    mlp_layer_types=["dense", "sparse"],
    index_n_heads=2,
    index_head_dim=8,
)
_QWEN4 = dict(
    **_SHARED,
    hc_lowrank=8,
    indexer_n_heads=2,
    indexer_kv_heads=1,
    indexer_head_dim=8,
    indexer_budget=8,
    indexer_compress_ratio=2,
)

# vision towers: hidden 16, images of 16 x 16 pixels in patches of 8 or 4 ---------------------------------------------

_VIT = dict(
    hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8
)
_FINE = {**_VIT, "patch_size": 4}
_PAIRS = {**_FINE, "image_size": [16, 16], "patch_size": [4, 4]}
_CLIP = {**_VIT, "model_type": "clip_vision_model"}
_SIGLIP = {**_VIT, "model_type": "siglip_vision_model", "vision_use_head": False}
_FINE_SIGLIP = {**_SIGLIP, "patch_size": 4}
_SAM = {**_FINE, "image_size": 32, "output_channels": 8, "mlp_dim": 32, "global_attn_indexes": [1], "window_size": 4}
_PIXTRAL = {**_FINE, "model_type": "pixtral", "image_size": 64, "head_dim": 8}
_GRID = dict(depth=2, hidden_size=16, intermediate_size=32, num_heads=2, patch_size=4, out_hidden_size=32)
_WINDOWS = {**_GRID, "fullatt_block_indexes": [1], "window_size": 16}  # gated FFNs, named as the language tower's
_PLACES = {**_GRID, "num_position_embeddings": 64}
_DEEP = {**_PLACES, "deepstack_visual_indexes": [0]}
_GLM = {**_GRID, "image_size": 16}
_GLM4V_VISION = {**_GLM, "model_type": "glm4v_vision"}
_RESNET = dict(
    model_type="resnet", hidden_size=16, embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic"
)
_MLLAMA = {
    **_VIT,
    "attention_heads": 2,
    "num_global_layers": 1,
    "max_num_tiles": 2,
    "intermediate_layers_indices": [0],
    "vision_output_dim": 32,
    "supported_aspect_ratios": [[1, 1], [1, 2]],
}
_KIMI = {**_FINE, "pos_emb_height": 8, "pos_emb_width": 8, "pos_emb_time": 2}
_DOTS_VISION = dict(
    **_FINE, moe_intermediate_size=16, mlp_layer_types=["dense"] * 2, adapter_in_dim=16, adapter_out_dim=32
)
_VQ = dict(base_channels=32, channel_multiplier=[1, 1, 1], num_res_blocks=1, latent_channels=8)

# configs of the whole ------------------------------------------------------------------------------------------------

_ID = {"image_token_id": IMAGE}
_INDEX = {"image_token_index": IMAGE}
_IDS = {**_ID, "video_token_id": VIDEO}
_INDICES = {**_INDEX, "video_token_index": VIDEO}
_QWEN = {**_IDS, "vision_start_token_id": MARKS[0], "vision_end_token_id": MARKS[1]}
_LAST = {"vision_feature_layer": -1}
_PINPOINTS = {**_LAST, "image_grid_pinpoints": [[16, 32], [32, 16], [32, 32]]}
_AUDIO = dict(
    d_model=16, encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=16, num_mel_bins=8, output_dim=32
)
_OMNI = {**_QWEN, "audio_token_id": MARKS[2], "audio_config": {**_AUDIO, "downsample_hidden_size": 8}}
_DOTS_AUDIO = dict(
    hidden_size=16,
    intermediate_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=2,
    head_dim=8,
    downsample_hidden_size=8,
    adapter_input_size=16,
    adapter_out_dim=32,
    conv_output_size=8,
)
_PHI_AUDIO = dict(
    hidden_size=16,
    intermediate_size=16,
    num_blocks=1,
    num_attention_heads=2,
    ext_pw_out_channel=16,
    depthwise_separable_out_channel=16,
    nemo_conv_channels=16,
    audio_token_id=MARKS[2],
    input_size=16,
)
_PERCEIVER = dict(
    hidden_size=32,
    resampler_n_latents=3,
    resampler_depth=1,
    resampler_n_heads=2,
    resampler_head_dim=8,
    num_key_value_heads=1,
)
_JANUS_VQ = dict(embed_dim=8, num_embeddings=16, num_patches=4, projection_dim=32, image_token_embed_dim=32, **_VQ)
_LETTERS = "ABCDEFGHIJ"  # Chameleon writes the digits of an image token so
_CHAMELEON = {
    "vocabulary_map": {
        "<image>": IMAGE,
        **{f"IMGIMG{_LETTERS[k // 10]}{_LETTERS[k % 10]}Z": 3 + k for k in range(16)},
    },
    "vq_config": dict(embed_dim=8, num_embeddings=16, resolution=16, **_VQ),
}
_EMU3 = {
    "vocabulary_map": {
        "<image>": IMAGE,
        "<|extra_200|>": 99,
        **{f"<|visual token {k:06d}|>": 3 + k for k in range(16)},
    },
    "vq_config": dict(codebook_size=16, embed_dim=4, hidden_size=32, attn_resolutions=[], **_VQ),
}
_GEMMA4 = {**_IDS, "boi_token_id": MARKS[0], "eoi_token_id": MARKS[1], "audio_token_id": MARKS[2]}

_KINDS = "mm_token_type_ids"

VLMS: dict[str, Vlm] = {
    # a grid of patches for each image
    "qwen2_vl": Vlm(_MROPE, {**_GRID, "embed_dim": 16, "hidden_size": 32}, _QWEN, grid(), _KINDS),
    "qwen2_5_vl": Vlm(_MROPE, _WINDOWS, _QWEN, grid(), _KINDS),
    "qwen3_vl": Vlm(_MROPE, _DEEP, _QWEN, grid(), _KINDS),
    "qwen3_vl_moe": Vlm({**_MROPE, **_EXPERTS}, _DEEP, _QWEN, grid(), _KINDS),
    "qwen3_5": Vlm({**_MROPE, **_DELTA}, _PLACES, _QWEN, grid(), _KINDS),
    "qwen3_5_moe": Vlm(_SHARED, _PLACES, _QWEN, grid(), _KINDS),
    "qwen4_exp": Vlm(_QWEN4, _PLACES, _QWEN, grid(), _KINDS),
    "cosmos3_omni": Vlm(_MROPE, _DEEP, _QWEN, grid(), _KINDS),
    "qwen2_5_omni_thinker": Vlm(_MROPE, _WINDOWS, _OMNI, grid()),
    "qwen3_omni_moe_thinker": Vlm({**_MROPE, **_EXPERTS}, _DEEP, _OMNI, grid()),
    "glm4v": Vlm(_MROPE, _GLM, _QWEN, grid(), _KINDS),
    "glm46v": Vlm(_GLM4V, _GLM4V_VISION, _QWEN, grid(), _KINDS),
    "glmga": Vlm(_GLM4V, _GLM4V_VISION, _QWEN, grid(), _KINDS),
    "glm_ocr": Vlm(_MROPE, _GLM, _QWEN, grid(), _KINDS),
    "glm4v_moe": Vlm({**_MROPE, **_DENSE_FIRST}, _GLM, _QWEN, grid(), _KINDS),
    "exaone4_5": Vlm({"model_type": "exaone4", **_SLIDING}, {**_WINDOWS, "num_key_value_heads": 2}, _IDS, grid()),
    "hyperclovax_vision_v2": Vlm({"model_type": "hyperclovax"}, _WINDOWS, _IDS, grid()),
    "minimax_m3_vl": Vlm(
        _MINIMAX,
        {**_FINE, "image_size": 64},
        {**_INDICES, "projector_hidden_size": 32, "merged_hidden_size": 128},
        grid(),
    ),
    "dots3_note": Vlm(
        _DOTS, _DOTS_VISION, {**_IDS, "audio_token_id": MARKS[2], "audio_config": _DOTS_AUDIO}, grid(temporal=1)
    ),
    "kimi_k25": Vlm(
        {"model_type": "deepseek_v3", "n_group": 1, "topk_group": 1, **_DENSE_FIRST, **_LATENTS},
        _KIMI,
        {**_QWEN, "projection_hidden_size": 16},
        grid(temporal=1, flat=False),
    ),
    "paddleocr_vl": Vlm(_MROPE, _FINE, _QWEN, grid(temporal=1, flat=False), _KINDS),
    "video_llama_3": Vlm(_QWEN2, {**_FINE, "model_type": "video_llama_3_vision"}, _IDS, merged_grid),
    # images of one size
    "llava": Vlm(_LLAMA, _CLIP, {**_INDEX, **_LAST}, fixed(4)),
    "vipllava": Vlm(_LLAMA, _CLIP, {**_INDEX, "vision_feature_layer": [-1, -2]}, fixed(4)),
    "video_llava": Vlm(_LLAMA, _CLIP, {**_INDICES, **_LAST}, fixed(4, name="pixel_values_images")),
    "internvl": Vlm(_QWEN2, _PAIRS, _ID, fixed(4)),
    "qianfan_ocr": Vlm(_QWEN3, _PAIRS, _ID, fixed(4)),
    "gemma3": Vlm(
        {**_SLIDING, "query_pre_attn_scalar": 8},
        _FINE_SIGLIP,
        {**_INDEX, "mm_tokens_per_image": 4},
        fixed(4),
        "token_type_ids",
    ),
    "paligemma": Vlm(
        {"model_type": "gemma"},
        {**_SIGLIP, "projection_dim": 32},
        {**_INDEX, "projection_dim": 32},
        fixed(4),
        "token_type_ids",
    ),
    "aria": Vlm(
        {"moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 2, "intermediate_size": 24},
        {**_VIT, "model_type": "idefics3_vision"},
        {**_INDEX, "projector_patch_to_query_dict": {4: 3}},
        fixed(3),
    ),
    "cohere2_vision": Vlm(_COHERE2, _FINE_SIGLIP, {**_ID, "alignment_intermediate_size": 32}, fixed(4)),
    "aya_vision": Vlm(_COHERE2, _FINE_SIGLIP, _INDEX, fixed(4)),
    "got_ocr2": Vlm(_QWEN2, _SAM, _INDEX, fixed(4, (3, 32, 32))),
    "pp_chart2table": Vlm(_QWEN2, _SAM, _INDEX, fixed(4, (3, 32, 32))),
    "deepseek_vl": Vlm(_LLAMA, _SIGLIP, _ID, fixed(4)),
    "deepseek_vl_hybrid": Vlm(
        _LLAMA,
        _SIGLIP,
        {**_ID, "high_res_vision_config": {**_SAM, "model_type": "sam_vision_model"}},
        fixed(4, high_res_pixel_values=(3, 32, 32)),
    ),
    "janus": Vlm(
        _LLAMA, {**_VIT, "projection_dim": 32, "num_image_tokens": 4}, {**_ID, "vq_config": _JANUS_VQ}, fixed(4)
    ),
    "ovis2": Vlm(
        _QWEN2,
        {**_VIT, "vocab_size": 32, "hidden_stride": 1},
        {**_ID, "visual_indicator_token_ids": MARKS, "hidden_size": 32, "vocab_size": VOCAB},
        fixed(4),
    ),
    "fast_vlm": Vlm(_QWEN2, _RESNET, _INDEX, fixed(4)),
    "fuyu": Vlm({"model_type": "persimmon", "hidden_act": "gelu"}, {}, {**_ID, "patch_size": 4}, fixed(4, (4, 48))),
    "chameleon": Vlm(_TEXT, {}, _CHAMELEON, fixed(16)),
    # several sizes
    "emu3": Vlm({}, {}, _EMU3, sized(20, 28)),
    "mistral3": Vlm(_MISTRAL, _PIXTRAL, _INDEX, sized(4, 6)),
    "lighton_ocr": Vlm(_QWEN3, _PIXTRAL, _ID, sized(4, 6)),
    "llava_next": Vlm(_LLAMA, _CLIP, {**_INDEX, **_PINPOINTS}, tiles()),
    "llava_next_video": Vlm(_LLAMA, _CLIP, {**_INDICES, **_PINPOINTS}, tiles()),
    "llava_onevision": Vlm(_QWEN2, _SIGLIP, {**_INDICES, **_PINPOINTS}, tiles(full=True)),
    "idefics2": Vlm(_MISTRAL, _FINE, {**_ID, "perceiver_config": _PERCEIVER}, by_row(3)),
    "idefics3": Vlm(_LLAMA, _FINE, _ID, by_row(4)),
    "smolvlm": Vlm(_LLAMA, _FINE, _ID, by_row(4)),
    "lfm2_vl": Vlm(
        {"model_type": "lfm2", "block_auto_adjust_ff_dim": False, "layer_types": ["conv", "full_attention"]},
        {**_FINE, "num_patches": 64, "vision_use_head": False},
        {**_ID, "projector_hidden_size": 32},
        packed,
    ),
    "gemma4": Vlm(
        {**_SLIDING, "hidden_size_per_layer_input": 0, "global_head_dim": 8},
        dict(**_FINE, num_key_value_heads=2, head_dim=8, position_embedding_size=16, pooling_kernel_size=2),
        _GEMMA4,
        positioned,
        _KINDS,
    ),
    "phi4_multimodal": Vlm(
        _TEXT,
        {**_FINE, "crop_size": 16, "image_token_id": IMAGE, "feature_layer": -2},
        {"audio_config": _PHI_AUDIO},
        crops,
    ),
    "mllama": Vlm(
        {"num_hidden_layers": 3, "cross_attention_layers": [1]}, _MLLAMA, {"image_token_index": VOCAB}, crossed
    ),
}


def tiny_vlm(
    model_type: str,
    /,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    experts_implementation: str | None = None,
    **text: Any,
) -> PreTrainedModel:
    """A tiny random model in eval mode, the same for the same arguments; ``text`` changes the language tower's config.

    Experts run as in :func:`tiny_models.tiny`.
    """
    spec = VLMS[model_type]
    settings = {"vision_config": spec.vision} if spec.vision else {}
    settings |= {"tie_word_embeddings": False, **spec.own}
    if spec.text is _TEXT:  # the config of the whole is that of the language tower
        settings |= {**_TEXT, **text}
    else:
        settings["text_config"] = {**_TEXT, **spec.text, **text}
    config = AutoConfig.for_model(model_type, **settings)
    if experts_implementation is None and dtype == torch.float64:
        experts_implementation = "eager"
    experts = {"experts_implementation": experts_implementation} if experts_implementation else {}
    auto = AutoModelForCausalLM if model_type == "phi4_multimodal" else AutoModelForImageTextToText
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = auto.from_config(config, **experts)
        randomise(model)
    model.generation_config.do_sample = False
    return model.to(dtype).eval()


def image_inputs(
    model_type: str,
    model: PreTrainedModel,
    images: int | Sequence[int] = 1,
    text_len: int | Sequence[int] = 8,
    batch: int = 1,
    seed: int = 0,
) -> dict[str, Any]:
    """Inputs of a batch, padded on the left.

    Parameters
    ----------
    images, text_len : int or sequence of int
        Images and words of each row (or of ``batch`` rows); words stand before, between and behind the images. Images take
        turns in size where the architecture has several.
    """
    spec = VLMS[model_type]
    batch = next((len(value) for value in (images, text_len) if isinstance(value, Sequence)), batch)
    counts = [images] * batch if isinstance(images, int) else images
    lengths = [text_len] * batch if isinstance(text_len, int) else text_len
    inputs = assemble(model.config, spec.encode, counts, lengths, seed)
    if spec.kinds:
        inputs[spec.kinds] = (inputs["input_ids"] == IMAGE).long()
    floats = {name: value.to(model.dtype) for name, value in inputs.items() if value.is_floating_point()}
    return {**inputs, **floats}


def video_inputs(model_type: str, model: PreTrainedModel, **settings: Any) -> dict[str, Any]:
    """As :func:`image_inputs`, every image being a video of a frame or two: for types that take a grid of patches."""
    inputs = image_inputs(model_type, model, **settings)
    names = {"pixel_values": "pixel_values_videos", "image_grid_thw": "video_grid_thw"}
    inputs = {names.get(name, name): value for name, value in inputs.items()}
    video = adapter_for(model).modality_token_ids(model).get("video", IMAGE)
    inputs["input_ids"] = inputs["input_ids"].masked_fill(inputs["input_ids"] == IMAGE, video)
    if _KINDS in inputs:
        inputs[_KINDS] = inputs[_KINDS] * 2
    return inputs


VLM_MODELS: dict[str, Callable[..., PreTrainedModel]] = {name: partial(tiny_vlm, name) for name in VLMS}
