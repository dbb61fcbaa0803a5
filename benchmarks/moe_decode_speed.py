"""Decode speed of routed experts at batch 1: pruned in place against dense, on layers with the dimensions of real models.

Timed are exactly the calls of the experts modules, ``layer.experts(hidden, top_k_index, top_k_weights)``, of one token
through every layer of a stack, within a decode forward of the session: choosing among the candidates is included. The
routes are drawn anew in every round, the same ones for every variant, which take turns on the *same weights*:

- pruned: the session's own in-place path, every expert in place already (moving is in columns of its own);
- same: the same implementation on all channels;
- eager, batched_mm, grouped_mm: what transformers offers, dense;
- views: the same implementation on K channels, none chosen: what the kernels give if choosing were free;
- reading: a loop that only reads the weights, of all channels and of K: what memory gives if computing were free. Half of
  a row of ``down`` is not read in half of the time, since hardware fetches on beyond its end and pages are as many.

Run: ``python benchmarks/moe_decode_speed.py [--only mixtral|qwen3] [--quick] [--json FILE]``; exit code 1 if a target
fails. Mixtral's layers take 6 GB. Timings need a quiet machine: see the README here.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from speed_ffn import PositionCache, fill
from torch import Tensor, nn
from transformers import MixtralConfig, PretrainedConfig, Qwen3MoeConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

import pop_mm
from measure import (
    Evictor,
    Verdict,
    alternate,
    available_cores,
    last_level_cache,
    machine_facts,
    print_machine,
    print_verdicts,
    quartiles,
    wide_console,
)
from pop_mm.adapters import Adapter, ExpertPaths
from pop_mm.executors.run_experts import run_experts
from pop_mm.kernels import Matvec, why_not
from pop_mm.kernels import load as load_kernel
from pop_mm.native.compiler import build
from pop_mm.weights.experts import Experts, ExpertViews

GAMMA = 0.1
KEPT = 0.5  # K / D
TARGET = 0.90
STOCK = ("eager", "batched_mm", "grouped_mm")


@dataclass(frozen=True)
class Shape:
    """The experts of one model: hidden size H, intermediate size D, E experts of which a token uses k."""

    name: str
    kind: str
    hidden: int
    intermediate: int
    experts: int
    top_k: int
    layers: int

    def config(self) -> PretrainedConfig:
        """A config of the real class."""
        if self.kind == "mixtral":
            return MixtralConfig(
                hidden_size=self.hidden,
                intermediate_size=self.intermediate,
                num_local_experts=self.experts,
                num_experts_per_tok=self.top_k,
                num_hidden_layers=self.layers,
            )
        return Qwen3MoeConfig(
            hidden_size=self.hidden,
            moe_intermediate_size=self.intermediate,
            num_experts=self.experts,
            num_experts_per_tok=self.top_k,
            num_hidden_layers=self.layers,
        )

    def module(self, config: PretrainedConfig) -> nn.Module:
        """The experts of one layer: transformers' own class."""
        return MixtralExperts(config) if self.kind == "mixtral" else Qwen3MoeExperts(config)


SHAPES = {
    "mixtral": Shape("Mixtral-8x7B", "mixtral", 4096, 14336, 8, 2, 2),
    "qwen3": Shape("Qwen3-30B-A3B", "qwen3", 2048, 768, 128, 8, 4),
}
QUICK = {
    "mixtral": Shape("tiny Mixtral", "mixtral", 64, 160, 4, 2, 2),
    "qwen3": Shape("tiny Qwen3", "qwen3", 64, 48, 16, 4, 2),
}


@dataclass(frozen=True)
class Result:
    """One shape. Times are milliseconds a layer and token; moves are in dense steps of the same implementation."""

    name: str
    hidden: int
    intermediate: int
    experts: int
    top_k: int
    layers: int
    width: int
    milliseconds: dict[str, float]
    byte_ratio: float
    speedup: float
    speedup_quartiles: tuple[float, float]
    views_speedup: float
    reading_speedup: float | None
    fastest_stock: str
    speedup_over_fastest: float
    move_per_expert: float
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


class ExpertsAdapter(Adapter):
    """Finds the experts of :class:`ExpertsStack`."""

    kind = "moe"
    experts = (ExpertPaths("experts"),)


class ExpertsStack(nn.Module):
    """The experts of a model and nothing else: every layer gets the same hidden states, and routes of its own.

    Attributes
    ----------
    seconds : float
        How long the experts of the latest forward took.
    """

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.config = shape.config()
        self.config._experts_implementation = "grouped_mm"
        with torch.device("meta"):
            self.layers = nn.ModuleList(
                nn.ModuleDict({"experts": shape.module(self.config)}) for _ in range(shape.layers)
            )
        self.to(torch.bfloat16).to_empty(device="cpu")
        self.seconds = 0.0

    def forward(self, inputs_embeds: Tensor, past_key_values: PositionCache, routes: Tensor, weights: Tensor) -> Tensor:
        """Run every layer on ``[1, q, H]`` with routes ``[layers, q, k]``; the last one's output."""
        modules = [layer["experts"] for layer in self.layers]
        started = time.perf_counter()
        for module, ids in zip(modules, routes, strict=True):
            output = module(inputs_embeds[0], ids, weights)
        self.seconds = time.perf_counter() - started
        past_key_values.tokens += inputs_embeds.shape[1]
        return output


def build_stack(shape: Shape) -> ExpertsStack:
    """A stack of random experts in eval mode."""
    return fill(ExpertsStack(shape))


def twins(stack: ExpertsStack, shape: Shape) -> list[nn.Module]:
    """Plain modules on the same memory, with a config of their own."""
    config = shape.config()
    with torch.device("meta"):
        modules = [shape.module(config).eval() for _ in stack.layers]
    for layer, twin in zip(stack.layers, modules, strict=True):
        twin.gate_up_proj, twin.down_proj = layer["experts"].gate_up_proj, layer["experts"].down_proj
    return modules


def run_stock(modules: Sequence[nn.Module], name: str, x: Tensor, routes: Tensor, weights: Tensor) -> float:
    """Seconds of one pass with an implementation of transformers."""
    modules[0].config._experts_implementation = name
    started = time.perf_counter()
    for module, ids in zip(modules, routes, strict=True):
        module(x, ids, weights)
    return time.perf_counter() - started


class SameImplementation:
    """The session's own function on plain modules, ``width`` channels wide, with nothing chosen."""

    def __init__(self, modules: Sequence[nn.Module], top_k: int, width: int, matvec: Matvec | None) -> None:
        self._matvec = matvec
        self._records = [Experts("", index, module, top_k) for index, module in enumerate(modules)]
        self._views: list[dict[int, ExpertViews]] = [
            {expert: record.views(expert, width) for expert in range(record.count)} for record in self._records
        ]

    def __call__(self, x: Tensor, routes: Tensor, weights: Tensor) -> float:
        """Seconds of one pass."""
        started = time.perf_counter()
        for record, views, ids in zip(self._records, self._views, routes, strict=True):
            run_experts(record, x, ids, weights, views.__getitem__, lambda _, h: h, True, self._matvec)
        return time.perf_counter() - started


class Reading:
    """Reads the weights of the routed experts, ``width`` channels wide, and computes nothing; None where nothing compiles."""

    def __init__(self, modules: Sequence[nn.Module], top_k: int, width: int, library: ctypes.CDLL) -> None:
        self._read = library.read_rows
        self._read.argtypes = [ctypes.c_char_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int]
        self._read.restype = ctypes.c_int64
        self._rows = [
            {expert: record.views(expert, width).rows for expert in range(record.count)}
            for record in (Experts("", index, module, top_k) for index, module in enumerate(modules))
        ]

    def __call__(self, routes: Tensor) -> float:
        """Seconds of one pass."""
        started = time.perf_counter()
        for rows, ids in zip(self._rows, routes, strict=True):
            used = [rows[expert] for expert in ids[0].tolist()]
            for side in (0, 1):
                blocks = b"".join(pair[side].blocks for pair in used)
                columns = used[0][side].weights[0].shape[1]
                self._read(blocks, len(blocks) // 24, 2 * columns, torch.get_num_threads())
        return time.perf_counter() - started


def reading_library() -> ctypes.CDLL | None:
    """``read_rows.c``, compiled; None without a compiler."""
    if why_not() is not None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder, "read_rows.so")
        if (reason := build([Path(__file__).with_name("read_rows.c")], made)) is not None:
            raise RuntimeError(reason)
        return ctypes.CDLL(str(made))


@torch.no_grad()
def measure_shape(shape: Shape, rounds: int, evict: Evictor, kernels: str) -> Result:
    """All variants of one shape."""
    matvec = load_kernel(kernels)
    stack = build_stack(shape)
    generator = torch.Generator().manual_seed(1)

    def hidden(tokens: int) -> Tensor:
        return torch.randn(1, tokens, shape.hidden, generator=generator).bfloat16()

    def routes(tokens: int) -> Tensor:
        scores = torch.rand(shape.layers, tokens, shape.experts, generator=generator)
        return scores.topk(shape.top_k, -1).indices

    def every_expert() -> Tensor:
        """Routes of as many tokens as it takes to reach all experts of all layers."""
        turn = torch.arange(-(-shape.experts // shape.top_k) * shape.top_k) % shape.experts
        return turn.view(-1, shape.top_k).expand(shape.layers, -1, -1)

    def weights(tokens: int) -> Tensor:
        return torch.full((tokens, shape.top_k), 1 / shape.top_k, dtype=torch.bfloat16)

    config = pop_mm.PopConfig(
        ratio=1 - KEPT + GAMMA / 2, scope="ffn", method=pop_mm.Pop(gamma=GAMMA), backend="inplace", kernels=kernels
    )
    session = pop_mm.prune(stack, config, adapter=ExpertsAdapter())
    width = session.plans[0].sizes.width
    with session:
        plain = twins(stack, shape)  # within: a session leaves weights alone that another model holds
        cache, everyone = PositionCache(), every_expert()
        stack(hidden(everyone.shape[1]), cache, everyone, weights(everyone.shape[1]))
        for token in range(everyone.shape[1]):  # the first use of each expert moves its channels
            stack(hidden(1), cache, everyone[:, token : token + 1], weights(1))
        moving = session.report.timings.moving
        same, views = (SameImplementation(plain, shape.top_k, k, matvec) for k in (shape.intermediate, width))
        x, share, ids = hidden(1), weights(1), routes(1)

        def pruned() -> float:
            stack(x, cache, ids, share)
            return stack.seconds

        variants: dict[str, Callable[[], float]] = {
            "pruned": pruned,
            "same": lambda: same(x[0], ids, share),
            "views": lambda: views(x[0], ids, share),
            **{name: lambda name=name: run_stock(plain, name, x[0], ids, share) for name in STOCK},
        }
        library = reading_library()
        if library is not None:
            whole, narrow = (Reading(plain, shape.top_k, k, library) for k in (shape.intermediate, width))
            variants["read whole"] = lambda: whole(ids)
            variants["read narrow"] = lambda: narrow(ids)

        def redraw() -> None:
            nonlocal x, ids
            x, ids = hidden(1), routes(1)

        times = alternate(variants, rounds, evict, before_round=redraw)
        started = time.perf_counter()
    restore = time.perf_counter() - started
    if session.report.timings.masked_forwards:
        raise RuntimeError("Decode ran masked: the in-place path was not what has been timed.")
    fastest = min(STOCK, key=times.median)
    step = times.median("same")
    return Result(
        name=shape.name,
        hidden=shape.hidden,
        intermediate=shape.intermediate,
        experts=shape.experts,
        top_k=shape.top_k,
        layers=shape.layers,
        width=width,
        milliseconds={name: 1e3 * times.median(name) / shape.layers for name in variants},
        byte_ratio=shape.intermediate / width,
        speedup=times.speedup("pruned", "same"),
        speedup_quartiles=quartiles(times.ratios("pruned", "same")),
        views_speedup=times.speedup("views", "same"),
        reading_speedup=times.speedup("read narrow", "read whole") if library is not None else None,
        fastest_stock=fastest,
        speedup_over_fastest=times.speedup("pruned", fastest),
        move_per_expert=moving / (shape.layers * shape.experts) / (step / shape.layers / shape.top_k),
        restore=restore / (shape.layers * shape.experts) / (step / shape.layers / shape.top_k),
        rounds=len(times.seconds["same"]),
        discarded=times.discarded,
        read_gb_s=times.read_gb_s,
    )


def show(console: Console, results: Sequence[Result], kernels: str) -> None:
    """One row a shape."""
    table = Table(
        title=f"Experts of one layer, one token, bf16, gamma {GAMMA:g}: dense against in place, choosing included; "
        f"{kernels} kernels",
        caption="same: the same implementation on all channels; views: on K channels, none chosen; reading: reads them and "
        "computes nothing;\nreached: speed-up over same / (D/K).\n"
        "move, restore: once a prompt (or session) and expert, in dense steps of that expert.",
    )
    names = ("experts", "H x D", "K/D", *(f"{name}\nms" for name in STOCK), "same\nms", "pruned\nms")
    rest = ("speed-up\nover same", "views", "reading", "D/K", "reached", "speed-up\nover fastest", "move", "restore")
    for name in (*names, *rest):
        table.add_column(name, justify="right", no_wrap=True)
    for r in results:
        low, high = r.speedup_quartiles
        colour = "[green]" if r.quotient >= TARGET else "[red]"
        table.add_row(
            f"{r.name}\n{r.experts}, top {r.top_k}",
            f"{r.hidden} x {r.intermediate}",
            f"{r.width / r.intermediate:.2f}",
            *(f"{r.milliseconds[name]:.3g}" for name in (*STOCK, "same", "pruned")),
            f"{r.speedup:.2f}\n\\[{low:.2f}, {high:.2f}]",
            f"{r.views_speedup:.2f}",
            "-" if r.reading_speedup is None else f"{r.reading_speedup:.2f}",
            f"{r.byte_ratio:.2f}",
            f"{colour}{r.quotient:.2f}[/]",
            f"{r.speedup_over_fastest:.2f}",
            f"{r.move_per_expert:.1f}",
            f"{r.restore:.1f}",
        )
    console.print(table)


def verdicts(results: Sequence[Result], judged: bool) -> list[Verdict]:
    """Two targets a shape."""
    found = []
    for r in results:
        found.append(
            Verdict(
                f"{r.name}, {KEPT:.0%} kept: {r.quotient:.2f} of the byte ratio over the same implementation (target "
                f"{TARGET:.2f})",
                r.quotient >= TARGET if judged else None,
            )
        )
        found.append(
            Verdict(
                f"{r.name}, {KEPT:.0%} kept: {r.speedup_over_fastest:.2f} times as fast as the fastest stock "
                f"implementation, {r.fastest_stock} (target: not slower)",
                r.speedup_over_fastest >= 1 if judged else None,
            )
        )
    return found


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=tuple(SHAPES), help="one model instead of both")
    parser.add_argument("--rounds", type=int, help="rounds (15)")
    parser.add_argument("--threads", type=int, default=available_cores())
    parser.add_argument(
        "--kernels", choices=("auto", "stock", "compiled"), default="auto", help="of pruned, same and views"
    )
    parser.add_argument("--quick", action="store_true", help="tiny shapes, 2 rounds: does it run?")
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; the exit code."""
    args = parse(argv)
    torch.set_num_threads(args.threads)
    console, machine = wide_console(), machine_facts()
    print_machine(console, machine)
    shapes = QUICK if args.quick else SHAPES
    rounds = args.rounds or (2 if args.quick else 15)
    evict = Evictor((1 << 20) if args.quick else 5 * last_level_cache() // 4)
    results = []
    with Progress(console=Console(file=sys.stderr), transient=True, refresh_per_second=1) as progress:
        for name in progress.track([args.only] if args.only else list(shapes), description="experts"):
            results.append(measure_shape(shapes[name], rounds, evict, args.kernels))
            gc.collect()
    show(console, results, "compiled" if load_kernel(args.kernels) else "stock")
    found = verdicts(results, not args.quick)
    if args.json:
        result = {
            "machine": machine,
            "results": [result.to_dict() for result in results],
            "verdicts": [verdict.to_dict() for verdict in found],
        }
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    return print_verdicts(console, found)


if __name__ == "__main__":
    sys.exit(main())
