"""A tiny model behind the server, and what its answers should be."""

from __future__ import annotations

import base64
import json
import time
from pathlib import Path
from typing import Any

import httpx
import openai
import torch

from helpers.tiny_folder import save
from pop_mm import PopConfig, prune
from pop_mm.engines.server.run import Limits, ServedModel, Serving
from pop_mm.samples import load

TEMPLATE = (
    "{% for t in tools or [] %}w8 {% endfor %}{% if shout %}w7 {% endif %}"
    "{% for m in messages %}{{ m['role'] + ' ' + m['content'] + ' ' }}{% endfor %}"
)
LIMITS = Limits(max_new_tokens=400, waiting=64, body_bytes=200_000, body_seconds=5)
BUDGETS: list[dict[str, float]] = [{}, {"budget": 0.5}, {"budget": 1}, {"ratio": 0.3}, {"ratio": 0}]


def question(number: int, words: int = 24) -> str:
    """A prompt of its own for each number."""
    return " ".join(f"w{3 + (7 * number + 5 * place * (number + 1)) % 90}" for place in range(words))


def folder_of(path: Path, template: str | None = TEMPLATE) -> str:
    return save(path, "llama", template, max_position_embeddings=512, mlp_bias=False, attention_bias=False)


class Expected:
    """The same model in Python."""

    def __init__(self, folder: str) -> None:
        self.model, self.tokenizer = load(folder)
        self._known: dict[str, str] = {}

    def answer(self, text: str, tokens: int = 12, seed: int | None = None, **amount: float) -> str:
        key = json.dumps([text, tokens, seed, amount])
        if key not in self._known:
            self._known[key] = self._generate(text, tokens, seed, amount)
        return self._known[key]

    def _generate(self, text: str, tokens: int, seed: int | None, amount: dict[str, float]) -> str:
        chat = [{"role": "user", "content": text}]
        inputs = self.tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        inputs = {key: inputs[key] for key in ("input_ids", "attention_mask")}
        sampling: dict[str, Any] = {"do_sample": False} if seed is None else {"do_sample": True, "temperature": 0.9}
        torch.manual_seed(seed or 0)
        config = PopConfig(**(amount or {"budget": 0.65}))
        if amount in ({"budget": 1}, {"ratio": 0}):
            output = self.model.generate(**inputs, **sampling, max_new_tokens=tokens)
        else:
            with prune(self.model, config):
                output = self.model.generate(**inputs, **sampling, max_new_tokens=tokens)
        return self.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def client_of(serving: Serving) -> openai.OpenAI:
    http = httpx.Client(trust_env=False, timeout=60)
    return openai.OpenAI(base_url=f"{serving.url}/v1", api_key="none", max_retries=0, http_client=http)


def ask(client: openai.OpenAI, name: str, text: Any, tokens: int = 12, stream: bool = False, **more: Any) -> Any:
    """A chat of one message; ``more`` may have what OpenAI's API does not."""
    own = {key: more.pop(key) for key in ("budget", "ratio", "chat_template_kwargs") if key in more}
    message = {"role": "user", "content": text}
    return client.chat.completions.create(
        model=name, messages=[message], max_tokens=tokens, stream=stream, extra_body=own, **more
    )


def until(condition: Any, what: str, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.005)


def metrics(serving: Serving) -> dict[str, float]:
    lines = httpx.get(f"{serving.url}/metrics", trust_env=False).text.splitlines()
    return {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in lines if not line.startswith("#")}


def data_url(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


__all__ = [
    "BUDGETS",
    "LIMITS",
    "Expected",
    "ServedModel",
    "ask",
    "client_of",
    "data_url",
    "folder_of",
    "metrics",
    "until",
]
