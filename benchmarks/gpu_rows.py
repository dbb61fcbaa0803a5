"""Matrices of decoder layers for one token on a GPU: dense by cuBLAS, and by chosen rows (thresholds) in Triton.

    python benchmarks/gpu_rows.py [--only llama-2-7b|llama-3.1-8b] [--budget 0.65 ...] [--json FILE]
    python benchmarks/gpu_rows.py --interpret        # on the CPU, on a tiny layer: that both compute the same

Both are CUDA graphs over a few layers (q, k and v, o, FFN; random weights and inputs, bfloat16), so that no launch is counted
and no pass finds the weights of the one before in the cache; they take turns in every round. Thresholds keep the shares of
entries that a session keeps at that budget. *Of 1/bytes* is the speed-up times the share of the bytes that is read: 1.0 is all
that reading less allows. What lies between the matrices is the same on both sides and left out. Needs a CUDA device.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from gpu_kernels import options, timed, without_gpu
from rich.table import Table
from torch import Tensor
from torch.nn.functional import linear, silu

from measure import alternate, quartiles, save_json, wide_console
from pop_mm.methods.budget import Weights, threshold_shares
from pop_mm.ops import reference
from pop_mm.ops.gpu_rows import GPURowsFFN, GPURowsLinear
from pop_mm.ops.reference import FFNWeights

LAYERS = 8
CLOSE = {torch.bfloat16: 0.03, torch.float32: 1e-4}  # of the largest output


@dataclass(frozen=True)
class Shape:
    """Hidden size, outputs of k and of v, intermediate size."""

    name: str
    hidden: int
    key: int
    intermediate: int

    def shares(self, budget: float) -> tuple[float, float]:
        """Entries of x, and of h, that are kept."""
        square, ffn = self.hidden * self.hidden, self.hidden * self.intermediate
        x = 2 * square + 2 * self.hidden * self.key + 2 * ffn
        return threshold_shares(Weights(x=x, h=ffn, dense=0), budget)


SHAPES = (Shape("llama-2-7b", 4096, 4096, 11008), Shape("llama-3.1-8b", 4096, 1024, 14336))
TINY = Shape("tiny", 48, 16, 80)


class Layer:
    """One layer's matrices, dense and input-major, and thresholds that keep shares of random inputs."""

    def __init__(self, shape: Shape, shares: tuple[float, float], dtype: torch.dtype, device: str, seed: int) -> None:
        made = torch.Generator(device).manual_seed(seed)

        def matrix(outputs: int, inputs: int) -> Tensor:
            weight = torch.empty(outputs, inputs, dtype=dtype, device=device)
            return weight.normal_(0, inputs**-0.5, generator=made)

        hidden, wide = shape.hidden, shape.intermediate
        self.inward = [matrix(n, hidden) for n in (hidden, shape.key, shape.key)]
        self.outward = matrix(hidden, hidden)
        self.gate, self.up, self.down = matrix(wide, hidden), matrix(wide, hidden), matrix(hidden, wide)
        self.x = torch.randn(1, hidden, generator=made, device=device).to(dtype)
        h = silu(linear(self.x, self.gate)) * linear(self.x, self.up)
        self.norms = torch.ones(1, wide, dtype=torch.float32, device=device)
        self.bounds = [below(values, share) for values, share in zip((self.x, h), shares, strict=True)]
        turned = [weight.t().contiguous() for weight in (self.gate, self.up, self.down)]
        views = [(weight, None) for weight in turned]
        self.weights = FFNWeights.alone(views[0], views[1], views[2], "silu", self.norms[0])
        self.rows_in = GPURowsLinear([(weight.t().contiguous(), None) for weight in self.inward])
        self.rows_out = GPURowsLinear([(self.outward.t().contiguous(), None)])
        self.rows_ffn = GPURowsFFN(self.weights)

    def dense(self, _: Tensor) -> Tensor:
        """All matrices by torch's kernels."""
        for weight in (*self.inward, self.outward):
            out = linear(self.x, weight)
        return out + linear(silu(linear(self.x, self.gate)).mul_(linear(self.x, self.up)), self.down)

    def rows(self, _: Tensor) -> Tensor:
        """The same by chosen rows."""
        bound_x, bound_h = self.bounds
        self.rows_in(self.x, bound_x)
        (out,) = self.rows_out(self.x, bound_x)
        return out + self.rows_ffn(self.x, bound_x, bound_h)

    def masked(self) -> Tensor:
        """What :meth:`rows` should give, by the reference."""
        x, (bound_x, bound_h) = self.x[0], self.bounds
        (out,), _ = reference.rows([(self.outward.t(), None)], x, bound_x)
        return out + reference.ffn(self.weights, x, bound_x, bound_h)[0]


def below(values: Tensor, share: float) -> Tensor:
    """The threshold above which a share of the magnitudes lies, ``[1]``."""
    return values.abs().float().flatten().quantile(1 - share).view(1)


def check(shape: Shape, dtype: torch.dtype, device: str) -> None:
    """Fail where rows and the reference disagree."""
    layer = Layer(shape, shape.shares(0.65), dtype, device, 0)
    found, expected = layer.rows(layer.x).float(), layer.masked().float()
    error = float((found - expected).abs().max() / expected.abs().max())
    if not error <= CLOSE[dtype]:
        raise RuntimeError(f"Rows at {shape.name} are {error:.1e} away from the reference.")


def measure(shape: Shape, budgets: Sequence[float], rounds: int) -> list[dict[str, Any]]:
    """All budgets of one shape."""
    found = []
    for budget in budgets:
        layers = [Layer(shape, shape.shares(budget), torch.bfloat16, "cuda", seed) for seed in range(LAYERS)]
        runs: dict[str, Callable[[], float]] = {
            name: timed([partial(getattr(Layer, name), layer) for layer in layers], layers[0].x)
            for name in ("dense", "rows")
        }
        times = alternate(runs, rounds, lambda: 1.0)  # type: ignore[arg-type]
        low, high = quartiles(times.ratios("rows", "dense"))
        speedup = times.speedup("rows", "dense")
        found.append(
            {
                "shape": shape.name,
                "budget": budget,
                "dense_us": 1e6 * times.median("dense") / LAYERS,
                "rows_us": 1e6 * times.median("rows") / LAYERS,
                "speedup": speedup,
                "speedup_quartiles": (low, high),
                "of_bytes": speedup * budget,
            }
        )
    return found


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """One row a budget."""
    found = Table(title=f"Matrices of a layer for one token, CUDA graphs of {LAYERS} layers, bfloat16")
    for name in ("layer", "budget", "dense us", "rows us", "speed-up", "of 1/bytes"):
        found.add_column(name, justify="left" if name == "layer" else "right")
    for row in rows:
        low, high = row["speedup_quartiles"]
        speedup = f"{row['speedup']:.2f} \\[{low:.2f}, {high:.2f}]"
        times = f"{row['dense_us']:.1f}", f"{row['rows_us']:.1f}"
        found.add_row(row["shape"], f"{row['budget']:g}", *times, speedup, f"{row['of_bytes']:.2f}")
    return found


def interpret() -> str:
    """A tiny layer on the CPU."""
    check(TINY, torch.float32, "cpu")
    return "Rows and the reference agree on a tiny layer"


@torch.no_grad()
def main() -> int:
    """Measure; the exit code."""
    parser = options(__doc__, [shape.name for shape in SHAPES])
    parser.add_argument("--budget", type=float, nargs="+", default=[0.75, 0.65, 0.5])
    arguments = parser.parse_args()
    console = wide_console()
    if (code := without_gpu(arguments.interpret, interpret)) is not None:
        return code
    rows = []
    for shape in [shape for shape in SHAPES if arguments.only in (None, shape.name)]:
        check(shape, torch.bfloat16, "cuda")
        rows += measure(shape, arguments.budget, arguments.rounds)
    device = torch.cuda.get_device_name()
    console.print(f"{device}, torch {torch.__version__}", highlight=False)
    console.print(table(rows))
    save_json(arguments.json, {"device": device, "torch": torch.__version__, "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
