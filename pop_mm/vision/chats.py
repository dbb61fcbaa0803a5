"""From a chat with images to ``model.generate`` and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from ..errors import one_line
from ..inputs import check_tokens
from .images import ImageSource, InputError, from_base64, is_url, load_image
from .processors import check_takes_images
from .qwen import resolve_media

if TYPE_CHECKING:
    import torch
    from PIL import Image
    from transformers import BatchFeature

Chat: TypeAlias = "list[dict[str, Any]]"

MAX_RATIO = 200  # Qwen's limit; models that resize to a shortest edge would need gigabytes beyond it
_IMAGE_KEYS = ("image", "image_url", "url", "path", "base64")


def chat(
    images: ImageSource | Sequence[ImageSource] | None,
    question: str,
    *,
    system: str | None = None,
    history: Sequence[Mapping[str, Any]] = (),
) -> Chat:
    """Return a chat whose last turn asks ``question`` about ``images`` (none, one, or several, in that order).

    Parameters
    ----------
    images
        See ``load_image``; http(s) URLs as in ``prepare_chats``.
    question : str
    system : str, optional
        System prompt. Without it, the model's chat template decides.
    history : sequence of messages
        Turns before this one, such as ``[*chat(...), {"role": "assistant", "content": answer}]``.

    Raises
    ------
    InputError
        No image and no text, a question that is no string, or a second system prompt.
    """
    if not isinstance(question, str):
        raise InputError(f"The question must be a string; got {type(question).__name__}.")
    if images is None:
        images = []
    elif not isinstance(images, list | tuple):
        images = [images]  # type: ignore[list-item]
    if not images and not question.strip():
        raise InputError("There is neither an image nor a question: give at least one.")
    before = [dict(message) for message in history]
    if system is not None:
        if any(message.get("role") == "system" for message in before):
            raise InputError("The history has a system prompt already: give it there or as system, not both.")
        before.insert(0, {"role": "system", "content": [{"type": "text", "text": system}]})
    content: list[dict[str, Any]] = [{"type": "image", "image": image} for image in images]
    return [
        *before,
        {"role": "user", "content": [*content, *([{"type": "text", "text": question}] if question else [])]},
    ]


def prepare(
    processor: Any,
    images: ImageSource | Sequence[ImageSource] | None,
    question: str,
    *,
    system: str | None = None,
    history: Sequence[Mapping[str, Any]] = (),
    model: Any = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> BatchFeature:
    """Prepare one question about images: ``prepare_chats(processor, chat(images, question, ...), ...)``."""
    turns = chat(images, question, system=system, history=history)
    return prepare_chats(processor, turns, model=model, device=device, dtype=dtype)


def prepare_chats(
    processor: Any,
    chats: Sequence[Any],
    *,
    model: Any = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    template: Mapping[str, Any] | None = None,
) -> BatchFeature:
    """Prepare a chat, or a batch of chats, for ``model.generate(**inputs)``.

    Parameters
    ----------
    processor : transformers.ProcessorMixin
        From ``load_processor``, or your own.
    chats : sequence of messages, or sequence of such sequences
        Messages as transformers, OpenAI and Qwen write them: ``{"role": "user", "content": text or parts}`` with parts
        ``{"type": "text", "text": ...}`` and ``{"type": "image", "image": source}`` (or ``image_url``, ``url``,
        ``path``, ``base64``). They are not changed. With a Qwen-VL processor and the extra ``[qwen-vl]`` also http(s)
        URLs, ``min_pixels``, ``max_pixels``, ``resized_height`` with ``resized_width``, and ``{"type": "video"}``.
    model : transformers.PreTrainedModel, optional
        Gives device and dtype, unless they are given.
    device, dtype
        Where to put tensors, and the dtype of pixel values.
    template : mapping, optional
        More for the chat template: ``tools``, or variables of its own.

    Returns
    -------
    BatchFeature
        ``input_ids`` and ``attention_mask`` ``[chats, tokens]``, padded on the left, ending where the answer begins; what
        the model takes of images (``pixel_values`` ...); ``mm_token_type_ids`` ``[chats, tokens]`` for the Qwen families.

    Raises
    ------
    InputError
        A message or an image that cannot be used, or a processor that refuses the prompt.
    TokenError
        The processor's tokenizer has a token that the model's embedding has no row for.
    """
    check_takes_images(processor)
    rows = [[_message(message) for message in turns] for turns in _batch(chats)]
    parts = [part for turns in rows for message in turns for part in message["content"] if part["type"] != "text"]
    settings = resolve_media(processor, parts)
    if len(rows) > 1:
        settings = {**settings, "padding": True, "padding_side": "left"}
    try:
        inputs = processor.apply_chat_template(
            rows,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs=settings,
            **(template or {}),
        )
    except InputError:
        raise
    except Exception as error:  # templates and processors raise whatever they stumble over
        raise InputError(f"The {type(processor).__name__} cannot prepare this prompt: {one_line(error)}.") from error
    if "mm_token_type_ids" not in inputs and {"image_grid_thw", "video_grid_thw"} & inputs.keys():
        # Qwen2.5-VL would silently use 1-D positions.
        inputs["mm_token_type_ids"] = inputs["input_ids"].new_tensor(
            processor.create_mm_token_type_ids(inputs["input_ids"].tolist())
        )
    if model is not None:
        check_tokens(model, inputs["input_ids"], getattr(processor, "tokenizer", None))
    device = getattr(model, "device", None) if device is None else device
    dtype = getattr(model, "dtype", None) if dtype is None else dtype
    return inputs.to(device=device, dtype=dtype)


def decode(processor: Any, generated_ids: Any, inputs: Mapping[str, Any]) -> list[str]:
    """Return the text of the new tokens alone, without special tokens, one string for each row.

    Parameters
    ----------
    processor : transformers.ProcessorMixin
    generated_ids : Tensor or GenerateOutput
        What ``model.generate(**inputs)`` returned: ``[rows, prompt + new]``.
    inputs : BatchFeature
        What ``prepare`` returned.
    """
    sequences = getattr(generated_ids, "sequences", generated_ids)
    new = sequences[:, inputs["input_ids"].shape[1] :]
    return processor.tokenizer.batch_decode(new, skip_special_tokens=True)


def image_token_counts(owner: Any, inputs: Mapping[str, Any]) -> list[dict[str, int]]:
    """Count the positions of each row that hold text, image and video tokens, padding left out.

    Parameters
    ----------
    owner : processor or model
        Knows the ids of image and video tokens, where ``inputs`` has no ``mm_token_type_ids``.
    inputs : BatchFeature
        What ``prepare`` returned.

    Returns
    -------
    list of dict
        ``{"text": ..., "image": ..., "video": ...}`` for each row; their sum is the prompt's length.
    """
    ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    used = ids == ids if mask is None else mask.bool()
    types = inputs.get("mm_token_type_ids")
    found: dict[str, list[int]] = {}
    for number, kind in enumerate(("image", "video"), start=1):
        places = _among(ids, _token_ids(owner, kind)) if types is None else types == number
        found[kind] = (places & used).sum(-1).tolist()
    lengths = used.sum(-1).tolist()
    return [
        {"text": length - image - video, "image": image, "video": video}
        for length, image, video in zip(lengths, found["image"], found["video"], strict=True)
    ]


def _token_ids(owner: Any, kind: str) -> list[int]:
    """Ids of the ``kind``'s tokens by a processor's attributes or a model's config; empty if it has none."""
    holder = getattr(owner, "config", owner)
    names = (f"{kind}_token_ids", f"{kind}_token_id", f"{kind}_token_index")
    found: Any = next((value for name in names if (value := getattr(holder, name, None)) is not None), [])
    return [value for value in (found if isinstance(found, list) else [found]) if value is not None]


def _among(ids: torch.Tensor, wanted: list[int]) -> torch.Tensor:
    import torch

    return torch.isin(ids, torch.tensor(wanted, dtype=ids.dtype, device=ids.device))


def _batch(chats: Sequence[Any]) -> Sequence[Sequence[Any]]:
    rows = [chats] if chats and isinstance(chats[0], Mapping) else chats
    if not rows or not all(rows):
        raise InputError("A chat has no messages: give at least one user message.")
    return rows


def _message(message: Any) -> dict[str, Any]:
    """A copy of a message whose content is a list of parts, with its images loaded (URLs stay)."""
    if not isinstance(message, Mapping) or "role" not in message:
        raise InputError(f"A message must be a dict with role and content; got {message!r:.80}.")
    content = message.get("content")
    parts = [content] if isinstance(content, str | Mapping) else content or []
    return {**message, "content": [_part(part) for part in parts]}


def _part(part: Any) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if not isinstance(part, Mapping):
        raise InputError(f"A part of a message must be a string or a dict; got {type(part).__name__}.")
    kind = part.get("type")
    key = next((key for key in _IMAGE_KEYS if part.get(key) is not None), None)
    if kind == "video" or (kind is None and "video" in part):
        return {**part, "type": "video"}
    if kind in ("image", "image_url") or (kind is None and key):
        if key is None:
            raise InputError('A message has an image part without an image: write {"type": "image", "image": path}.')
        source = part[key]["url"] if isinstance(part[key], Mapping) else part[key]
        if key == "base64":
            source = from_base64(source)
        others = {name: value for name, value in part.items() if name not in _IMAGE_KEYS}
        return {**others, "type": "image", "image": source if is_url(source) else _load(source)}
    if isinstance(part.get("text"), str):
        return {**part, "type": "text"}
    raise InputError(f"A part of a message has type {kind!r}; text, image and video are known.")


def _load(source: Any) -> Image.Image:
    image = load_image(source)
    long, short = max(image.size), min(image.size)
    if long > MAX_RATIO * short:
        raise InputError(
            f"An image of {image.width} x {image.height} pixels is {long / short:.0f} times as long as it is wide, and "
            f"{MAX_RATIO} is the most that can be prepared. Crop it or cut it into pieces."
        )
    return image
