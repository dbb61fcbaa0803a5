"""FFN level: one decode step of Llama FFNs, pruned in place (scoring and selection included) against dense.

The timed region is exactly the calls of the FFN modules, ``layer.mlp(x)`` for every layer of a stack, within a forward
of phase decode. Three variants take turns on the *same weights*:

- pruned: the session's own in-place path;
- dense: modules without any hook whose parameters are the very same tensors (reordering does not change the function);
- views: such modules on narrow views of them, K channels wide: what the kernels give if choosing channels were free.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

import torch
from rich.table import Table
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

import pop_mm
from measure import Evictor, Verdict, alternate, last_level_cache, quartiles
from pop_mm.report.report import Report

Stack = TypeVar("Stack", bound=nn.Module)
GAMMA = 0.1
PROMPT_TOKENS = 16
SIMILAR = 0.1  # share of R and C that the second prompt replaces
MAX_STACK = 6 << 30


@dataclass(frozen=True)
class Shape:
    """One FFN: hidden size H, intermediate size D, dtype, and the share of D/K that the speed-up must reach."""

    hidden: int
    intermediate: int
    dtype: str
    targets: dict[float, float] = field(default_factory=dict)  # K/D -> target

    @property
    def bytes(self) -> int:
        """Of one FFN's weights."""
        return 3 * self.hidden * self.intermediate * getattr(torch, self.dtype).itemsize


_LARGE = {0.7: 0.90, 0.5: 0.90, 0.4: 0.90}
SHAPES = (
    Shape(2048, 8192, "float32", _LARGE),
    Shape(2048, 8192, "bfloat16", _LARGE),
    Shape(4096, 14336, "float32", _LARGE),
    Shape(4096, 14336, "bfloat16", _LARGE),
    Shape(576, 1536, "float32", {0.7: 0.85, 0.5: 0.80, 0.4: 0.75}),
)
QUICK_SHAPES = (Shape(64, 160, "float32", {0.5: 0.9}),)


@dataclass(frozen=True)
class FFNResult:
    """One shape at one K/D. Times of moves are in dense steps of the same FFNs (1.0 = as long as one dense step)."""

    hidden: int
    intermediate: int
    dtype: str
    layers: int
    kept_share: float
    width: int
    dense_ms_per_layer: float
    pruned_ms_per_layer: float
    views_ms_per_layer: float
    speedup: float
    speedup_quartiles: tuple[float, float]
    views_speedup: float
    byte_ratio: float
    target: float
    move_first: float
    move_similar: float
    similar_changed: float
    rank: float
    restore: float
    rounds: int
    discarded: int
    read_gb_s: float

    @property
    def quotient(self) -> float:
        """Share of the byte ratio that was reached."""
        return self.speedup / self.byte_ratio

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "quotient": self.quotient}


class PositionCache:
    """A cache for a model without attention: it only counts tokens, which is what tells prefill from decode."""

    def __init__(self) -> None:
        self.tokens = 0

    def get_seq_length(self) -> int:
        """Tokens so far."""
        return self.tokens


class FFNStack(nn.Module):
    """The FFNs of a Llama model and nothing else; every layer gets the same input.

    Attributes
    ----------
    seconds : float
        How long the FFNs of the latest forward took.
    """

    def __init__(self, shape: Shape, layers: int) -> None:
        super().__init__()
        self.config = LlamaConfig(
            hidden_size=shape.hidden, intermediate_size=shape.intermediate, num_hidden_layers=layers
        )
        with torch.device("meta"):
            self.layers = nn.ModuleList(nn.ModuleDict({"mlp": LlamaMLP(self.config)}) for _ in range(layers))
        self.to_empty(device="cpu").to(getattr(torch, shape.dtype))
        self.seconds = 0.0

    def forward(self, inputs_embeds: Tensor, past_key_values: PositionCache) -> Tensor:
        """Run every FFN on ``[1, q, H]``; the last one's output."""
        mlps = [layer["mlp"] for layer in self.layers]
        started = time.perf_counter()
        for mlp in mlps:
            output = mlp(inputs_embeds)
        self.seconds = time.perf_counter() - started
        past_key_values.tokens += inputs_embeds.shape[1]
        return output


def build(shape: Shape, layers: int) -> FFNStack:
    """A stack of random FFNs in eval mode."""
    return fill(FFNStack(shape, layers))


def fill(stack: Stack) -> Stack:
    """Random weights; in eval mode."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in stack.parameters():
            parameter.uniform_(-0.03, 0.03, generator=generator)
    return stack.eval().requires_grad_(False)


def twins(stack: FFNStack, width: int) -> list[LlamaMLP]:
    """Plain modules on the same memory, ``width`` channels wide."""
    with torch.device("meta"):
        modules = [LlamaMLP(stack.config).eval() for _ in stack.layers]
    for layer, twin in zip(stack.layers, modules, strict=True):
        for name, part in (
            ("gate_proj", (slice(width),)),
            ("up_proj", (slice(width),)),
            ("down_proj", (..., slice(width))),
        ):
            weight = getattr(layer["mlp"], name).weight
            getattr(twin, name).weight = nn.Parameter(weight[part], requires_grad=False)
    return modules


def run_plain(mlps: Sequence[LlamaMLP], x: Tensor) -> float:
    """Seconds for one pass, as :meth:`FFNStack.forward` takes them."""
    started = time.perf_counter()
    for mlp in mlps:
        mlp(x)
    return time.perf_counter() - started


def similar_prompt(stack: FFNStack, width: int, prompt: Tensor, other: Tensor) -> Tensor:
    """A mix of two prompts whose best ``width`` channels differ from the first's by :data:`SIMILAR`, by bisection."""
    mlp = stack.layers[0]["mlp"]
    norms = mlp.down_proj.weight.float().norm(dim=0)

    def best(x: Tensor) -> set[int]:
        h = mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)
        return set((h[0].float().norm(dim=0) * norms).topk(width).indices.tolist())

    before = best(prompt)
    low, high = 0.0, 1.0
    for _ in range(8):
        middle = (low + high) / 2
        changed = 1 - len(before & best(prompt.lerp(other, middle))) / width
        low, high = (middle, high) if changed < SIMILAR else (low, middle)
    return prompt.lerp(other, low)


@torch.no_grad()
def measure_shape(
    shape: Shape, rounds: int, stack_bytes: int, evict: Evictor, tick: Callable[[], None]
) -> list[FFNResult]:
    """All K/D of one shape."""
    layers = max(2, min(round(stack_bytes / shape.bytes), MAX_STACK // shape.bytes))
    stack = build(shape, layers)
    generator = torch.Generator().manual_seed(1)
    prompt, other, token = (
        torch.randn(1, q, shape.hidden, generator=generator).to(getattr(torch, shape.dtype))
        for q in (PROMPT_TOKENS, PROMPT_TOKENS, 1)
    )
    results = []
    for kept_share, target in shape.targets.items():
        # |R| + |C| = (1 - r + gamma / 2) D
        config = pop_mm.PopConfig(
            ratio=1 - kept_share + GAMMA / 2,
            scope="ffn",
            method=pop_mm.Pop(gamma=GAMMA),
            backend="inplace",
            kernels="stock",
        )
        session = pop_mm.prune(stack, config)
        width = session.plans[0].sizes.width
        second = similar_prompt(stack, width, prompt, other)
        with session:
            dense = twins(stack, shape.intermediate)  # within: a session leaves weights alone that another model holds
            cache = _start(stack, prompt, token)
            first = session.report
            first_move, rank, front = first.timings.moving, first.timings.partitioning, _front(first)
            del cache
            cache = _start(stack, second, token)
            both = session.report
            second_move = both.timings.moving - first_move
            changed = [len(before - after) / width for before, after in zip(front, _front(both), strict=True)]

            def pruned(cache: PositionCache = cache) -> float:
                stack(inputs_embeds=token, past_key_values=cache)
                return stack.seconds

            narrow = twins(stack, width)
            variants = {
                "dense": lambda dense=dense: run_plain(dense, token),
                "pruned": pruned,
                "views": lambda narrow=narrow: run_plain(narrow, token),
            }
            times = alternate(variants, rounds, evict)
            started = time.perf_counter()
        restore = time.perf_counter() - started
        del dense, narrow, variants
        if session.report.timings.masked_forwards:
            raise RuntimeError("Decode ran masked: the in-place path was not what has been timed.")
        step = times.median("dense")
        low, high = quartiles(times.ratios("pruned", "dense"))
        results.append(
            FFNResult(
                hidden=shape.hidden,
                intermediate=shape.intermediate,
                dtype=shape.dtype,
                layers=layers,
                kept_share=kept_share,
                width=width,
                dense_ms_per_layer=1e3 * step / layers,
                pruned_ms_per_layer=1e3 * times.median("pruned") / layers,
                views_ms_per_layer=1e3 * times.median("views") / layers,
                speedup=times.speedup("pruned", "dense"),
                speedup_quartiles=(low, high),
                views_speedup=times.speedup("views", "dense"),
                byte_ratio=shape.intermediate / width,
                target=target,
                move_first=first_move / step,
                move_similar=second_move / step,
                similar_changed=statistics.mean(changed),
                rank=rank / step,
                restore=restore / step,
                rounds=len(times.seconds["dense"]),
                discarded=times.discarded,
                read_gb_s=times.read_gb_s,
            )
        )
        tick()
    return results


def _start(stack: FFNStack, prompt: Tensor, token: Tensor) -> PositionCache:
    """Prefill and the first decode step, which moves the channels."""
    cache = PositionCache()
    stack(inputs_embeds=prompt, past_key_values=cache)
    stack(inputs_embeds=token, past_key_values=cache)
    return cache


def _front(report: Report) -> list[set[int]]:
    """R and C of every layer."""
    return [set(ffn.partition.front().tolist()) for ffn in report.ffns]


def measure_ffn(quick: bool, rounds: int, tick: Callable[[], None]) -> list[FFNResult]:
    """All shapes; a stack is four last-level caches large (at most 6 GB), so that no pass finds it cached."""
    cache = (1 << 20) if quick else last_level_cache()
    evict = Evictor(5 * cache // 4)
    results = []
    for shape in QUICK_SHAPES if quick else SHAPES:
        results += measure_shape(shape, rounds, max(4 * cache, 0 if quick else 1 << 30), evict, tick)
        gc.collect()
    return results


def ffn_steps(quick: bool) -> int:
    """How often :func:`measure_ffn` calls ``tick``."""
    return sum(len(shape.targets) for shape in (QUICK_SHAPES if quick else SHAPES))


def ffn_table(results: Sequence[FFNResult]) -> Table:
    """One row for each shape and K/D."""
    table = Table(
        title=f"FFN decode step, batch 1, gamma {GAMMA:g}: dense against in place, scoring and selection included",
        caption="views: the same kernels on K channels, none chosen; reached: speed-up / (D/K); brackets: quartiles.\n"
        "Once a prompt, in dense FFN steps: moving channels for the 1st prompt and for a similar one (share of R and C "
        "that changed), ranking them; restore: on leaving the session.",
    )
    speeds = ("H x D", "dtype", "K/D", "dense\nms", "pruned\nms", "speed-up", "views", "D/K", "reached", "target")
    for name in (*speeds, "1st\nmove", "similar\nmove", "rank", "restore"):
        table.add_column(name, justify="right", no_wrap=True)
    for r in results:
        low, high = r.speedup_quartiles
        reached = "[green]" if r.quotient >= r.target else "[red]"
        table.add_row(
            f"{r.hidden} x {r.intermediate}",
            {"float32": "fp32", "bfloat16": "bf16"}.get(r.dtype, r.dtype),
            f"{r.width / r.intermediate:.2f}",
            f"{r.dense_ms_per_layer:.3g}",
            f"{r.pruned_ms_per_layer:.3g}",
            f"{r.speedup:.2f} \\[{low:.2f}, {high:.2f}]",
            f"{r.views_speedup:.2f}",
            f"{r.byte_ratio:.2f}",
            f"{reached}{r.quotient:.2f}[/]",
            f"{r.target:.2f}",
            f"{r.move_first:.1f}",
            f"{r.move_similar:.1f} ({r.similar_changed:.0%})",
            f"{r.rank:.2f}",
            f"{r.restore:.1f}",
        )
    return table


def ffn_verdicts(results: Sequence[FFNResult], judged: bool) -> list[Verdict]:
    """One target a row."""
    return [
        Verdict(
            f"FFN {r.hidden} x {r.intermediate} {r.dtype}, {r.kept_share:.0%} kept: {r.quotient:.2f} of the byte ratio "
            f"(target {r.target:.2f})",
            r.quotient >= r.target if judged else None,
        )
        for r in results
    ]
