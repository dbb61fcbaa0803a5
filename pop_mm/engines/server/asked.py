"""Checks the body of a chat request: what it asks for is done, or refused by name."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, NoReturn

from ...checks import is_number, is_whole
from ...errors import ConfigError
from ...settings.config import PopConfig
from ...settings.keywords import with_amount
from .errors import RequestError
from .limits import Limits
from .messages import check_messages

# Fields that would change an answer in a way that is not there, and the values with which they do not.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "function_call": (),
    "functions": (),
    "generation_config": (),
    "logprobs": (False,),
    "modalities": (["text"],),
    "n": (1,),
    "parallel_tool_calls": (True,),
    "prediction": (),
    "presence_penalty": (0,),
    "reasoning_effort": (),
    "response_format": ({"type": "text"},),
    "top_logprobs": (0,),
    "verbosity": ("medium",),
    "web_search_options": (),
}
_IGNORED = {
    "metadata",
    "prompt_cache_key",
    "prompt_cache_retention",
    "safety_identifier",
    "service_tier",
    "store",
    "stream_options",
    "user",
}
_TAKEN = {
    "budget",
    "chat_template_kwargs",
    "frequency_penalty",
    "logit_bias",
    "max_completion_tokens",
    "max_tokens",
    "messages",
    "model",
    "ratio",
    "seed",
    "stop",
    "stream",
    "temperature",
    "tool_choice",
    "tools",
    "top_p",
}
_MOST_STOPS, _LONGEST_STOP = 4, 64
_MOST_BIASES = 1024


@dataclass(frozen=True)
class Asked:
    """A checked request.

    Attributes
    ----------
    messages : list of dict
    config : PopConfig
    max_new_tokens : int or None
        None: as many as the server gives.
    seed : int
        Of sampling; a random one unless it was given.
    stream : bool
    sampling : dict
        ``temperature``, ``top_p``, ``frequency_penalty`` and ``logit_bias``, those that were given.
    stops : list of str
        Texts with which the answer ends.
    variables : dict
        Of the chat template.
    tools : list or None
        That the model may call.
    """

    messages: list[dict[str, Any]]
    config: PopConfig
    max_new_tokens: int | None
    seed: int
    stream: bool
    sampling: dict[str, Any] = field(default_factory=dict)
    stops: list[str] = field(default_factory=list)
    variables: dict[str, Any] = field(default_factory=dict)
    tools: list[Any] | None = None


def parse(data: bytes) -> dict[str, Any]:
    """The JSON object in a body.

    Raises
    ------
    RequestError
        400: it is none.
    """
    try:
        body = json.loads(data, parse_constant=_no_number, parse_int=_integer)
    except (ValueError, RecursionError) as error:
        said = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise RequestError(400, f"The body is not valid JSON: {said}.", "invalid_json") from None
    if not isinstance(body, dict):
        raise RequestError(400, f"The body must be a JSON object; got {type(body).__name__}.", "invalid_json")
    return body


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def _integer(digits: str) -> int:
    try:
        return int(digits)
    except ValueError:  # Python reads no more than 4,300 digits
        raise ValueError(f"it has a number of {len(digits):,} digits") from None


def check(body: Mapping[str, Any], name: str, config: PopConfig, takes_images: bool, limits: Limits) -> Asked:
    """What a body asks for.

    Parameters
    ----------
    name : str
        Of the model.
    config : PopConfig
        Of requests without ``budget`` and ``ratio``.

    Raises
    ------
    RequestError
        404: another model. 400: a field that is missing, wrong, unknown, or not supported.
    """
    body = {key: value for key, value in body.items() if value is not None}
    _check_model(body.get("model"), name)
    for key, value in body.items():
        _check_known(key, value)
    messages = check_messages(body.get("messages"), takes_images)
    return Asked(
        messages,
        _config(body, config),
        _length(body, limits),
        secrets.randbits(63) if "seed" not in body else _whole(body, "seed", 0, 2**63 - 1),
        _flag(body, "stream"),
        _sampling(body),
        _stops(body.get("stop", [])),
        _variables(body),
        _tools(body),
    )


def _check_model(asked: Any, name: str) -> None:
    if asked is None or asked == name:
        return
    if not isinstance(asked, str):
        raise _wrong("model", f"must be a text; got {asked!r:.40}")
    raise RequestError(
        404, f"This server has one model, {name!r}; {asked!r:.80} was asked for.", "model_not_found", "model"
    )


def _check_known(key: str, value: Any) -> None:
    if key in _NEUTRAL:
        if not any(value == neutral and type(value) is type(neutral) for neutral in _NEUTRAL[key]):
            raise _wrong(key, f"is not supported here; got {value!r:.80}. Leave it out")
    elif key not in _TAKEN | _IGNORED:
        close = get_close_matches(key, _TAKEN, 1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise RequestError(400, f"Unknown field {key!r:.80}{hint}.", "unknown_field", key[:80])


def _config(body: Mapping[str, Any], config: PopConfig) -> PopConfig:
    given = {name: body[name] for name in ("budget", "ratio") if name in body}
    try:
        return PopConfig.from_dict(with_amount(config.changes(), given)) if given else config
    except ConfigError as error:
        raise RequestError(400, str(error), "invalid_settings", next(iter(given))) from error


def _length(body: Mapping[str, Any], limits: Limits) -> int | None:
    name = "max_completion_tokens" if "max_completion_tokens" in body else "max_tokens"
    if name not in body:
        return None
    length = _whole(body, name, 1, None)
    if length > limits.max_new_tokens:
        raise _wrong(name, f"is {length}, and this server gives answers of at most {limits.max_new_tokens} tokens")
    return length


def _sampling(body: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if "temperature" in body:
        found["temperature"] = _number(body, "temperature", 0, 100)
        if 0 < found["temperature"] < 0.001:
            raise _wrong("temperature", "must be 0 or at least 0.001: logits divided by less overflow")
    if "top_p" in body:
        found["top_p"] = _number(body, "top_p", 0, 1)
    if body.get("frequency_penalty", 0) != 0:
        found["frequency_penalty"] = _number(body, "frequency_penalty", 0, 2)
    if biases := body.get("logit_bias"):
        found["logit_bias"] = _biases(biases)
    return found


def _biases(biases: Any) -> dict[str, float]:
    fits = isinstance(biases, dict) and len(biases) <= _MOST_BIASES and all(token.isdecimal() for token in biases)
    if not fits or not all(is_number(value) and -100 <= value <= 100 for value in biases.values()):
        raise _wrong("logit_bias", f"must map at most {_MOST_BIASES} token ids to numbers in [-100, 100]")
    return {token: float(value) for token, value in biases.items()}


def _stops(stops: Any) -> list[str]:
    stops = [stops] if isinstance(stops, str) else stops
    fits = isinstance(stops, list) and len(stops) <= _MOST_STOPS
    if not fits or not all(isinstance(text, str) and 0 < len(text) <= _LONGEST_STOP for text in stops):
        raise _wrong("stop", f"must be at most {_MOST_STOPS} texts of 1 to {_LONGEST_STOP} characters")
    return list(stops)


def _tools(body: Mapping[str, Any]) -> list[Any] | None:
    tools, choice = body.get("tools"), body.get("tool_choice", "auto")
    if choice not in ("auto", "none"):
        raise _wrong("tool_choice", 'must be "auto" or "none": the model itself decides')
    if not tools and (tools is None or isinstance(tools, list)):
        return None
    fits = isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)
    if not fits or not all(isinstance(tool.get("function"), dict) and "name" in tool["function"] for tool in tools):
        raise _wrong("tools", 'must be a list of {"type": "function", "function": {"name": ...}}')
    return None if choice == "none" else list(tools)


def _variables(body: Mapping[str, Any]) -> dict[str, Any]:
    given = body.get("chat_template_kwargs", {})
    if not isinstance(given, dict) or not all(isinstance(value, bool | int | float | str) for value in given.values()):
        raise _wrong("chat_template_kwargs", "must map variables of the template, as enable_thinking, to plain values")
    return dict(given)


def _flag(body: Mapping[str, Any], name: str) -> bool:
    value = body.get(name, False)
    if not isinstance(value, bool):
        raise _wrong(name, f"must be true or false; got {value!r:.40}")
    return value


def _whole(body: Mapping[str, Any], name: str, least: int, most: int | None) -> int:
    value = body[name]
    if not is_whole(value) or value < least or (most is not None and value > most):
        raise _wrong(name, f"must be an integer from {least}{'' if most is None else f' to {most}'}; got {value!r:.40}")
    return value


def _number(body: Mapping[str, Any], name: str, least: float, most: float) -> float:
    value = body[name]
    if not is_number(value) or not least <= value <= most:
        raise _wrong(name, f"must be a number from {least:g} to {most:g}; got {value!r:.40}")
    return float(value)


def _wrong(name: str, what: str) -> RequestError:
    return RequestError(400, f"{name} {what}.", "invalid_value", name)


__all__ = ["Asked", "check", "parse"]
