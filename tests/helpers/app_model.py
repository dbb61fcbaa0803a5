"""A tiny model behind the page, and what its answers should be."""

from __future__ import annotations

import socket
import threading
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from helpers.observe import differences, fingerprint
from helpers.tiny_processors import processor_folder
from pop_mm import PopConfig, prune
from pop_mm.app import Asker
from pop_mm.app.examples import examples
from pop_mm.vision import load_image, load_processor, prepare

SCENE, QUESTION = examples(True)[0]


def tiny_asker(folder: Path) -> Asker:
    """A tiny Qwen3-VL in float64 whose answers never end by themselves."""
    reader = load_processor(processor_folder("qwen3_vl", folder))
    size = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, head_dim=8)
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
    text = dict(size, vocab_size=len(reader.tokenizer), num_key_value_heads=2, rope_parameters=rope)
    vision: dict[str, Any] = dict(depth=2, num_heads=2, hidden_size=16, intermediate_size=32, out_hidden_size=32)
    vision.update(deepstack_visual_indexes=[0], num_position_embeddings=64)
    names = dict(image_token_id="image_pad", vision_start_token_id="vision_start", vision_end_token_id="vision_end")
    ids = {key: reader.tokenizer.convert_tokens_to_ids(f"<|{name}|>") for key, name in names.items()}
    config = AutoConfig.for_model("qwen3_vl", text_config=text, vision_config=vision, **ids)
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config).double()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, reader.tokenizer.pad_token_id
    model.save_pretrained(folder)
    asker = Asker.load(str(folder))
    asker.warm_up(PopConfig(0.4))
    return asker


def alone(
    asker: Asker, question: str = QUESTION, ratio: float = 0.4, max_new_tokens: int = 12, image: Path = SCENE
) -> tuple[str, ...]:
    """Both answers as ``pop-mm ask`` gets them."""
    inputs = prepare(asker._reader, load_image(image), question, model=asker.model)
    settings = dict(do_sample=False, num_beams=1, max_new_tokens=max_new_tokens)
    dense = asker.model.generate(**inputs, **settings)
    with prune(asker.model, ratio=ratio):
        pruned = asker.model.generate(**inputs, **settings)
    start = inputs["input_ids"].shape[1]
    return tuple(asker._tokenizer.decode(ids[0, start:], skip_special_tokens=True) for ids in (dense, pruned))


def changes(asker: Asker, before: dict[Any, Any]) -> list[str]:
    """What is not as it was."""
    return [key for key in differences(before, fingerprint(asker.model)) if "rope_deltas" not in key]  # of any generate


def idle(asker: Asker, seconds: float = 120) -> None:
    """Wait until nobody is being answered."""
    deadline = time.monotonic() + seconds
    while asker.busy or any(thread.name == "pop-mm-app" for thread in threading.enumerate()):
        assert time.monotonic() < deadline, "the model is still answering"
        time.sleep(0.01)


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
