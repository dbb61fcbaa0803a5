"""The configurations: real Qwen3-VL and Qwen2.5-VL classes, with sizes that a CPU trains in an hour."""

from __future__ import annotations

from typing import Any

from scenes import SIDE
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

FAMILIES = ("qwen3_vl", "qwen2_5_vl")
PATCH = 8  # pixels
MERGE = 2  # patches, in each direction, that become one token of the language model
IMAGE_TOKENS = (SIDE // PATCH // MERGE) ** 2


def build_model(tokenizer: PreTrainedTokenizerBase, family: str = "qwen3_vl") -> PreTrainedModel:
    """Return an untrained model of fewer than 4 million parameters, made for this tokenizer.

    Raises
    ------
    ValueError
        Unknown family.
    """
    if family not in FAMILIES:
        raise ValueError(f"family must be one of {', '.join(FAMILIES)}; got {family!r}.")
    names = {"image": "<|image_pad|>", "video": "<|video_pad|>"}
    names |= {"vision_start": "<|vision_start|>", "vision_end": "<|vision_end|>"}
    shared: dict[str, Any] = {f"{key}_token_id": tokenizer.convert_tokens_to_ids(name) for key, name in names.items()}
    shared |= {"tie_word_embeddings": True, "eos_token_id": tokenizer.eos_token_id}
    shared |= {"pad_token_id": tokenizer.pad_token_id}
    text: dict[str, Any] = {
        "vocab_size": -(-len(tokenizer) // 64) * 64,
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 2048,
        "initializer_range": 0.05,  # near 1 / sqrt(hidden size); the default, 0.02, is made for far wider models
        "tie_word_embeddings": True,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [6, 5, 5]}
    vision: dict[str, Any] = {"depth": 4, "num_heads": 3, "patch_size": PATCH, "spatial_merge_size": MERGE}
    vision |= {
        "hidden_size": 96,
        "temporal_patch_size": 2,
        "initializer_range": 0.05,
        "out_hidden_size": text["hidden_size"],
    }
    if family == "qwen3_vl":
        text |= {"head_dim": 32, "rope_parameters": rope | {"mrope_interleaved": True}}
        vision |= {"intermediate_size": 288, "deepstack_visual_indexes": [1]}
        vision |= {"num_position_embeddings": (SIDE // PATCH) ** 2}
        return Qwen3VLForConditionalGeneration(Qwen3VLConfig(text_config=text, vision_config=vision, **shared))
    text |= {"rope_parameters": rope}
    vision |= {"intermediate_size": 288, "window_size": SIDE, "fullatt_block_indexes": [0, 1, 2, 3]}
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision, **shared))


def generation_config(tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
    """Greedy, ends at ``<|im_end|>``."""
    return GenerationConfig(
        do_sample=False, max_new_tokens=64, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )


def build_image_processor() -> Qwen2VLImageProcessorPil:
    """Qwen's own image processor; pictures of any size are brought to about ``SIDE`` x ``SIDE`` pixels."""
    return Qwen2VLImageProcessorPil(
        patch_size=PATCH,
        merge_size=MERGE,
        temporal_patch_size=2,
        size={"shortest_edge": SIDE * SIDE, "longest_edge": SIDE * SIDE},
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )
