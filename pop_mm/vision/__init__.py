"""Images, questions and chats, made ready for ``model.generate`` of a vision-language model.

``inputs = prepare(load_processor(name), "photo.jpg", "What is this?", model=model)``. Nothing here needs torchvision
unless the model's own processor does, or a chat in Qwen's format asks for a URL, a video or a size.
"""

from .chats import chat, decode, image_token_counts, prepare, prepare_chats
from .images import ImageSource, InputError, load_image
from .processors import load_processor

__all__ = [
    "ImageSource",
    "InputError",
    "chat",
    "decode",
    "image_token_counts",
    "load_image",
    "load_processor",
    "prepare",
    "prepare_chats",
]
