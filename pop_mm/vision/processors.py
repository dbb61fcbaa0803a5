"""Processors of vision-language models, with torchvision and without it."""

from __future__ import annotations

import os
from functools import cache
from importlib import import_module, metadata
from typing import Any

from ..classes import is_a
from ..errors import SampleError
from ..samples.fetching import _loading, load_config, resolve
from .images import PIP_LINE, InputError


def load_processor(model: str | os.PathLike[str]) -> Any:
    """Load the processor (image processor, tokenizer, chat template) of a vision-language model.

    Parameters
    ----------
    model : str or path
        A sample's name, a folder or a hub id. Code that comes with a model is not run.

    Returns
    -------
    transformers.ProcessorMixin
        Where torchvision is not installed and the model's processor wants a video processor, which needs it (the Qwen-VL
        families, InternVL, LLaVA-OneVision ...), a processor of the same class that takes images but no videos.

    Raises
    ------
    InputError
        torchvision is needed and missing, or installed but unusable; or the model has no image processor.
    SampleError
        There is no such model, or its files are missing or damaged.
    """
    name = os.fspath(model)
    source = resolve(name)
    torchvision = has_torchvision()
    if not os.path.isdir(source):
        load_config(
            name
        )  # one small file: without a network, a hub id fails after its retries and not after those of all
    try:
        with _loading("processor", name):
            processor = _load(source, torchvision)
    except SampleError as error:
        if torchvision or "torchvision" not in str(error.__cause__).lower():
            raise
        raise InputError(
            f"The processor of {name!r} needs torchvision, which is not installed. Run `{PIP_LINE}`; torchvision must be "
            "of the same build as torch (CPU or the same CUDA)."
        ) from error
    check_takes_images(processor)
    if processor.chat_template is None:
        processor.chat_template = processor.tokenizer.chat_template
    return processor


def check_takes_images(processor: Any) -> None:
    """Raise ``InputError`` unless ``processor`` has an image processor and a tokenizer."""
    if None in (getattr(processor, part, None) for part in ("image_processor", "tokenizer")):
        raise InputError(
            f"A {type(processor).__name__} does not take images and text. Give a vision-language model's processor."
        )


def has_torchvision() -> bool:
    """Whether torchvision is installed. Raises ``InputError`` if it is, but cannot be imported."""
    try:
        import_module("torchvision")
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "torchvision":
            return False
        versions = [f"{name} {metadata.version(name)}" for name in ("torchvision", "torch")]
        reason = " ".join(str(error).split())
        raise InputError(
            f"{versions[0]} is installed but does not work next to {versions[1]} ({reason}), and transformers then loads "
            "no image processor at all. Install the torchvision build made for this torch, or run `pip uninstall "
            "torchvision`: images of most models are prepared without it."
        ) from error
    return True


def _load(source: str, torchvision: bool) -> Any:
    import transformers

    kind = None if torchvision else _processor_class(source)
    if kind is None or "video_processor" not in kind.get_attributes():
        return transformers.AutoProcessor.from_pretrained(source, trust_remote_code=False)
    loaders = {
        "image_processor": transformers.AutoImageProcessor,
        "tokenizer": transformers.AutoTokenizer,
        "feature_extractor": transformers.AutoFeatureExtractor,
    }
    parts = [
        None if name == "video_processor" else loaders[name].from_pretrained(source, trust_remote_code=False)
        for name in kind.get_attributes()
    ]
    settings, _ = kind.get_processor_dict(source)
    return _without_videos(kind).from_args_and_dict(parts, settings)


def _processor_class(source: str) -> Any:
    """The class that ``AutoProcessor`` would choose, or None if neither its own file nor the model's type says."""
    import transformers
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

    settings, _ = transformers.ProcessorMixin.get_processor_dict(source)
    if named := getattr(transformers, settings.get("processor_class") or "", None):
        return named
    config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=False)
    return PROCESSOR_MAPPING.get(type(config), None)


@cache
def _without_videos(kind: Any) -> Any:
    """A subclass of the processor ``kind``, under its name, that has no video processor."""
    from transformers import ProcessorMixin

    names = kind.get_attributes()

    class Drop(ProcessorMixin):  # type: ignore[misc]  # between kind and ProcessorMixin, so that it sees what kind.__init__ passes on
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            named = {**dict(zip(names, args, strict=False)), **kwargs}
            named.pop("video_processor", None)
            super().__init__(**named)

    class ImagesOnly(kind, Drop):  # type: ignore[misc]
        @classmethod
        def get_attributes(cls) -> list[str]:  # what transformers checks, saves and asks for their inputs' names
            return [name for name in names if name != "video_processor"]

        @property
        def video_processor(self) -> Any:
            raise AttributeError(f"a video processor needs torchvision, which is missing: `{PIP_LINE}`")

        def validate_inputs(self, *args: Any, videos: Any = None, **kwargs: Any) -> None:
            if videos is not None:
                raise InputError(f"This {kind.__name__} takes no videos, since torchvision is missing: `{PIP_LINE}`.")
            super().validate_inputs(*args, videos=videos, **kwargs)

    # its own asks the video processor for frame rates, even without videos
    if is_a(kind, "transformers.models.smolvlm.processing_smolvlm:SmolVLMProcessor"):
        ImagesOnly.apply_chat_template = ProcessorMixin.apply_chat_template
    ImagesOnly.__name__ = ImagesOnly.__qualname__ = kind.__name__
    return ImagesOnly
