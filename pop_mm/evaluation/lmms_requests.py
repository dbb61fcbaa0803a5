"""What lmms-eval's requests ask for, as ``pop_mm.vision`` and ``generate`` take it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria

_PLAIN = (
    "num_beams",
    "length_penalty",
    "early_stopping",
    "repetition_penalty",
    "no_repeat_ngram_size",
    "min_new_tokens",
)
_SAMPLING = ("temperature", "top_p", "top_k", "min_p")


def document_of(arguments: Sequence[Any], task_dict: Mapping[str, Any]) -> Any:
    """The document that a request is about; ``task_dict`` is what the evaluator gives a model."""
    number, task, split = arguments[-3:]
    return task_dict[task][split][number]


def chat_of(arguments: Sequence[Any], task_dict: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The messages of a request, whose arguments end in document, task and split.

    Chat models get ``text, to_messages, settings, ...``, simple ones ``text, settings or continuation, to_visuals, ...``
    (``construct_requests`` in ``lmms_eval/api/task.py``).
    """
    if len(arguments) == 2:  # a choice by itself, for acc_mutual_info
        return [{"role": "user", "content": arguments[0]}]
    document = document_of(arguments, task_dict)
    if isinstance(arguments[2], Mapping):
        return [_message(message) for message in arguments[1](document)]
    visuals = [_visual(item) for item in arguments[2](document) or []]
    text = {"type": "text", "text": arguments[0].replace("<image>", "")}  # images have their own parts
    return [{"role": "user", "content": [*visuals, text]}]


def settings_of(request: Any) -> dict[str, Any]:
    """A request's generation settings, wherever its type has them."""
    return next((value for value in request.args if isinstance(value, dict)), {})


def generate_settings(settings: Mapping[str, Any], max_new_tokens: int) -> dict[str, Any]:
    """What a task's settings ask of ``generate``; like lmms-eval's own models, this leaves out what it does not know."""
    given = {name: value for name, value in settings.items() if value is not None}
    sample = bool(given.get("do_sample", given.get("temperature"))) and given.get("temperature") != 0
    names = (*_PLAIN, *(_SAMPLING if sample else ()))
    return {
        **({} if sample else dict.fromkeys(_SAMPLING)),  # generate would complain of the model's own
        **{name: given[name] for name in names if name in given},
        "do_sample": sample,
        "max_new_tokens": given.get("max_new_tokens", given.get("max_gen_toks", max_new_tokens)),
    }


def cut(text: str, until: Sequence[str]) -> str:
    """The text before the first end."""
    for end in until:
        text = text.split(end)[0]
    return text


def _visual(item: Any) -> dict[str, Any]:
    """A part of a message; lmms-eval gives videos as paths and audio as dicts, which nothing here takes."""
    kind = "video" if isinstance(item, str) else "audio" if isinstance(item, dict) else "image"
    return {"type": kind, kind: item}


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message of lmms-eval, which names every medium ``url``, as ``pop_mm.vision`` reads it."""
    if isinstance(message["content"], str):
        return dict(message)
    parts = [{**part, part["type"]: part["url"]} if "url" in part else part for part in message["content"]]
    return {**message, "content": parts}


def extended(inputs: Mapping[str, Any], ids: Tensor) -> dict[str, Any]:
    """A prompt's inputs with ``ids`` ``[1, n]`` after it, which see what the prompt's last token sees."""
    length = inputs["input_ids"].shape[1]
    whole = {**inputs, "input_ids": torch.cat([inputs["input_ids"], ids], 1)}
    for name, value in inputs.items():
        if name.endswith(("mask", "token_type_ids")) and value.shape[:2] == (1, length):
            whole[name] = torch.cat([value, value[:, -1:].repeat_interleave(ids.shape[1], 1)], 1)
    return whole


class Until(StoppingCriteria):  # type: ignore[misc]
    """A row ends when a text of ``until`` appears among the last tokens after the prompt."""

    def __init__(self, tokenizer: Any, prompt: int, until: Sequence[str]) -> None:
        self._tokenizer, self._prompt, self._until = tokenizer, prompt, until
        self._tail = max(len(text.encode()) for text in until) + 1  # tokens of at least a byte

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """Which rows end, ``[B]``."""
        start = max(self._prompt, input_ids.shape[1] - self._tail)
        texts = self._tokenizer.batch_decode(input_ids[:, start:])
        return torch.tensor([any(end in text for end in self._until) for text in texts], device=input_ids.device)
