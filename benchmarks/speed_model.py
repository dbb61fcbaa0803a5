"""Whole model: ``generate`` with batch 1, dense and pruned in turn, next to what the model's bytes allow."""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn
from transformers.generation.streamers import BaseStreamer

import pop_mm
from measure import Verdict
from pop_mm.backends.inplace import direct_forward, direct_forward_fits
from pop_mm.kernels import Matvec
from pop_mm.kernels import load as load_kernel
from pop_mm.layout import FFN
from pop_mm.passages import load_passages
from pop_mm.phase import Forward, Phase
from pop_mm.session import plan_ffns

OVERALL = (0.2, 0.4)
FASTER_AT = 0.4  # this ratio must beat dense


@dataclass(frozen=True)
class Run:
    """Seconds of one ``generate`` call.

    ``decode`` is the time from the first new token to the last, the per-prompt move included; ``step`` the median time
    between two tokens.
    """

    end_to_end: float
    decode: float
    step: float


@dataclass(frozen=True)
class ModelResult:
    """One overall ratio and kind of kernels; 0 is the dense model. Speed-ups are medians of in-round ratios to stock dense."""

    ratio: float
    kernels: str
    ffn_ratio: float
    kept_share: float
    decode_tokens_per_s: float
    step_ms: float
    end_to_end_s: float
    decode_speedup: float
    step_speedup: float
    end_to_end_speedup: float
    byte_limit: float
    bytes_per_token: int
    rounds: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


class TokenClock(BaseStreamer):
    """Notes when each token comes; the first call brings the prompt."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        """One more token."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is left to do."""


def generate_timed(model: Any, ids: Tensor, new_tokens: int) -> Run:
    """Greedy decoding of exactly ``new_tokens`` tokens."""
    clock = TokenClock()
    started = time.perf_counter()
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        min_new_tokens=new_tokens,
        max_new_tokens=new_tokens,
        streamer=clock,
    )
    ended = time.perf_counter()
    tokens = clock.times[1:]
    steps = [after - before for before, after in pairwise(tokens)]
    return Run(ended - started, tokens[-1] - tokens[0], statistics.median(steps))


def bytes_per_token(model: nn.Module, ratio: float) -> tuple[int, float, float]:
    """Bytes of weights that one decoded token reads, FFN ratio and K/D, from the model's own tensors.

    Everything is read in full, except K of D channels of every FFN, K = |R| + |C|, and the input embedding: of that
    only one row is read, unless it is the lm_head too.
    """
    plans = plan_ffns(model, pop_mm.PopConfig(ratio=ratio))
    ffn = dict.fromkeys(p.weight for plan in plans for p in plan.ffn.projections)
    embedding = model.get_input_embeddings().weight
    tied = model.get_output_embeddings() is not None and model.get_output_embeddings().weight is embedding
    rest = [p for p in model.parameters() if p not in ffn and (tied or p is not embedding)]
    narrow = sum(
        p.weight.nbytes * plan.sizes.width / plan.sizes.channels for plan in plans for p in plan.ffn.projections
    )
    width, channels = sum(p.sizes.width for p in plans), sum(p.sizes.channels for p in plans)
    ffn_ratio = sum(p.ratio * p.sizes.channels for p in plans) / channels
    return round(narrow) + sum(p.nbytes for p in rest), ffn_ratio, width / channels


def measure_model(
    model: Any, tokenizer: Any, prompt: int, new_tokens: int, rounds: int, tick: Callable[[], None]
) -> list[ModelResult]:
    """Dense and every overall ratio, in random order in each round; one round to warm up. A round is one passage."""
    passages = list(load_passages().values())
    order = random.Random(0)
    matvec = load_kernel("auto")
    variants = [(ratio, name) for name in ("stock", *(["compiled"] if matvec else [])) for ratio in (0.0, *OVERALL)]
    runs: list[dict[tuple[float, str], Run]] = []
    for number in range(rounds + 1):
        ids = tokenizer(passages[number % len(passages)], return_tensors="pt").input_ids[:, :prompt]
        found = {}
        for ratio, name in order.sample(variants, len(variants)):
            gc.collect()
            with running(model, ratio, name, matvec):
                found[ratio, name] = generate_timed(model, ids, new_tokens)
        if number:
            runs.append(found)
        tick()
    dense_bytes = bytes_per_token(model, 0.0)[0]
    results = []
    for ratio, name in variants:
        size, ffn_ratio, kept = bytes_per_token(model, ratio)

        def median(field: str, key: tuple[float, str] = (ratio, name)) -> float:
            return statistics.median(getattr(found[key], field) for found in runs)

        def speedup(field: str, key: tuple[float, str] = (ratio, name)) -> float:
            return statistics.median(getattr(found[0.0, "stock"], field) / getattr(found[key], field) for found in runs)

        results.append(
            ModelResult(
                ratio=ratio,
                kernels=name,
                ffn_ratio=ffn_ratio,
                kept_share=kept,
                decode_tokens_per_s=(new_tokens - 1) / median("decode"),
                step_ms=1e3 * median("step"),
                end_to_end_s=median("end_to_end"),
                decode_speedup=speedup("decode"),
                step_speedup=speedup("step"),
                end_to_end_speedup=speedup("end_to_end"),
                byte_limit=dense_bytes / size,
                bytes_per_token=size,
                rounds=len(runs),
            )
        )
    return results


def running(model: Any, ratio: float, kernels: str, matvec: Matvec | None) -> AbstractContextManager[object]:
    """Within: the model is pruned in place; ratio 0 is the dense model, with the compiled kernel if that is asked for."""
    if ratio:
        return pop_mm.prune(model, ratio=ratio, backend="inplace", kernels=kernels)
    return dense_on_kernel(model, matvec) if kernels == "compiled" else nullcontext()


@contextmanager
def dense_on_kernel(model: Any, matvec: Matvec | None) -> Iterator[None]:
    """Within: the dense FFNs compute a single token by the compiled kernel, all channels."""
    single = Forward(Phase.DECODE, None, 1, 1, single=True)
    holders = []
    for plan in plan_ffns(model, pop_mm.PopConfig(0.2)):
        ffn = plan.ffn
        if not isinstance(ffn, FFN) or ffn.holder is None or not direct_forward_fits(ffn):
            continue
        own, compute = ffn.holder.forward, direct_forward(ffn, ffn.size, None, matvec)

        def forward(x: Tensor, own: Any = own, compute: Any = compute) -> Tensor:
            return compute(x, single) if x.shape[:-1].numel() == 1 else own(x)

        ffn.holder.forward = forward
        holders.append(ffn.holder)
    try:
        yield
    finally:
        for holder in holders:
            del holder.__dict__["forward"]


def model_steps(rounds: int) -> int:
    """How often :func:`measure_model` calls ``tick``."""
    return rounds + 1


def model_table(results: Sequence[ModelResult], name: str, prompt: int, new_tokens: int) -> Table:
    """One row for each ratio."""
    table = Table(
        title=f"{name}, generate, batch 1, {prompt} tokens in, {new_tokens} out, greedy",
        caption="decode: first to last new token, with the per-prompt move; step: median time of one token.\n"
        "In parentheses: speed-up over dense with stock kernels, the median of in-round ratios.",
    )
    for column in (
        "overall",
        "FFN kernels",
        "of each FFN",
        "K/D",
        "decode tokens/s",
        "step ms",
        "end to end s",
        "byte limit",
    ):
        table.add_column(column, justify="right", no_wrap=True)
    for r in results:
        pruned = r.ratio > 0 or r.kernels != "stock"
        table.add_row(
            f"{r.ratio:.0%}" if r.ratio else "dense",
            r.kernels,
            f"{r.ffn_ratio:.1%}" if pruned else "-",
            f"{r.kept_share:.3f}",
            f"{r.decode_tokens_per_s:.1f}" + (f" ({r.decode_speedup:.2f})" if pruned else ""),
            f"{r.step_ms:.2f}" + (f" ({r.step_speedup:.2f})" if pruned else ""),
            f"{r.end_to_end_s:.2f}" + (f" ({r.end_to_end_speedup:.2f})" if pruned else ""),
            f"{r.byte_limit:.2f}" if r.ratio else "-",
        )
    return table


def model_verdicts(results: Sequence[ModelResult], judged: bool) -> list[Verdict]:
    """At 40 % overall, decode is faster than dense."""
    return [
        Verdict(
            f"whole model, {r.ratio:.0%} overall, {r.kernels} kernels: decode {r.decode_speedup:.2f} times as fast as dense, "
            f"byte limit {r.byte_limit:.2f} (target: above 1)",
            r.decode_speedup > 1 if judged else None,
        )
        for r in results
        if r.ratio == FASTER_AT
    ]
