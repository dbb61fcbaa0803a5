"""Tiny processors of vision-language models, made from scratch in a folder: no hub, no downloads, a few milliseconds.

``processor_folder("qwen2_5_vl", path)`` holds what a checkpoint of that type has beside its weights: ``config.json``,
a byte-level tokenizer with the family's special tokens, an image processor's settings and a chat template.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, PreTrainedTokenizerFast

_QWEN = "<|vision_start|><|image_pad|><|vision_end|>"
_VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"

# Like Qwen's: a system prompt of its own unless there is one, <|im_start|>role ... <|im_end|>, images by their key too.
_TEMPLATE = """\
{%- if messages[0].role != 'system' %}{{ '<|im_start|>system\\nBe brief.<|im_end|>\\n' }}{% endif -%}
{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\\n' -}}
{%- if message.content is string -%}{{- message.content -}}
{%- else -%}{%- for part in message.content -%}
{%- if part.type == 'image' or 'image' in part or 'image_url' in part -%}{{- 'IMAGE' -}}
{%- elif part.type == 'video' or 'video' in part -%}{{- 'VIDEO' -}}
{%- elif 'text' in part -%}{{- part.text -}}{%- endif -%}
{%- endfor -%}{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"""


@dataclass(frozen=True)
class _Family:
    """What differs between families.

    ``image`` and ``video`` are what the template writes for them, ``preprocessor`` and ``processor`` the two JSON files,
    ``tokens`` the special tokens, ``named`` those that the processor takes from attributes of the tokenizer.
    """

    image: str
    preprocessor: dict[str, Any]
    processor: dict[str, Any] = field(default_factory=dict)
    video: str = "<video>"
    tokens: tuple[str, ...] = ()
    named: dict[str, str] = field(default_factory=dict)


_QWEN_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")


def _qwen(patch: int) -> _Family:
    edges = {"shortest_edge": 4 * (2 * patch) ** 2, "longest_edge": 64 * (2 * patch) ** 2}
    return _Family(
        image=_QWEN,
        video=_VIDEO,
        tokens=_QWEN_TOKENS,
        preprocessor=dict(
            image_processor_type="Qwen2VLImageProcessor",
            patch_size=patch,
            merge_size=2,
            temporal_patch_size=2,
            size=edges,
        ),
    )


_LLAVA = {"patch_size": 14, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
_CLIP = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
_PINPOINTS = {"image_grid_pinpoints": [[28, 56], [56, 28], [56, 56]]}
_SMOL = dict(size={"longest_edge": 64}, max_image_size={"longest_edge": 32}, do_image_splitting=True)
_SMOL_TOKENS = (
    *("<fake_token_around_image>", "<global-img>", "<end_of_utterance>", "<image>", "<video>"),
    *(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)),
)
_INTERN = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
_PIXTRAL_TOKENS = ("[IMG]", "[IMG_BREAK]", "[IMG_END]")

FAMILIES: dict[str, _Family] = {
    "qwen2_vl": _qwen(14),
    "qwen2_5_vl": _qwen(14),
    "qwen3_vl": _qwen(16),
    "llava": _Family("<image>", dict(image_processor_type="CLIPImageProcessor", **_CLIP), _LLAVA, tokens=("<image>",)),
    "llava_next": _Family(
        "<image>",
        dict(image_processor_type="LlavaNextImageProcessor", **_CLIP, **_PINPOINTS),
        _LLAVA,
        tokens=("<image>",),
    ),
    "llava_onevision": _Family(
        "<image>",
        dict(image_processor_type="LlavaOnevisionImageProcessor", size={"height": 28, "width": 28}, **_PINPOINTS),
        {"num_image_tokens": 4, "vision_feature_select_strategy": "full"},
        tokens=("<image>", "<video>"),
    ),
    "idefics3": _Family(
        "<image>",
        dict(image_processor_type="Idefics3ImageProcessor", **_SMOL),
        {"image_seq_len": 4},
        tokens=_SMOL_TOKENS,
    ),
    "smolvlm": _Family(
        "<image>",
        dict(image_processor_type="SmolVLMImageProcessor", **_SMOL),
        {"image_seq_len": 4},
        tokens=_SMOL_TOKENS,
    ),
    "internvl": _Family(
        "<IMG_CONTEXT>",
        dict(
            image_processor_type="GotOcr2ImageProcessor", size={"height": 28, "width": 28}, min_patches=1, max_patches=4
        ),
        {"image_seq_length": 4},
        tokens=("<video>",),
        named={**_INTERN, "video_token": "<video>"},
    ),
    "pixtral": _Family(
        "[IMG]",
        dict(image_processor_type="PixtralImageProcessor", size={"longest_edge": 64}, patch_size=16),
        {"patch_size": 16},
        tokens=_PIXTRAL_TOKENS,
    ),
}


def tokenizer(family: str) -> PreTrainedTokenizerFast:
    """A token for every byte, and the family's special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: number for number, letter in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    extra = FAMILIES[family]
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *extra.tokens]
    backend.add_special_tokens([*tokens, *(token for token in extra.named.values() if token not in tokens)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        **({"extra_special_tokens": extra.named} if extra.named else {}),
    )


def processor_folder(family: str, folder: Path) -> Path:
    """Write the files into ``folder`` (made if missing) and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    extra = FAMILIES[family]
    tokenizer(family).save_pretrained(folder)
    AutoConfig.for_model(family).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(extra.preprocessor))
    if extra.processor:
        (folder / "processor_config.json").write_text(json.dumps(extra.processor))
    template = _TEMPLATE.replace("IMAGE", extra.image).replace("VIDEO", extra.video)
    (folder / "chat_template.jinja").write_text(template)
    return folder
