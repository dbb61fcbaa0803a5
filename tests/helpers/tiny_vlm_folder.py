"""A tiny random Qwen3-VL in a folder, with its processor: what a hub or a sample would give, made in milliseconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer

from helpers.tiny_models import randomise
from helpers.tiny_processors import processor_folder

_TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
    "eos_token_id": None,  # generation always runs its full length
}
_VISION = {
    "depth": 2,
    "num_heads": 2,
    "hidden_size": 16,
    "intermediate_size": 32,
    "out_hidden_size": 32,
    "deepstack_visual_indexes": [0],
    "num_position_embeddings": 64,
}


def save_vlm(folder: Path, dtype: torch.dtype = torch.float32, tied: bool = False, **text: Any) -> str:
    """Write the folder and return it; ``text`` changes the language tower's config. The vocabulary is bytes."""
    processor_folder("qwen3_vl", folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    names = {"image": "<|image_pad|>", "video": "<|video_pad|>"}
    names |= {"vision_start": "<|vision_start|>", "vision_end": "<|vision_end|>"}
    tokens = {f"{kind}_token_id": tokenizer.convert_tokens_to_ids(name) for kind, name in names.items()}
    settings = {"vocab_size": len(tokenizer), **_TEXT, **text}
    config = AutoConfig.for_model(
        "qwen3_vl", text_config=settings, vision_config=_VISION, tie_word_embeddings=tied, **tokens
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(config)
        randomise(model)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.to(dtype).save_pretrained(folder)
    return str(folder)
