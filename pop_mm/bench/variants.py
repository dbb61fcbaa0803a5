"""What is compared: the dense model and pruned ones, each with torch's kernels, compiled ones, or the rows of thresholds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch

from ..kernels import MOST_TOKENS, gpu, why_not
from ..methods import METHODS, get_method
from ..session.session import prune
from ..settings.config import PopConfig
from ..settings.keywords import nested
from .errors import BenchError

KERNELS = ("stock", "compiled", "triton")
CACHES = ("dynamic", "static")
MOST_ROWS = {"compiled": MOST_TOKENS, "triton": gpu.MAX_ROWS}  # that these kernels take
_COMPILED_DTYPES = (torch.float32, torch.bfloat16)


class Variant(NamedTuple):
    """One of the models that take turns.

    Attributes
    ----------
    method : str
        "dense" or that of a method that saves time.
    ratio : float or None
        None for dense, and where there is a budget.
    kernels : {"stock", "compiled", "triton", "rows"}
        Thresholds have kernels of their own, "rows".
    budget : float or None
        Share of the weights that is read; None where there is a ratio.
    """

    method: str
    ratio: float | None
    kernels: str
    budget: float | None = None


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
    budgets : sequence of float
        Beside the ratios, or instead of them.
    settings : mapping of str to object
        More of :class:`~pop_mm.PopConfig`, for all methods; those of the method and of experts by their names.

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
    budgets: Sequence[float] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, least in (("batches", 1), ("prompts", 1), ("new_tokens", 4), ("rounds", 1)):
            found = getattr(self, name)
            for value in [found] if isinstance(found, int) else found:
                if value < least:
                    raise BenchError(f"{name} must be {least} or more; got {value}.")
        for name, known in (("methods", _timed()), ("kernels", KERNELS), ("caches", CACHES)):
            for value in getattr(self, name):
                if value not in known:
                    raise BenchError(f"{name} must be of {', '.join(known)}; got {value!r}.")
        for name in ("batches", "prompts", "methods", "kernels", "caches"):
            if not getattr(self, name):
                raise BenchError(f"{name} is empty; give at least one.")
        if not self.ratios and not self.budgets:
            raise BenchError("There are neither ratios nor budgets; give at least one.")
        if self.compile and tuple(self.caches) != ("static",):
            raise BenchError("compile needs fixed shapes: take the static cache alone (--cache static).")
        if 0 in self.ratios or 1 in self.budgets:
            given = "A ratio of 0" if 0 in self.ratios else "A budget of 1"
            wanted = "ratios above 0" if 0 in self.ratios else "budgets below 1"
            raise BenchError(f"{given} is the dense model, which is measured anyway; give {wanted}.")
        for method in self.methods:
            found = self._pruned(method, self.kernels[0])
            if not found:
                raise BenchError(f"The method {method} takes budgets, and there are ratios alone; give --budget.")
            for variant in found:
                self.config(variant)

    def cells(self) -> list[Cell]:
        """All of them."""
        return [Cell(b, p, c) for b in self.batches for p in self.prompts for c in self.caches]

    def variants(self, cell: Cell) -> list[Variant]:
        """Those that a cell has, stock dense first; kernels that do not take so many rows are left out."""
        found, last = [STOCK_DENSE], []
        for name in self.kernels:
            if cell.batch <= MOST_ROWS.get(name, cell.batch):
                pruned = [variant for method in self.methods for variant in self._pruned(method, name)]
                found += [self.dense_of(variant, cell) for variant in pruned]
                found += [variant for variant in pruned if variant.kernels != "rows"]
                last += [variant for variant in pruned if variant.kernels == "rows"]
        return list(dict.fromkeys([*found, *last]))

    def _pruned(self, method: str, kernels: str) -> list[Variant]:
        """The variants of a method; thresholds take budgets alone, and have kernels of their own."""
        if method == "thresholds":
            return [Variant(method, None, "rows", budget) for budget in self.budgets]
        ratios = [Variant(method, ratio, kernels) for ratio in self.ratios]
        return ratios + [Variant(method, None, kernels, budget) for budget in self.budgets]

    def dense_of(self, variant: Variant, cell: Cell) -> Variant:
        """The dense model on the same kernels: beside rows on the fastest, beside Triton's, which never run it, on stock."""
        fastest = "compiled" if "compiled" in self.kernels and cell.batch <= MOST_TOKENS else "stock"
        kernels = {"triton": "stock", "rows": fastest}
        return Variant("dense", None, kernels.get(variant.kernels, variant.kernels))

    def config(self, variant: Variant) -> PopConfig:
        """The session's settings; of a dense variant, those that leave nothing out."""
        if variant.method == "dense":
            return PopConfig(0.0)
        amount = {"ratio": variant.ratio, "budget": variant.budget, "method": variant.method}
        own: dict[str, Any] = {"batch": self.batch_mode}
        if variant.kernels != "rows":
            own |= {"gamma": self.gamma, "kernels": variant.kernels}
        return PopConfig.from_dict(nested({**self.settings, **own, **amount}))

    def jobs(self) -> list[tuple[Cell, Variant]]:
        """Every variant of every cell."""
        return [(cell, variant) for cell in self.cells() for variant in self.variants(cell)]

    def alone(self, cell: Cell) -> Setup:
        """The same for one cell."""
        return replace(self, batches=(cell.batch,), prompts=(cell.prompt,), caches=(cell.cache,))


def _timed() -> list[str]:
    """Names of the methods that save time."""
    return [name for name in METHODS if get_method(name).saves_time]


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
    """Within: the model is this variant. Gives its session; None for the dense model with stock kernels."""
    if variant.method != "dense":
        return prune(model, setup.config(variant))
    return prune(model, ratio=0.0, kernels="compiled") if variant.kernels == "compiled" else nullcontext()


__all__ = ["STOCK_DENSE", "Cell", "Setup", "Variant", "kernels_for", "running"]
