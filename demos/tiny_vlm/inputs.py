"""From chats with pictures to what the model takes, without a processor class (Qwen's needs torchvision for videos)."""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image
from transformers.image_processing_utils import BaseImageProcessor
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

Chat = list[dict[str, Any]]


def user(text: str, image: Image.Image | None = None) -> dict[str, Any]:
    """Return a user's message in Qwen's form, with or without a picture before the text."""
    parts: list[dict[str, Any]] = [] if image is None else [{"type": "image", "image": image}]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


def encode(
    chats: list[Chat], tokenizer: PreTrainedTokenizerBase, image_processor: BaseImageProcessor
) -> dict[str, torch.Tensor]:
    """Encode chats for ``generate``, left-padded to one length.

    Parameters
    ----------
    chats : list of chats
        Each ends with a user's message. Pictures are the ``image`` items of the messages' contents.
    tokenizer, image_processor
        Loaded from a model's folder.

    Returns
    -------
    dict
        ``input_ids``, ``attention_mask`` and ``mm_token_type_ids`` (1 at a picture's tokens) ``[N, S]``, and if there are
        pictures ``pixel_values`` ``[patches, values]`` and ``image_grid_thw`` ``[pictures, 3]``.
    """
    images = [
        item["image"]
        for chat in chats
        for message in chat
        if not isinstance(message["content"], str)
        for item in message["content"]
        if item["type"] == "image"
    ]
    seen = image_processor(images, return_tensors="pt") if images else {}
    lengths = iter((seen["image_grid_thw"].prod(-1) // image_processor.merge_size**2).tolist() if images else ())
    texts = []
    for chat in chats:
        first, *rest = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True).split(
            "<|image_pad|>"
        )
        texts.append(first + "".join("<|image_pad|>" * next(lengths) + part for part in rest))
    inputs = tokenizer(texts, padding=True, padding_side="left", return_tensors="pt", add_special_tokens=False)
    is_image = inputs["input_ids"] == tokenizer.convert_tokens_to_ids("<|image_pad|>")
    return {**inputs, "mm_token_type_ids": is_image.long(), **seen}
