"""One token through FFNs and experts that read only the rows above a threshold, against the dense compiled kernels.

All variants take turns in one run; a figure is the median of in-round ratios. *Share of 1/bytes*: the speed-up over the dense
kernel, times the bytes that are read as a share of all: 1.0 is what reading less allows. FFNs are compared with the compiled FFN
on weights as checkpoints store them; experts with the faster of those kernels and of rows that reads all; int8 weights with rows
that reads all of them, beside the compiled FFN on weights of the model's dtype. Needs a quiet machine.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor, nn

from measure import (
    Evictor,
    Verdict,
    alternate,
    available_cores,
    last_level_cache,
    machine_facts,
    print_machine,
    print_verdicts,
    wide_console,
)
from pop_mm.kernels import Matvec
from pop_mm.kernels import Rows as Stored
from pop_mm.kernels import load as load_kernel
from pop_mm.kernels.ffn import FFNStep, Scratch
from pop_mm.ops.reference import FFNWeights
from pop_mm.ops.rows import Room, RowsFFN
from pop_mm.ops.turn import turn
from pop_mm.partition import Sizes
from pop_mm.weights.layout import FFN, Projection

SHARES = ((0.8, 0.6), (0.7, 0.5), (0.6, 0.4))  # of the entries of x and h
JUDGED = (0.7, 0.5)
DENSE, ALL = "dense", "rows, all"


class Shape(NamedTuple):
    """Sizes, dtype, experts of a token (None: an FFN), the least share of 1/bytes at :data:`JUDGED`; whether weights are int8."""

    hidden: int
    size: int
    dtype: torch.dtype
    experts: int | None
    target: float
    int8: bool = False

    @property
    def name(self) -> str:
        """For tables."""
        what = "FFN" if self.experts is None else f"{self.experts} experts of"
        stored = ", int8" if self.int8 else ""
        return f"{what} {self.hidden} x {self.size} {str(self.dtype).removeprefix('torch.')}{stored}"

    @property
    def bytes(self) -> int:
        """Of a layer's weights that a token reads if all are."""
        return 3 * self.hidden * self.size * (1 if self.int8 else self.dtype.itemsize) * (self.experts or 1)


SHAPES = (
    Shape(576, 1536, torch.float32, None, 0.88),
    Shape(2048, 8192, torch.bfloat16, None, 0.95),
    Shape(4096, 14336, torch.bfloat16, None, 0.97),
    Shape(2048, 768, torch.bfloat16, 8, 0.92),
    Shape(4096, 14336, torch.bfloat16, 2, 0.92),
    Shape(2048, 8192, torch.bfloat16, None, 0.85, int8=True),
    Shape(4096, 14336, torch.bfloat16, None, 0.85, int8=True),
)
QUICK = (
    Shape(64, 96, torch.float32, None, 0.88),
    Shape(64, 48, torch.bfloat16, 3, 0.92),
    Shape(64, 96, torch.bfloat16, None, 0.85, int8=True),
)


class Layer:
    """Random weights in both storages, ``[k, D, H]``, ``[k, D, H]`` and ``[k, H, D]``, and what decodes with them."""

    def __init__(self, shape: Shape, matvec: Matvec, scratch: Scratch, room: Room) -> None:
        h, d, k = shape.hidden, shape.size, shape.experts or 1
        plain = [torch.empty(s, dtype=shape.dtype).uniform_(-0.05, 0.05) for s in ((k, d, h), (k, d, h), (k, h, d))]
        turned = [nn.Parameter(weight.clone(), requires_grad=False) for weight in plain]
        for parameter in turned:
            turn(parameter)
        self._alone, self._matvec, self._plain = shape.experts is None, matvec, plain
        gate, up, down = ((weight.data.transpose(1, 2), None) for weight in turned)
        self.rows = RowsFFN(FFNWeights(gate, up, down, "silu", torch.ones(k, d)), room)
        self._ids, self._router = torch.arange(k), torch.full((k,), 1 / k)
        if self._alone:
            self._step = FFNStep(matvec, record([weight[0] for weight in plain]), Sizes(d, d, 0, 0), scratch)
        else:
            self._inward = [Stored([gate, up]) for gate, up in zip(plain[0], plain[1], strict=True)]
            self._outward = [Stored([down]) for down in plain[2]]

    def hidden(self, x: Tensor) -> Tensor:
        """``[k, D]``: what goes into the down projections of ``[H]``."""
        gate, up, _ = self._plain
        return F.silu(F.linear(x, gate.flatten(0, 1))).mul_(F.linear(x, up.flatten(0, 1))).view(gate.shape[:2])

    def dense(self, x: Tensor) -> Tensor:
        """By the compiled kernels on the plain storage."""
        if self._alone:
            return self._step(x)
        gate, up = self._matvec(self._inward, x[None]).view(len(self._inward), 2, -1).unbind(1)
        out = self._matvec(self._outward, F.silu(gate).mul_(up))
        return (out * self._router.unsqueeze(1)).sum(0).to(x.dtype)

    def chosen(self, x: Tensor, threshold_x: Tensor, threshold_h: Tensor, kept: Tensor | None = None) -> Tensor:
        """By rows."""
        if self._alone:
            return self.rows(x, threshold_x, threshold_h, kept)
        return self.rows.experts(x, self._ids, self._router, threshold_x, threshold_h, kept)


class Int8Layer(Layer):
    """The same weights once more as int8 with a scale for each output, input-major."""

    def __init__(self, shape: Shape, matvec: Matvec, scratch: Scratch, room: Room) -> None:
        super().__init__(shape, matvec, scratch, room)
        matrices, scales = [], []
        for weight in self._plain:
            scale = weight.float().abs().amax(-1) / 127
            matrices.append((weight / scale.unsqueeze(-1)).round_().to(torch.int8))
            scales.append(scale.contiguous())
            turn(matrices[-1])
        views = [(matrix.transpose(1, 2), None) for matrix in matrices]
        gate, up, down = views
        norms = torch.ones(len(self._plain[0]), shape.size)
        self.rows = RowsFFN(FFNWeights(gate, up, down, "silu", norms, scales), room, shape.dtype)


def record(weights: Sequence[Tensor]) -> FFN:
    """Gate, up and down as modules."""
    modules = []
    for weight in weights:
        module = nn.Linear(*weight.t().shape, bias=False, device="meta")
        module.weight = nn.Parameter(weight, requires_grad=False)
        modules.append(module)
    gate, up, down = (
        Projection(name, module, side)
        for name, module, side in zip(("gate", "up", "down"), modules, ("out", "out", "in"), strict=True)
    )
    return FFN("ffn", 0, (gate, up), down, len(weights[0]), activation=nn.SiLU())


def quantile(magnitudes: Tensor, share: float) -> float:
    """A threshold that ``share`` of the magnitudes pass."""
    flat = magnitudes.float().abs().flatten()
    return float(flat.kthvalue(max(1, round((1 - share) * flat.numel()))).values)


@dataclass(frozen=True)
class Row:
    """One variant.

    Attributes
    ----------
    bytes_share : float
        Of the weights, as counted in the run.
    ms : float
        A layer.
    speedup : float
        Over the dense kernel that the shape is compared with.
    """

    shape: str
    variant: str
    bytes_share: float
    ms: float
    gb_s: float
    speedup: float

    @property
    def of_limit(self) -> float:
        """The speed-up as a share of 1/bytes."""
        return self.speedup * self.bytes_share


def measure(shape: Shape, rounds: int, evict: Evictor, size: int, matvec: Matvec) -> tuple[list[Row], float]:
    """All variants of a shape, and the speed of plain reads."""
    count = min(max(1 if shape.experts else 2, -(-size // shape.bytes)), 16)
    scratch, room = Scratch(), Room()
    layers = [(Int8Layer if shape.int8 else Layer)(shape, matvec, scratch, room) for _ in range(count)]
    x = torch.randn(shape.hidden).to(shape.dtype)
    check(layers[0], x)

    def timed(run: Callable[[], object]) -> Callable[[], float]:
        def once() -> float:
            started = time.perf_counter()
            run()
            return time.perf_counter() - started

        return once

    experts = shape.experts or 1
    variants = {DENSE: timed(lambda: [layer.dense(x) for layer in layers])}
    shares = {DENSE: shape.dtype.itemsize if shape.int8 else 1.0}
    for rho, kappa in ((1.0, 1.0), *SHARES):
        bounds = [
            (
                torch.tensor([quantile(x, rho) if rho < 1 else -1.0]),
                torch.tensor([quantile(h, kappa) if kappa < 1 else -1.0 for h in layer.hidden(x)]),
            )
            for layer in layers
        ]
        kept = torch.zeros(2, dtype=torch.int64)
        for layer, pair in zip(layers, bounds, strict=True):
            layer.chosen(x, *pair, kept)
        name = ALL if rho == 1 else f"rows {rho:.1f}/{kappa:.1f}"
        of_x, of_h = kept[0] / (count * shape.hidden), kept[1] / (count * shape.size * experts)
        shares[name] = float((2 * of_x + of_h) / 3)

        def run(bounds: Sequence[tuple[Tensor, Tensor]] = bounds) -> None:
            for layer, pair in zip(layers, bounds, strict=True):
                layer.chosen(x, *pair)

        variants[name] = timed(run)
    times = alternate(variants, rounds, evict)
    base = ALL if shape.int8 else min((DENSE, ALL), key=times.median) if shape.experts else DENSE
    rows = []
    for name, share in shares.items():
        seconds = times.median(name) / count
        gb_s = shape.bytes * share / seconds / 1e9
        rows.append(Row(shape.name, name, share, 1e3 * seconds, gb_s, times.speedup(name, base)))
    return rows, times.read_gb_s


def check(layer: Layer, x: Tensor) -> None:
    """Raise if rows that reads all computes something else than the dense kernel."""
    nothing = torch.full((len(layer.hidden(x)),), -1.0)
    found, right = layer.chosen(x, nothing[:1], nothing).float(), layer.dense(x).float()
    near = 0.05 if isinstance(layer, Int8Layer) else 100 * torch.finfo(x.dtype).eps
    if not torch.allclose(found, right, rtol=0, atol=near * float(right.abs().max())):
        raise RuntimeError(f"rows compute something else: off by {float((found - right).abs().max()):.2g}")


def table_of(rows: Sequence[Row], read_gb_s: float) -> Table:
    """One row a variant."""
    table = Table(title=f"{rows[0].shape}, one token; plain read {read_gb_s:.1f} GB/s")
    for name in ("variant", "bytes", "ms a layer", "GB/s", "speed-up", "of 1/bytes"):
        table.add_column(name, justify="left" if name == "variant" else "right", no_wrap=True)
    for r in rows:
        table.add_row(
            r.variant, f"{r.bytes_share:.3f}", f"{r.ms:.3f}", f"{r.gb_s:.1f}", f"{r.speedup:.2f}", f"{r.of_limit:.2f}"
        )
    return table


def main(argv: Sequence[str] | None = None) -> int:
    """Measure all shapes; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--only", type=int, nargs="+", metavar="N", help=f"shapes by number, 0 to {len(SHAPES) - 1}")
    parser.add_argument("--threads", type=int, default=available_cores())
    parser.add_argument("--quick", action="store_true", help="tiny shapes, 1 round: does it run?")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    console, machine = wide_console(), machine_facts()
    print_machine(console, machine)
    matvec = load_kernel("compiled")
    assert matvec is not None, "load() raises where there is none"
    cache = 1 << 20 if args.quick else last_level_cache()
    shapes = QUICK if args.quick else [SHAPES[number] for number in args.only or range(len(SHAPES))]
    found: list[Row] = []
    verdicts = []
    for shape in shapes:
        rows, read_gb_s = measure(shape, 1 if args.quick else args.rounds, Evictor(5 * cache // 4), 4 * cache, matvec)
        console.print(table_of(rows, read_gb_s))
        found += rows
        judged = next(row for row in rows if row.variant == "rows {:.1f}/{:.1f}".format(*JUDGED))
        found_share = f"at {judged.bytes_share:.2f} of the bytes {judged.of_limit:.2f} of 1/bytes"
        target = f"{shape.name}: {found_share}, at least {shape.target}"
        verdicts.append(Verdict(target, None if args.quick else judged.of_limit >= shape.target))
    if args.json:
        rows = [{**asdict(row), "of_limit": row.of_limit} for row in found]
        result = {"machine": machine, "settings": {"rounds": args.rounds, "threads": args.threads}, "rows": rows}
        result["verdicts"] = [verdict.to_dict() for verdict in verdicts]
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    return print_verdicts(console, verdicts)


if __name__ == "__main__":
    sys.exit(main())
