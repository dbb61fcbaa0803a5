"""One timed ``generate`` call."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Run:
    """Seconds of one ``generate`` call.

    Attributes
    ----------
    prefill : float
        The forward of the prompt.
    ttft : float
        Up to the first token.
    decode : float
        From the first token to the last; ranking and moving the prompt's channels is in it.
    step : float
        Median time between two tokens.
    end_to_end : float
    peak_bytes : int or None
        Most memory allocated on a GPU; None elsewhere.
    """

    prefill: float
    ttft: float
    decode: float
    step: float
    end_to_end: float
    peak_bytes: int | None = None


class TokenClock:
    """A streamer for ``generate`` that notes when each token comes; the first call brings the prompt."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        """One more token."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is left to do."""


def synchronise(device: torch.device) -> None:
    """Wait until a GPU has done what was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def decode_options(cache: str, compiled: bool) -> dict[str, Any]:
    """Arguments of ``generate`` for a cache, without compilation unless it is asked for."""
    if cache == "dynamic":
        return {}
    options: dict[str, Any] = {"cache_implementation": "static", "disable_compile": not compiled}
    if compiled:
        from transformers import CompileConfig

        options["compile_config"] = config = CompileConfig()
        config._compile_all_devices = True  # else it does not compile on a CPU
    return options


def generate(model: Any, ids: Tensor, new_tokens: int, streamer: Any = None, **options: Any) -> None:
    """Greedy decoding of exactly ``new_tokens`` tokens for ids ``[B, tokens]``."""
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        num_beams=1,
        min_new_tokens=new_tokens,
        max_new_tokens=new_tokens,
        streamer=streamer,
        **options,
    )


def generate_timed(model: Any, ids: Tensor, new_tokens: int, **options: Any) -> Run:
    """:func:`generate`, timed."""
    device, clock = model.device, TokenClock()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    synchronise(device)
    with first_forward(model) as prefill:
        started = time.perf_counter()
        generate(model, ids, new_tokens, clock, **options)
        synchronise(device)
        ended = time.perf_counter()
    tokens = clock.times[1:]
    return Run(
        prefill=prefill[1] - prefill[0],
        ttft=tokens[0] - started,
        decode=tokens[-1] - tokens[0],
        step=statistics.median(after - before for before, after in pairwise(tokens)),
        end_to_end=ended - started,
        peak_bytes=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
    )


@contextmanager
def first_forward(model: Any) -> Iterator[list[float]]:
    """Within: the model's next forward notes its beginning and end, with what a session does before and after it."""
    times: list[float] = []

    def note(hook: int) -> None:
        hooks[hook].remove()  # the decode steps are left alone
        synchronise(model.device)
        times.append(time.perf_counter())

    hooks = [
        model.register_forward_pre_hook(lambda *_: note(0), prepend=True),
        model.register_forward_hook(lambda *_: note(1)),
    ]
    try:
        yield times
    finally:
        for hook in hooks:
            hook.remove()


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """Lower and upper quartile."""
    if len(values) < 2:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


__all__ = ["Run", "decode_options", "generate", "generate_timed", "quartiles", "synchronise"]
