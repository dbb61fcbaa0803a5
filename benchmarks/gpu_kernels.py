"""One decode step of FFNs on a GPU: dense, pruned by torch's kernels, and pruned by the Triton kernels.

Every variant is a CUDA graph over a few FFNs, so that no launch is counted and no pass finds the weights of the one before
in the cache; the variants take turns in every round. It needs a CUDA device. ``--interpret`` only shows, on the CPU and on
tiny FFNs, that the variants compute the same.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from measure import alternate, quartiles, wide_console
from pop_mm.kernels.gpu import MAX_ROWS, FusedStep, GatheredStep
from pop_mm.ops.select import choose
from pop_mm.partition import Sizes, partition_sizes
from pop_mm.weights.layout import FFN, Projection, linear

GAMMA = 0.1
LAYERS = 4
REPLAYS = 10  # of a graph in one timing
SHARES = (0.7, 0.5, 0.4)  # K/D
ROWS = (1, 2, 4, 8)
CLOSE = {torch.bfloat16: 0.05, torch.float32: 1e-4}  # bfloat16: where candidates nearly tie, another one may go
Step = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Shape:
    """One gated FFN with SiLU: hidden size H and intermediate size D."""

    name: str
    hidden: int
    intermediate: int


SHAPES = (
    Shape("llama-2-7b", 4096, 11008),
    Shape("llama-3.1-8b", 4096, 14336),
    Shape("qwen3-8b", 4096, 12288),
    Shape("mixtral-expert", 4096, 14336),
)


@dataclass(frozen=True)
class Result:
    """One shape, K/D, batch and variant; ``byte_ratio`` is what the bytes allow over dense."""

    shape: str
    rows: int
    kept_share: float
    width: int
    variant: str
    microseconds_per_ffn: float
    dense_microseconds_per_ffn: float
    speedup: float
    speedup_quartiles: tuple[float, float]
    byte_ratio: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "reached": self.speedup / self.byte_ratio}


@torch.no_grad()
def make_ffn(shape: Shape, dtype: torch.dtype, device: str, seed: int) -> FFN:
    """A random FFN."""
    size = {"dtype": dtype, "device": device}
    modules = [nn.Linear(shape.hidden, shape.intermediate, False, **size) for _ in range(2)]
    modules.append(nn.Linear(shape.intermediate, shape.hidden, False, **size))
    generator = torch.Generator(device).manual_seed(seed)
    for module in modules:
        module.weight.normal_(0, module.in_features**-0.5, generator=generator).requires_grad_(False)
    gate, up, down = (Projection("", m, "in" if m is modules[2] else "out") for m in modules)
    return FFN(shape.name, 0, (gate, up), down, shape.intermediate, activation=nn.SiLU())


def by_column(ffn: FFN) -> FFN:
    """The same FFN with a copy of down that is stored column by column."""
    module = nn.Linear(ffn.size, ffn.hidden_size, False, device="meta")
    module.weight = nn.Parameter(ffn.down.weight.t().contiguous().t(), requires_grad=False)
    return FFN(ffn.name, 0, ffn.inputs, Projection("", module, "in"), ffn.size, activation=ffn.activation)


def stock_step(ffn: FFN, sizes: Sizes | None, weight: Tensor | None) -> Step:
    """The FFN by torch's kernels: dense, or on narrow views with the choice among the candidates."""
    width = ffn.size if sizes is None else sizes.width
    (gate, _), (up, _), (down, _) = (view for p in ffn.projections for view in p.narrow_views(width))

    def step(x: Tensor) -> Tensor:
        h = nn.functional.silu(linear(x, gate, None)).mul_(linear(x, up, None))
        if sizes is not None:
            candidates = h[:, sizes.retained :]
            together = torch.zeros(len(x), dtype=torch.int64, device=x.device) if len(x) > 1 else None
            dropped = choose(candidates, weight, sizes.candidates_dropped, together, 1)
            candidates.scatter_(1, dropped.expand(len(x), -1), 0)
        return linear(h, down, None)

    return step


def random_channels(rows: int, sizes: Sizes, device: str) -> Tensor:
    """``[B, K]``: channels of each row, drawn by chance, which share fewer of their reads than those of real prompts."""
    order = torch.rand(rows, sizes.channels, device=device).argsort(-1)
    retained, candidates = order[:, : sizes.retained], order[:, sizes.retained : sizes.width]
    return torch.cat([retained.sort(-1).values, candidates.sort(-1).values], 1)


def steps_of(
    ffns: Sequence[FFN], columns: Sequence[FFN], sizes: Sizes, weight: Tensor, channels: Tensor
) -> dict[str, list[Step]]:
    """The variants, one step for each FFN."""
    found: dict[str, list[Step]] = {"dense": [], "views": [], "fused": [], "gathered": []}
    for ffn, column in zip(ffns, columns, strict=True):
        fused, gathered = FusedStep(ffn, sizes), GatheredStep(column, sizes)
        fused.load(weight)
        gathered.load(channels, weight.expand(len(channels), -1))
        for name, step in (
            ("dense", stock_step(ffn, None, None)),
            ("views", stock_step(ffn, sizes, weight)),
            ("fused", fused),
            ("gathered", gathered),
        ):
            found[name].append(step)
    return found


def check(shape: Shape, rows: int, sizes: Sizes, dtype: torch.dtype, device: str) -> None:
    """Fail if the variants disagree where they must not: on the first channels, for rows of their own too."""
    ffn = make_ffn(shape, dtype, device, 0)
    x = torch.randn(rows, shape.hidden, device=device).to(dtype)
    weight = torch.rand(sizes.candidates, device=device)
    first = torch.arange(sizes.width, device=device).expand(rows, -1)
    steps = steps_of([ffn], [by_column(ffn)], sizes, weight, first)
    views, fused, gathered = (steps[name][0](x).float() for name in ("views", "fused", "gathered"))
    alone = torch.cat([steps["views"][0](row).float() for row in x.split(1)])
    for name, found, expected in (("fused", fused, views), ("gathered", gathered, alone)):
        error = float((found - expected).abs().max() / expected.abs().max())
        if not error <= CLOSE[dtype]:
            raise RuntimeError(f"{name} at {shape.name}, batch {rows}: {error:.1e} away from torch's kernels.")


def timed(steps: Sequence[Step], x: Tensor) -> Callable[[], float]:
    """Seconds for one pass through all FFNs, from replays of a CUDA graph."""

    def run() -> None:
        for step in steps:
            step(x)

    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()

    def seconds() -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(REPLAYS):
            graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / REPLAYS

    return seconds


def measure_shape(shape: Shape, rounds: int) -> list[Result]:
    """All K/D and batches of one shape."""
    ffns = [make_ffn(shape, torch.bfloat16, "cuda", seed) for seed in range(LAYERS)]
    columns = [by_column(ffn) for ffn in ffns]
    results = []
    for share in SHARES:
        sizes = partition_sizes(shape.intermediate, 1 - share + GAMMA / 2, GAMMA)
        weight = torch.rand(sizes.candidates, device="cuda")
        for rows in ROWS:
            check(shape, rows, sizes, torch.bfloat16, "cuda")
            x = torch.randn(rows, shape.hidden, device="cuda", dtype=torch.bfloat16)
            channels = random_channels(rows, sizes, "cuda")
            steps = steps_of(ffns, columns, sizes, weight, channels)
            times = alternate({name: timed(own, x) for name, own in steps.items()}, rounds, lambda: 1.0)  # type: ignore[arg-type]
            union = len(channels.unique())
            for name in ("views", "fused", "gathered"):
                low, high = quartiles(times.ratios(name, "dense"))
                results.append(
                    Result(
                        shape.name,
                        rows,
                        share,
                        sizes.width,
                        name,
                        1e6 * times.median(name) / LAYERS,
                        1e6 * times.median("dense") / LAYERS,
                        times.speedup(name, "dense"),
                        (low, high),
                        shape.intermediate / (union if name == "gathered" else sizes.width),
                    )
                )
    return results


def table(results: Sequence[Result]) -> Table:
    """One row for each result."""
    found = Table(
        title=f"FFN decode step under CUDA graphs, bfloat16, gamma {GAMMA:g}, choice among the candidates included",
        caption="dense: all channels by cuBLAS; views: the first K channels by torch's kernels; fused: by Triton kernels; "
        "gathered: each row's own channels,\ndrawn by chance; bytes: channels of dense over those that any row reads; "
        "reached: speed-up over that; brackets: quartiles.",
    )
    for name in ("FFN", "batch", "K/D", "variant", "dense us", "us", "speed-up", "bytes", "reached"):
        found.add_column(name, justify="left" if name in ("FFN", "variant") else "right")
    for r in results:
        low, high = r.speedup_quartiles
        found.add_row(
            r.shape,
            str(r.rows),
            f"{r.kept_share:.1f}",
            r.variant,
            f"{r.dense_microseconds_per_ffn:.1f}",
            f"{r.microseconds_per_ffn:.1f}",
            f"{r.speedup:.2f} \\[{low:.2f}, {high:.2f}]",
            f"{r.byte_ratio:.2f}",
            f"{r.speedup / r.byte_ratio:.2f}",
        )
    return found


def options(description: str | None, shapes: Sequence[str]) -> argparse.ArgumentParser:
    """The options of a benchmark for GPUs."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=shapes, help="one shape")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--json", type=Path, metavar="FILE", help="for all figures")
    parser.add_argument("--interpret", action="store_true", help="a tiny check on the CPU instead")
    return parser


def without_gpu(interpret: bool, check: Callable[[], str]) -> int | None:
    """The exit code where nothing is timed: after a check on the CPU, which says what it found, or without a device."""
    if interpret:
        if os.environ.get("TRITON_INTERPRET") != "1":  # it must be set before anything imports Triton: begin again
            os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, "TRITON_INTERPRET": "1"})
        print(f"{check()}, interpreted on the CPU. Times need a CUDA device.")
        return 0
    if not torch.cuda.is_available():
        print("This benchmark needs a CUDA device, and there is none. --interpret checks the kernels on the CPU.")
        return 2
    return None


def interpret() -> str:
    """Every variant on tiny FFNs on the CPU."""
    for rows, share in ((1, 0.4), (2, 0.7)):
        sizes = partition_sizes(70, 1 - share + GAMMA / 2, GAMMA)
        check(Shape("tiny", 24, 70), rows, sizes, torch.float32, "cpu")
    return "The variants agree on tiny FFNs"


@torch.no_grad()
def main() -> int:
    arguments = options(__doc__, [shape.name for shape in SHAPES]).parse_args()
    console = wide_console()
    torch.manual_seed(0)
    if (code := without_gpu(arguments.interpret, interpret)) is not None:
        return code
    assert max(ROWS) <= MAX_ROWS
    shapes = [shape for shape in SHAPES if arguments.only in (None, shape.name)]
    results = [result for shape in shapes for result in measure_shape(shape, arguments.rounds)]
    device = torch.cuda.get_device_name()
    console.print(f"{device}, torch {torch.__version__}", highlight=False)
    console.print(table(results))
    if arguments.json is not None:
        facts = {"device": device, "torch": torch.__version__, "results": [r.to_dict() for r in results]}
        arguments.json.write_text(json.dumps(facts, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
