"""What Qwen's own format of chat messages can say beyond an image: URLs, sizes and videos, through qwen_vl_utils."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from ..classes import is_a
from ..errors import one_line
from .images import PIP_LINE, InputError, is_url
from .processors import has_torchvision

_SIZES = ("min_pixels", "max_pixels", "resized_height", "resized_width")


def resolve_media(processor: Any, parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Fetch and resize what a chat's images and videos ask for, in place; return settings for the processor.

    For a Qwen-VL processor, with the extra ``[qwen-vl]`` installed, everything goes through
    ``qwen_vl_utils.process_vision_info``; sizes that a message does not give are the processor's. (What it downloads
    is not checked by ``load_image``: no limit of pixels, no EXIF.) Otherwise the processor resizes images.

    Raises
    ------
    InputError
        A URL, a size or a video without the extra, or for a processor of another family; or qwen_vl_utils failed.
    """
    qwen = is_qwen(processor.image_processor)
    utils = _qwen_vl_utils() if parts and qwen else None
    if utils is None:
        for part in parts:
            _check_plain(processor, part, qwen)
        return {}
    limits = processor.image_processor.size
    bounds = {"min_pixels": limits["shortest_edge"], "max_pixels": limits["longest_edge"]}
    content = [{**bounds, **part} if part["type"] == "image" else part for part in parts]
    try:
        images, videos, settings = utils.process_vision_info(
            [{"role": "user", "content": content}],
            return_video_kwargs=True,
            return_video_metadata=True,
            image_patch_size=processor.image_processor.patch_size,
        )
    except Exception as error:  # of requests, Pillow, torchvision, or an assertion about sizes
        raise InputError(
            f"qwen_vl_utils cannot prepare the images and videos of this chat: {one_line(error)}."
        ) from error
    pictures, films = iter(images or ()), iter(videos or ())
    for part in parts:
        if part["type"] == "image":
            part["image"] = next(pictures)
        else:
            part["video"] = next(films)[0]
    if videos:
        settings["video_metadata"] = [metadata for _, metadata in videos]
    return {"do_resize": False, **(settings if videos else {})}


def is_qwen(image_processor: Any) -> bool:
    """Whether an image processor is that of Qwen2-VL and its successors, whichever library it resizes with."""
    folder = "transformers.models.qwen2_vl.image_processing"
    names = f"{folder}_qwen2_vl:Qwen2VLImageProcessor", f"{folder}_pil_qwen2_vl:Qwen2VLImageProcessorPil"
    return is_a(type(image_processor), *names)


def _check_plain(processor: Any, part: dict[str, Any], qwen: bool) -> None:
    if part["type"] == "video":
        asked, instead = "A video", "give some of its frames as images"
    elif is_url(part["image"]):
        asked, instead = f"The URL {part['image']!r}", "download it and give the file"
    elif sizes := [key for key in _SIZES if key in part]:
        asked, instead = f"{sizes[0]} in a message", "resize the image yourself"
    else:
        return
    if qwen:
        raise InputError(f"{asked} needs qwen_vl_utils, which is not installed. Run `{PIP_LINE}`, or {instead}.")
    raise InputError(f"{asked} is Qwen's own format, and this is a {type(processor).__name__}: {instead}.")


def _qwen_vl_utils() -> Any:
    """The module, or None if the extra is not installed."""
    if not has_torchvision():
        return None
    try:
        return import_module("qwen_vl_utils")
    except ModuleNotFoundError:
        return None
