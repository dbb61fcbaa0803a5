"""Decode speed of each setting of README's table, against the dense model on torch's kernels, all in turn in one run.

    python benchmarks/threshold_speed.py [--rounds 3]

SmolLM2-135M in float32, 128 tokens of prompt, 96 decoded, through ``generate``. Needs a quiet machine.
"""

from __future__ import annotations

import argparse
import time
from contextlib import nullcontext
from statistics import median
from typing import Any

import torch
from transformers.utils import logging

import pop_mm
from pop_mm.passages import load_passages
from pop_mm.samples import load

SETTINGS: dict[str, dict[str, Any] | None] = {
    "dense": None,
    "dense, our kernels": {"ratio": 0.0, "kernels": "compiled"},
    "thresholds 0.75": {"budget": 0.75},
    "thresholds 0.65": {"budget": 0.65},
    "POP 20 %": {"ratio": 0.2},
    "POP 40 %": {"ratio": 0.4},
}
PROMPT, DECODED = 128, 96


def tokens_per_second(model: Any, ids: torch.Tensor) -> float:
    """Of decode steps alone: a run of one token is taken off one of many."""

    def seconds(tokens: int) -> float:
        started = time.perf_counter()
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
        )
        return time.perf_counter() - started

    seconds(4)  # a first call is slower
    once = seconds(1)
    return DECODED / (seconds(1 + DECODED) - once)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    logging.set_verbosity_error()
    model, tokenizer = load("smollm2-135m")
    text = " ".join(load_passages().values())
    ids = tokenizer(text, return_tensors="pt").input_ids[:, :PROMPT]
    found: dict[str, list[float]] = {name: [] for name in SETTINGS}
    for _ in range(rounds):
        for name, settings in SETTINGS.items():
            with nullcontext() if settings is None else pop_mm.prune(model, **settings):
                found[name].append(tokens_per_second(model, ids))
    for name, values in found.items():
        ratios = [value / dense for value, dense in zip(values, found["dense"], strict=True)]
        print(
            f"{name:20} {median(values):6.1f} tokens/s  {median(ratios):.2f}x  ({min(ratios):.2f} to {max(ratios):.2f})"
        )


if __name__ == "__main__":
    main()
