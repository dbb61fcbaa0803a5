"""Which kernel decodes one token fastest through the FFNs of a CPU, with all channels and with the first K of D.

Every kernel runs a whole stack of layers, in random order in each round, after an unrelated buffer has been read; rounds in
which that read was slow are dropped. Kernels without "packed" or "constant" read the model's own weights through narrow views:

- F.linear, torch.mm: torch as it is; the speed-up is over F.linear with all channels;
- oneDNN packed: weights in oneDNN's own order, a second copy, made again for each prompt (private functions of torch);
- torch.compile: inductor's C++ backend, the whole stack as one graph, weights as arguments: compiled once;
- torch.compile, constant weights: freezing and max_autotune; all channels alone, since another prompt's would be compiled anew;
- matvec: the kernel of pop_mm, compiled on first use;
- reading only: a loop that adds up one word a cache line of the same views, and computes nothing.

Run: ``python benchmarks/cpu_kernels.py [--dims HxD:dtype ...] [--no-compile] [--quick] [--json FILE]``. Timings need a quiet
machine: see the README here.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from ffn_kernels import COMPILED, DENSE, FROZEN, LIMIT, PLAIN, Kernel, Shape, Views, check, linear_kernel
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from measure import (
    Evictor,
    alternate,
    available_cores,
    last_level_cache,
    machine_facts,
    print_machine,
    quartiles,
    wide_console,
)

DIMS = ("576x1536:float32", "2048x8192:float32", "2048x8192:bfloat16", "4096x14336:bfloat16")
QUICK_DIMS = ("64x160:float32",)
SHARES = (1.0, 0.7, 0.5, 0.4)
SHORT = {"float32": "fp32", "bfloat16": "bf16"}


@dataclass(frozen=True)
class Row:
    """One kernel on K channels of one shape. Times are milliseconds a layer; ``before`` is paid before the first token.

    Attributes
    ----------
    read_share : float
        GB/s relative to a plain read of one buffer.
    speedup : float
        Over F.linear on all channels: the median of in-round ratios.
    speedup_quartiles : tuple of float
        Of those ratios.
    pays_after : float or None
        Tokens until ``before`` is made up for, compared with F.linear on the same channels; None if it never is.
    """

    hidden: int
    intermediate: int
    dtype: str
    layers: int
    width: int
    kernel: str
    ms: float
    gb_s: float
    read_share: float
    speedup: float
    speedup_quartiles: tuple[float, float]
    before_ms: float
    each_prompt: bool
    pays_after: float | None
    discarded: int

    @property
    def shape(self) -> str:
        """For people."""
        return f"{self.hidden} x {self.intermediate} {SHORT.get(self.dtype, self.dtype)}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "kept_share": self.width / self.intermediate}


@torch.no_grad()
def measure_share(
    shape: Shape,
    whole: Sequence[Views],
    share: float,
    rounds: int,
    evict: Evictor,
    compiling: bool,
    failed: dict[str, str],
) -> tuple[list[Row], float]:
    """All kernels on ``share`` of the channels, and F.linear on all; and GB/s of a plain read.

    A kernel that cannot run, for want of a compiler, an instruction set or a private function, is left out and its reason
    goes to ``failed``.
    """
    width = round(share * shape.intermediate)
    layers = [views.narrow(width) for views in whole]
    x = torch.randn(1, shape.hidden).to(whole[0].gate.dtype)
    makers = PLAIN if not compiling else {**PLAIN, **COMPILED, **(FROZEN if share == 1 else {})}
    kernels = {}
    torch.compiler.reset()  # the graphs of other shapes count as recompilations
    for name, make in makers.items():
        try:
            kernels[name] = make(layers)
            check(name, kernels[name].run(x), kernels[DENSE].run(x))
        except Exception as error:
            kernels.pop(name, None)
            failed[f"{name}, {shape.dtype}"] = (str(error) or type(error).__name__).splitlines()[0]
    dense = linear_kernel(whole)

    def seconds(kernel: Kernel) -> Callable[[], float]:
        def once() -> float:
            started = time.perf_counter()
            kernel.run(x)
            return time.perf_counter() - started

        return once

    variants = {"dense": seconds(dense), **{name: seconds(kernel) for name, kernel in kernels.items()}}
    times = alternate(variants, rounds, evict)
    rows = []
    for name, kernel in kernels.items():
        found, saved = times.median(name), times.median(DENSE) - times.median(name)
        speed = len(layers) * layers[0].bytes / found / 1e9
        rows.append(
            Row(
                *shape,
                layers=len(layers),
                width=width,
                kernel=name,
                ms=1e3 * found / len(layers),
                gb_s=speed,
                read_share=speed / times.read_gb_s,
                speedup=times.speedup(name, "dense"),
                speedup_quartiles=quartiles(times.ratios(name, "dense")),
                before_ms=1e3 * kernel.before / len(layers),
                each_prompt=kernel.each_prompt,
                pays_after=kernel.before / saved if saved > 0 else None,
                discarded=times.discarded,
            )
        )
    return rows, times.read_gb_s


def kernel_table(rows: Sequence[Row], read_gb_s: float) -> Table:
    """One row for each kernel and K/D."""
    title = f"FFN {rows[0].shape}, one token, {rows[0].layers} layers; plain read {read_gb_s:.1f} GB/s"
    caption = "before: packing or compiling, a layer; pays after: tokens, compared with F.linear on the same channels"
    table = Table(title=title, caption=caption)
    for name in ("K/D", "kernel", "ms", "GB/s", "of plain read", "speed-up", "before ms", "paid", "pays after"):
        table.add_column(name, justify="left" if name in ("kernel", "paid") else "right", no_wrap=True)
    for share in sorted({r.width / r.intermediate for r in rows}, reverse=True):
        for r in (r for r in rows if r.width / r.intermediate == share):
            paid = "" if not r.before_ms else "each prompt" if r.each_prompt else "once"
            after = "" if not r.before_ms else "never" if r.pays_after is None else f"{r.pays_after:.0f}"
            speeds = (f"{r.ms:.3g}", f"{r.gb_s:.1f}", f"{r.read_share:.0%}", f"{r.speedup:.2f}")
            before = "" if not r.before_ms else f"{r.before_ms:.3g}" if r.before_ms < 1000 else f"{r.before_ms:,.0f}"
            table.add_row(f"{share:.2f}", r.kernel, *speeds, before, paid, after)
        table.add_section()
    return table


def winners(rows: Sequence[Row]) -> dict[str, dict[str, str]]:
    """Shape -> K/D -> the fastest kernel."""
    found: dict[str, dict[str, Row]] = {}
    for row in rows:
        if row.kernel != LIMIT:
            shares = found.setdefault(row.shape, {})
            share = f"{row.width / row.intermediate:.2f}"
            shares[share] = min(shares.get(share, row), row, key=lambda r: r.ms)
    return {shape: {share: row.kernel for share, row in shares.items()} for shape, shares in found.items()}


def dims(text: str) -> Shape:
    """``576x1536:float32``."""
    sizes, _, dtype = text.partition(":")
    hidden, _, intermediate = sizes.partition("x")
    dtype = dtype or "float32"
    if not (hidden.isdigit() and intermediate.isdigit() and dtype in SHORT):
        raise argparse.ArgumentTypeError(f"{text!r} is not like 576x1536:float32 or 2048x8192:bfloat16")
    return Shape(int(hidden), int(intermediate), dtype)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dims", type=dims, nargs="+", metavar="HxD:DTYPE", help=" ".join(DIMS))
    parser.add_argument("--rounds", type=int, help="15")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--threads", type=int, default=available_cores())
    parser.add_argument("--quick", action="store_true", help="a tiny shape, 1 round: does it run?")
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure all shapes; the exit code."""
    args = parse(argv)
    torch.set_num_threads(args.threads)
    console, machine = wide_console(), machine_facts()
    print_machine(console, machine)
    shapes = args.dims or [dims(text) for text in (QUICK_DIMS if args.quick else DIMS)]
    rounds = args.rounds or (1 if args.quick else 15)
    compiling = not args.no_compile
    cache = (1 << 20) if args.quick else last_level_cache()
    evict = Evictor(5 * cache // 4)
    rows: list[Row] = []
    failed: dict[str, str] = {}
    with Progress(console=Console(file=sys.stderr), transient=True, refresh_per_second=1) as progress:
        task = progress.add_task("kernels", total=len(shapes) * len(SHARES))
        for shape in shapes:
            whole, own, reads = shape.build(4 * cache), [], []
            for share in SHARES:
                found, read = measure_share(shape, whole, share, rounds, evict, compiling, failed)
                own += found
                reads.append(read)
                gc.collect()
                progress.advance(task)
            console.print(kernel_table(own, statistics.median(reads)))
            rows += own
    for name, reason in failed.items():
        console.print(f"[yellow]not here[/]  {name}: {escape(reason)}", highlight=False, soft_wrap=True)
    best = winners(rows)
    for name, shares in best.items():
        words = ", ".join(f"{kernel} ({share})" for share, kernel in shares.items())
        console.print(f"fastest for {name} (K/D): {words}", highlight=False, soft_wrap=True)
    result = {
        "machine": machine,
        "settings": {"dims": [shape.name for shape in shapes], "rounds": rounds, "compile": compiling},
        "rows": [row.to_dict() for row in rows],
        "fastest": best,
        "failed": failed,
    }
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
