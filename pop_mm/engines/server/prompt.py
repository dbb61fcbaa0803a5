"""From a checked request to what ``generate`` takes."""

from __future__ import annotations

import inspect
import threading
from typing import Any

from transformers.cli.serving.utils import BaseHandler, Modality

from ...errors import PopError, one_line
from ...inputs import check_tokens
from ...vision import InputError, prepare_chats
from .asked import Asked
from .errors import RequestError
from .limits import Limits
from .messages import with_images
from .model import ServedModel

_ONE_AT_A_TIME = threading.Lock()  # tokenizers and decoded pictures: bounded memory, and no two in one tokenizer


def prepare(served: ServedModel, asked: Asked, limits: Limits) -> Any:
    """The prompt: ``input_ids [1, tokens]``, ``attention_mask``, and what the model takes of pictures.

    Raises
    ------
    RequestError
        400: the chat template or the processor does not take the messages, a picture is broken, or the prompt has more tokens
        than the model's context.
    """
    more = _variables(served, asked)
    _check_biases(served, asked)
    try:
        with _ONE_AT_A_TIME:
            inputs = _images(served, asked, limits, more) if served.takes_images else _text(served, asked, more)
    except RequestError:
        raise
    except PopError as error:
        raise RequestError(400, str(error), "invalid_messages", "messages") from error
    except Exception as error:  # templates raise whatever they stumble over
        said = f"The chat template of {served.name} does not take these messages: {one_line(error)}."
        raise RequestError(400, said, "invalid_messages", "messages") from error
    tokens = inputs["input_ids"].shape[1]
    if served.context is not None and tokens >= served.context:
        raise RequestError(
            400,
            f"The messages have {tokens} tokens, and the model's context is {served.context}, with the answer. Send less.",
            "context_length_exceeded",
            "messages",
        )
    return inputs


def longest(served: ServedModel, asked: Asked, limits: Limits, tokens: int) -> int:
    """Tokens that the answer to a prompt of ``tokens`` may have.

    Raises
    ------
    RequestError
        400: more were asked for than the model's context has left.
    """
    left = limits.max_new_tokens if served.context is None else served.context - tokens
    if asked.max_new_tokens is None:
        return min(left, limits.max_new_tokens)
    if asked.max_new_tokens > left:
        raise RequestError(
            400,
            f"The messages have {tokens} tokens and the answer may have {asked.max_new_tokens}, but the model's context is "
            f"{served.context} tokens: ask for at most {left}.",
            "context_length_exceeded",
            "max_tokens",
        )
    return asked.max_new_tokens


def _variables(served: ServedModel, asked: Asked) -> dict[str, Any]:
    """More for the template: tools, and variables that it has; never an argument of the function that renders it."""
    arguments = {"messages", *inspect.signature(served.reader.apply_chat_template).parameters}
    template = str(served.reader.chat_template)
    for name in asked.variables:
        if name in arguments or not name.isidentifier() or name not in template:
            said = f"chat_template_kwargs: the chat template of {served.name} has no variable {name!r:.80}."
            raise RequestError(400, said, "invalid_value", "chat_template_kwargs")
    return {**asked.variables, **({} if asked.tools is None else {"tools": asked.tools})}


def _check_biases(served: ServedModel, asked: Asked) -> None:
    size = served.model.config.get_text_config().vocab_size
    for token in asked.sampling.get("logit_bias", ()):
        if int(token) >= size:
            said = f"logit_bias: the model has no token {token:.40}, its last one is {size - 1}."
            raise RequestError(400, said, "invalid_value", "logit_bias")


def _text(served: ServedModel, asked: Asked, more: dict[str, Any]) -> Any:
    messages = BaseHandler.get_processor_inputs_from_messages(asked.messages, Modality.LLM)
    inputs = served.reader.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True, **more
    )
    check_tokens(served.model, inputs["input_ids"], served.tokenizer)
    return {key: inputs[key].to(served.model.device) for key in ("input_ids", "attention_mask")}


def _images(served: ServedModel, asked: Asked, limits: Limits, more: dict[str, Any]) -> Any:
    messages = BaseHandler.get_processor_inputs_from_messages(asked.messages, Modality.VLM)
    chat = with_images(messages, limits.pixels)
    try:
        return prepare_chats(served.reader, chat, model=served.model, template=more)
    except InputError as error:
        raise RequestError(400, str(error), "invalid_messages", "messages") from error


__all__ = ["longest", "prepare"]
