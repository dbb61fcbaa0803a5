"""Checks the messages of a chat, and reads their pictures, which must be in the request itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...vision import InputError, load_image
from .errors import RequestError

ROLES = ("system", "developer", "user", "assistant", "tool")


def check_messages(messages: Any, takes_images: bool) -> list[dict[str, Any]]:
    """The messages, if they are what OpenAI's chat completions take.

    Raises
    ------
    RequestError
        400: what is wrong, and where.
    """
    if not isinstance(messages, list) or not messages:
        raise _wrong("messages", "must be a list of at least one message")
    for number, message in enumerate(messages):
        where = f"messages[{number}]"
        if not isinstance(message, dict):
            raise _wrong(where, "must be an object with role and content")
        if message.get("role") not in ROLES:
            raise _wrong(f"{where}.role", f"must be one of {', '.join(ROLES)}")
        _check_content(f"{where}.content", message, takes_images)
        calls = message.get("tool_calls")
        if calls is not None and not (isinstance(calls, list) and all(map(_is_call, calls))):
            raise _wrong(f"{where}.tool_calls", "must be a list of calls with function.name and function.arguments")
    return messages


def _check_content(where: str, message: Mapping[str, Any], takes_images: bool) -> None:
    content = message.get("content")
    if content is None and message["role"] == "assistant" and message.get("tool_calls"):
        return
    if isinstance(content, str):
        _check_text(where, content)
        return
    if not isinstance(content, list) or not content:
        raise _wrong(where, "must be a text or a list of parts")
    for number, part in enumerate(content):
        place = f"{where}[{number}]"
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            _check_text(f"{place}.text", part["text"])
            continue
        if kind == "image_url":
            _check_image(place, part, takes_images)
            continue
        raise _wrong(place, 'must be {"type": "text", "text": ...} or {"type": "image_url", "image_url": {"url": ...}}')


def _check_text(where: str, text: str) -> None:
    """JSON may escape halves of characters, which are no text."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise _wrong(where, f"has half of a character, {text[error.start]!a}, at place {error.start}") from None


def _check_image(where: str, part: Mapping[str, Any], takes_images: bool) -> None:
    if not takes_images:
        raise _wrong(where, "is a picture, and the model takes text alone")
    url = part.get("image_url")
    url = url.get("url") if isinstance(url, dict) else url
    if not isinstance(url, str):
        raise _wrong(f"{where}.image_url", 'must be {"url": "data:image/png;base64,..."}')
    if not url.startswith("data:"):
        kind = "a URL" if "://" in url[:16] else "no data: URL"
        raise _wrong(
            f"{where}.image_url",
            f"is {kind}, and this server fetches and opens nothing for a request. Send the picture itself, as "
            "data:image/png;base64,...",
        )


def _is_call(call: Any) -> bool:
    function = call.get("function") if isinstance(call, dict) else None
    return isinstance(function, dict) and isinstance(function.get("name"), str) and "arguments" in function


def with_images(messages: list[dict[str, Any]], pixels: int) -> list[dict[str, Any]]:
    """The processor's form of checked messages, with every picture decoded.

    Parameters
    ----------
    messages : list of dict
        Parts are ``{"type": "text", "text": ...}`` and ``{"type": "image", "url": "data:..."}``.
    pixels : int
        That all pictures may have together.

    Raises
    ------
    RequestError
        400: a picture that is broken, or too many pixels.
    """
    found = []
    for message in messages:
        parts = []
        for part in message["content"]:
            if part["type"] == "image":
                try:
                    image = load_image(part["url"], max_pixels=pixels)
                except InputError as error:
                    raise RequestError(400, str(error), "invalid_image", "messages") from error
                pixels -= image.width * image.height
                part = {"type": "image", "image": image}
            parts.append(part)
        found.append({**message, "content": parts})
    return found


def _wrong(where: str, what: str) -> RequestError:
    return RequestError(400, f"{where} {what}.", "invalid_messages", where)


__all__ = ["ROLES", "check_messages", "with_images"]
