"""One token through a stack of FFNs by every kernel that a CPU may have: the functions that ``cpu_kernels.py`` times."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from moe_decode_speed import reading_library
from torch import Tensor, nn

from pop_mm.kernels import Rows, why_not
from pop_mm.kernels import load as load_kernel

DENSE, LIMIT = "F.linear", "reading only"
MOST_LAYERS = 16  # a graph is made of them all


class Views(NamedTuple):
    """The first K channels of one FFN: gate and up ``[K, H]``, down ``[H, K]``."""

    gate: Tensor
    up: Tensor
    down: Tensor

    def narrow(self, width: int) -> Views:
        """The first ``width`` channels of these."""
        return Views(self.gate[:width], self.up[:width], self.down[:, :width])

    @property
    def bytes(self) -> int:
        """That a token reads."""
        return sum(weight.numel() * weight.element_size() for weight in self)


class Shape(NamedTuple):
    """Hidden size H, intermediate size D and dtype of an FFN."""

    hidden: int
    intermediate: int
    dtype: str

    @property
    def name(self) -> str:
        """As on the command line."""
        return f"{self.hidden}x{self.intermediate}:{self.dtype}"

    def build(self, size: int) -> list[Views]:
        """Random layers of ``size`` bytes in all, 2 to :data:`MOST_LAYERS` of them."""
        h, d, dtype = self.hidden, self.intermediate, getattr(torch, self.dtype)
        layers = min(max(2, -(-size // (3 * h * d * dtype.itemsize))), MOST_LAYERS)
        return [
            Views(*(torch.empty(s, dtype=dtype).uniform_(-0.03, 0.03) for s in ((d, h), (d, h), (h, d))))
            for _ in range(layers)
        ]


class Kernel(NamedTuple):
    """One pass over all layers, ``[1, H]`` to ``[1, H]`` each; and what it costs before the first, in seconds."""

    run: Callable[[Tensor], Sequence[Tensor]]
    before: float = 0.0
    each_prompt: bool = False


def linear_kernel(layers: Sequence[Views]) -> Kernel:
    """As transformers' FFNs compute."""
    return Kernel(lambda x: [F.linear(F.silu(F.linear(x, v.gate)) * F.linear(x, v.up), v.down) for v in layers])


def mm_kernel(layers: Sequence[Views]) -> Kernel:
    """The same products asked for in another way."""
    turned = [[weight.t() for weight in views] for views in layers]
    return Kernel(lambda x: [torch.mm(F.silu(torch.mm(x, g)) * torch.mm(x, u), d) for g, u, d in turned])


def onednn_kernel(layers: Sequence[Views]) -> Kernel:
    """Packed copies, gate and up as one matrix; raises where this torch or CPU has no such packing."""
    started = time.perf_counter()
    pack = torch.ops.mkldnn._reorder_linear_weight
    packed = [(pack(torch.cat([v.gate, v.up]), 1), pack(v.down.contiguous(), 1)) for v in layers]
    seconds = time.perf_counter() - started
    product = torch.ops.mkldnn._linear_pointwise

    def run(x: Tensor) -> list[Tensor]:
        found = []
        for inputs, down in packed:
            gate, up = product(x, inputs, None, "none", [], "").chunk(2, -1)
            found.append(product(F.silu(gate) * up, down, None, "none", [], ""))
        return found

    return Kernel(run, seconds, each_prompt=True)


def compiled_kernel(layers: Sequence[Views]) -> Kernel:
    """One graph over all layers; seconds are those of compiling it."""
    step = torch.compile(lambda x, views: linear_kernel(views).run(x), fullgraph=True, dynamic=False)
    return _compiled(lambda x: step(x, layers), layers)


class _Stack(nn.Module):
    """Layers whose weights are parameters, which is what freezing makes constant."""

    def __init__(self, layers: Sequence[Views]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(nn.ParameterList(views) for views in layers)

    def forward(self, x: Tensor) -> Sequence[Tensor]:
        layers: list[Any] = list(self.parts)
        return linear_kernel([Views(*layer) for layer in layers]).run(x)


def frozen_kernel(layers: Sequence[Views]) -> Kernel:
    """As :func:`compiled_kernel`, with constant weights and the kernels that were fastest when tried."""
    stack = _Stack(layers).eval().requires_grad_(False)
    step = torch.compile(stack, fullgraph=True, dynamic=False, options={"freezing": True, "max_autotune": True})
    return _compiled(step, layers, each_prompt=True)


def _compiled(run: Callable[[Tensor], Sequence[Tensor]], layers: Sequence[Views], each_prompt: bool = False) -> Kernel:
    """Compile by a first call, without the caches on disk."""
    import torch._inductor.config

    x = torch.randn(1, layers[0].gate.shape[1]).to(layers[0].gate.dtype)
    with torch._inductor.config.patch(force_disable_caches=True), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that there are no caches
        started = time.perf_counter()
        run(x)
    return Kernel(run, time.perf_counter() - started, each_prompt)


def matvec_kernel(layers: Sequence[Views]) -> Kernel:
    """The kernel that pop_mm compiles; raises where it cannot be had."""
    matvec = load_kernel("compiled")
    assert matvec is not None
    packed = [(Rows([v.gate, v.up]), Rows([v.down])) for v in layers]

    def run(x: Tensor) -> list[Tensor]:
        found = []
        for inputs, down in packed:
            gate, up = matvec([inputs], x).split(1)
            found.append(matvec([down], F.silu(gate).mul_(up)))
        return found

    return Kernel(run)


def reading_kernel(layers: Sequence[Views]) -> Kernel:
    """What memory gives if computing is free."""
    library = reading_library()
    if library is None:
        raise RuntimeError(why_not())
    threads = torch.get_num_threads()
    blocks = []  # the loop counts in units of two bytes, and gives each thread some of the blocks
    for views in layers:
        parts = [[part.view(torch.bfloat16) for part in weight.chunk(threads)] for weight in views]
        for rows in (Rows([*parts[0], *parts[1]]), Rows(parts[2])):
            blocks.append((rows.blocks, rows.count, 2 * rows.columns))

    def run(x: Tensor) -> list[Tensor]:
        for block in blocks:
            library.read_rows(*block, threads)
        return []

    return Kernel(run)


PLAIN: dict[str, Callable[[Sequence[Views]], Kernel]] = {
    DENSE: linear_kernel,
    "torch.mm": mm_kernel,
    "oneDNN packed": onednn_kernel,
    "matvec": matvec_kernel,
    LIMIT: reading_kernel,
}
COMPILED: dict[str, Callable[[Sequence[Views]], Kernel]] = {"torch.compile": compiled_kernel}
FROZEN: dict[str, Callable[[Sequence[Views]], Kernel]] = {"torch.compile, constant weights": frozen_kernel}


def check(name: str, found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """Raise if a kernel computes something else; the one that only reads computes nothing."""
    for own, right in zip(found, expected, strict=False):
        tolerance = 100 * torch.finfo(right.dtype).eps * float(right.abs().max())
        if not torch.allclose(own, right, rtol=0, atol=tolerance):
            raise RuntimeError(f"{name} computes something else: off by {float((own - right).abs().max()):.2g}")
