"""Models of published dimensions with random weights: what a decode step costs does not depend on the values."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Any

import torch
from torch import nn

from ..report.tables import byte_size
from .errors import BenchError
from .machine import free_memory

_ROPE = {"rope_type": "default"}
_LLAMA3 = {
    "vocab_size": 128256,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rope_parameters": {**_ROPE, "rope_theta": 500000.0},
}
_QWEN3 = {
    "vocab_size": 151936,
    "num_attention_heads": 32,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": False,
    "rope_parameters": {**_ROPE, "rope_theta": 1000000.0},
}

# Name -> model type and the settings of its published config.json that shapes depend on.
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama2-7b": (
        "llama",
        {
            "vocab_size": 32000,
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "max_position_embeddings": 4096,
            "tie_word_embeddings": False,
        },
    ),
    "llama3.1-8b": (
        "llama",
        {
            **_LLAMA3,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "tie_word_embeddings": False,
        },
    ),
    "llama3.2-1b": (
        "llama",
        {
            **_LLAMA3,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "head_dim": 64,
            "tie_word_embeddings": True,
        },
    ),
    "qwen3-8b": (
        "qwen3",
        {
            **_QWEN3,
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "num_hidden_layers": 36,
            "num_key_value_heads": 8,
        },
    ),
    "mixtral-8x7b": (
        "mixtral",
        {
            "vocab_size": 32000,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "max_position_embeddings": 32768,
            "sliding_window": None,
            "tie_word_embeddings": False,
            "rope_parameters": {**_ROPE, "rope_theta": 1000000.0},
        },
    ),
    "qwen3-30b-a3b": (
        "qwen3_moe",
        {
            **_QWEN3,
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "moe_intermediate_size": 768,
            "num_hidden_layers": 48,
            "num_key_value_heads": 4,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "norm_topk_prob": True,
        },
    ),
    "qwen2.5-vl-7b": (
        "qwen2_5_vl",
        {
            "tie_word_embeddings": False,
            "text_config": {
                "vocab_size": 152064,
                "hidden_size": 3584,
                "intermediate_size": 18944,
                "num_hidden_layers": 28,
                "num_attention_heads": 28,
                "num_key_value_heads": 4,
                "max_position_embeddings": 128000,
                "tie_word_embeddings": False,
                "rope_parameters": {**_ROPE, "rope_theta": 1000000.0, "mrope_section": [16, 24, 24]},
            },
            "vision_config": {"hidden_size": 1280, "intermediate_size": 3420, "out_hidden_size": 3584},
        },
    ),
}


def config_of(name: str, layers: int | None = None) -> Any:
    """The transformers config of a published model.

    Parameters
    ----------
    name : str
        A key of :data:`CONFIGS`.
    layers : int, optional
        Decoder layers, if fewer than published.

    Raises
    ------
    BenchError
        Unknown name, or more layers than the model has.
    """
    from transformers import AutoConfig

    if name not in CONFIGS:
        close = get_close_matches(name.lower(), CONFIGS, 1)
        hint = f" Did you mean {close[0]}?" if close else ""
        raise BenchError(f"There is no config {name!r}; the configs are: {', '.join(CONFIGS)}.{hint}")
    model_type, settings = CONFIGS[name]
    inner = "text_config" if "text_config" in settings else None
    text = dict(settings[inner] if inner else settings)
    if layers is not None:
        if not 1 <= layers <= text["num_hidden_layers"]:
            raise BenchError(f"{name} has {text['num_hidden_layers']} layers; --layers asks for {layers}.")
        text["num_hidden_layers"] = layers
    return AutoConfig.for_model(model_type, **({**settings, inner: text} if inner else text))


def skeleton(config: Any, dtype: torch.dtype = torch.bfloat16) -> Any:
    """The model of a config, in eval mode, its parameters on the meta device and its buffers on the CPU."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    from ..samples import takes_images

    auto = AutoModelForImageTextToText if takes_images(config) else AutoModelForCausalLM
    with init_empty_weights(include_buffers=False):
        model = auto.from_config(config, dtype=dtype)
    model.tie_weights()
    return model.eval()


@torch.no_grad()
def materialise(model: Any, device: torch.device, seed: int = 0) -> Any:
    """Give a skeleton random weights on a device, one tensor after the other and in its own dtype: no second copy.

    Matrices are normal with a standard deviation of 0.02; vectors are 1 (norms) or 0 (biases).

    Raises
    ------
    BenchError
        The device has not enough free memory.
    """
    needed = sum(p.nbytes for p in model.parameters())
    free = free_memory(device)
    if free is not None and needed > free:
        raise BenchError(
            f"The weights need {byte_size(needed)} ({needed} bytes) on {device}, but {byte_size(free)} ({free} bytes) are free. "
            "Build fewer layers (--layers), take a smaller config, or another device."
        )
    random = torch.Generator(device).manual_seed(seed)
    made: dict[nn.Parameter, nn.Parameter] = {}  # tied weights stay tied
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if parameter not in made:
                real = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
                if real.dim() > 1:
                    real.normal_(0, 0.02, generator=random)
                else:
                    real.fill_(name == "weight")
                made[parameter] = nn.Parameter(real, requires_grad=False)
            module._parameters[name] = made[parameter]
    return model.to(device)


__all__ = ["CONFIGS", "config_of", "materialise", "skeleton"]
