"""What is compared: the dense model and pruned ones, each with torch's kernels or with the compiled one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..adapters import adapter_for
from ..backends.inplace import direct_forward, direct_forward_fits
from ..config import PopConfig
from ..kernels import Rows, why_not
from ..kernels import load as load_kernel
from ..layout import FFN
from ..phase import Forward, Phase, set_instance_attribute
from ..session import prune
from .errors import BenchError

METHODS = ("pop", "static")  # those that save time
KERNELS = ("stock", "compiled", "triton")
CACHES = ("dynamic", "static")
_MOST_ROWS = {"compiled": 1, "triton": 8}  # that these kernels take
_COMPILED_DTYPES = (torch.float32, torch.bfloat16)


class Variant(NamedTuple):
    """One of the models that take turns.

    Attributes
    ----------
    method : str
        "dense" or one of :data:`METHODS`.
    ratio : float or None
        Overall; None for dense.
    kernels : {"stock", "compiled", "triton"}
    """

    method: str
    ratio: float | None
    kernels: str

    @property
    def dense(self) -> Variant:
        """The dense model on the same kernels; Triton's are for pruned models alone."""
        return STOCK_DENSE if self.kernels == "triton" else Variant("dense", None, self.kernels)


STOCK_DENSE = Variant("dense", None, "stock")


class Cell(NamedTuple):
    """Where variants are compared: all of them on the same prompts.

    Attributes
    ----------
    batch, prompt : int
        Rows, and prompt tokens of each.
    cache : {"dynamic", "static"}
    """

    batch: int
    prompt: int
    cache: str


@dataclass(frozen=True)
class Setup:
    """Everything but the model that the figures depend on.

    Attributes
    ----------
    batches, prompts : sequence of int
    new_tokens : int
        Decoded tokens of each row, exactly.
    ratios : sequence of float
    methods, kernels, caches : sequence of str
    gamma : float
    batch_mode : {"shared", "per_sequence"}
        As ``batch`` of :class:`~pop_mm.PopConfig`.
    compile : bool
        Decode through ``torch.compile``, dense and pruned; with a static cache.
    rounds : int
        That count; one to warm up comes before them.
    seed : int
        Of the order in each round, the prompts and random weights.

    Raises
    ------
    BenchError, ConfigError
        A value out of range or unknown.
    """

    batches: Sequence[int] = (1,)
    prompts: Sequence[int] = (128,)
    new_tokens: int = 128
    ratios: Sequence[float] = (0.2, 0.4)
    methods: Sequence[str] = ("pop",)
    gamma: float = 0.1
    batch_mode: str = "shared"
    kernels: Sequence[str] = ("stock",)
    caches: Sequence[str] = ("dynamic",)
    compile: bool = False
    rounds: int = 7
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("batches", 1), ("prompts", 1), ("new_tokens", 4), ("rounds", 1)):
            found = getattr(self, name)
            for value in [found] if isinstance(found, int) else found:
                if value < least:
                    raise BenchError(f"{name} must be {least} or more; got {value}.")
        for name, known in (("methods", METHODS), ("kernels", KERNELS), ("caches", CACHES)):
            for value in getattr(self, name):
                if value not in known:
                    raise BenchError(f"{name} must be of {', '.join(known)}; got {value!r}.")
        for name in ("batches", "prompts", "ratios", "methods", "kernels", "caches"):
            if not getattr(self, name):
                raise BenchError(f"{name} is empty; give at least one.")
        if self.compile and tuple(self.caches) != ("static",):
            raise BenchError("compile needs fixed shapes: take the static cache alone (--cache static).")
        for ratio in self.ratios:
            if ratio == 0:
                raise BenchError("A ratio of 0 is the dense model, which is measured anyway; give ratios above 0.")
            self.config(Variant(self.methods[0], ratio, self.kernels[0]))

    def cells(self) -> list[Cell]:
        """All of them."""
        return [Cell(b, p, c) for b in self.batches for p in self.prompts for c in self.caches]

    def variants(self, cell: Cell) -> list[Variant]:
        """Those that a cell has, stock dense first; kernels that do not take so many rows are left out."""
        found = [STOCK_DENSE]
        for name in self.kernels:
            if cell.batch <= _MOST_ROWS.get(name, cell.batch):
                pruned = [Variant(method, ratio, name) for method in self.methods for ratio in self.ratios]
                found += [pruned[0].dense, *pruned]
        return list(dict.fromkeys(found))

    def config(self, variant: Variant) -> PopConfig:
        """The session's settings; of a dense variant, those that leave nothing out."""
        if variant.ratio is None:
            return PopConfig(0.0)
        settings: dict[str, Any] = {"batch": self.batch_mode, "variant": variant.method, "kernels": variant.kernels}
        return PopConfig(variant.ratio, gamma=self.gamma, **settings)

    def jobs(self) -> list[tuple[Cell, Variant]]:
        """Every variant of every cell."""
        return [(cell, variant) for cell in self.cells() for variant in self.variants(cell)]

    def alone(self, cell: Cell) -> Setup:
        """The same for one cell."""
        return replace(self, batches=(cell.batch,), prompts=(cell.prompt,), caches=(cell.cache,))


def kernels_for(device: torch.device, dtype: torch.dtype, asked: Sequence[str] = ()) -> list[str]:
    """The kernels that were asked for, or else stock and, where it can be had, compiled.

    Raises
    ------
    BenchError
        One was asked for that cannot be had.
    """
    reason = why_not() if device.type == "cpu" else f"it is for CPUs, and the device is {device}"
    if reason is None and dtype not in _COMPILED_DTYPES:
        reason = f"it takes float32 and bfloat16, and the weights are {str(dtype).removeprefix('torch.')}"
    if "compiled" in asked and reason is not None:
        raise BenchError(f"There is no compiled kernel here: {reason}. Leave --kernels compiled out.")
    if "triton" in asked and device.type != "cuda":
        raise BenchError(
            f"Triton's kernels need a CUDA device, and the device is {device}. Leave --kernels triton out."
        )
    return list(dict.fromkeys(asked)) or ["stock", *(["compiled"] if reason is None else [])]


def running(model: Any, setup: Setup, variant: Variant) -> AbstractContextManager[Any]:
    """Within: the model is this variant. Gives the session of a pruned one, None for a dense one."""
    if variant.ratio is not None:
        return prune(model, setup.config(variant))
    return dense_on_kernel(model) if variant.kernels == "compiled" else nullcontext()


@contextmanager
def dense_on_kernel(model: Any) -> Iterator[None]:
    """Within: the dense FFNs, and the linears of attention and the lm_head, compute a single token by the compiled kernel."""
    matvec = load_kernel("compiled")
    assert matvec is not None
    adapter = adapter_for(model)
    records = adapter.projections(model)
    single = Forward(Phase.DECODE, None, 1, 1, single=True)
    undo: list[Callable[[], object]] = []
    try:
        for ffn in records:
            if isinstance(ffn, FFN) and ffn.holder is not None and direct_forward_fits(ffn):
                own, compute = ffn.holder.forward, direct_forward(ffn, ffn.size, None, matvec)

                def whole(x: Tensor, own: Any = own, compute: Any = compute) -> Tensor:
                    return compute(x, single) if x.shape[:-1].numel() == 1 else own(x)

                undo.append(set_instance_attribute(ffn.holder, "forward", whole))
        for module in adapter.other_linears(model, records):
            weight, bias = module.weight.detach(), None if module.bias is None else module.bias.detach()
            if Rows.fit([weight]):
                rows = (Rows([weight], [bias]),)

                def linear(input: Tensor, own: Any = module.forward, rows: tuple[Rows] = rows) -> Tensor:
                    if not rows[0].takes(input):
                        return own(input)
                    return matvec(rows, input.view(1, -1)).view(*input.shape[:-1], -1)

                undo.append(set_instance_attribute(module, "forward", linear))
        yield
    finally:
        while undo:
            undo.pop()()


__all__ = ["STOCK_DENSE", "Cell", "Setup", "Variant", "kernels_for", "running"]
