"""An evaluation run: a grid of methods over texts, batch by batch, kept on disk so that it can go on after an interruption."""

from __future__ import annotations

import hashlib
import json
import math
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from .. import __version__
from ..errors import PopError
from ..formats import tensors_behind
from .cost import Cost, cost_of, dense_cost
from .fidelity import compare_rows, first_differences, greedy, pruned_step_logits, same_tokens, step_logits
from .intervals import bootstrap, difference
from .methods import METHODS, Calibration, calibrate, config_for
from .texts import Window, digest

UNITS = "units.jsonl"  # one line for each grid point and batch of texts


class EvaluationError(PopError):
    """An evaluation that cannot be run, or cannot be continued."""


@dataclass(frozen=True)
class Point:
    """One point of the grid.

    Attributes
    ----------
    method : str
    ratio : float or None
        None for dense, and where there is a budget.
    gamma : float or None
        For pop alone.
    prefill : str
        "dense" or "partition".
    budget : float or None
        Share of the weights that is read; None where there is a ratio.
    """

    method: str
    ratio: float | None = None
    gamma: float | None = None
    prefill: str = "dense"
    budget: float | None = None


def grid(
    methods: Sequence[str],
    ratios: Sequence[float],
    gammas: Sequence[float],
    prefills: Sequence[str],
    budgets: Sequence[float] = (),
) -> list[Point]:
    """All combinations that differ, dense first: a method without candidates has no gamma, the dense model no ratio.

    ``thresholds`` takes budgets alone, and has a dense prefill; ``full`` takes none, since it reads every channel.

    ``full`` has no partition that a prompt could be run on, so its prefill is always dense.
    """
    for name in methods:
        if name not in METHODS:
            raise EvaluationError(f"Unknown method {name!r}; known: {', '.join(METHODS)}.")
    points = [Point("dense")]
    for prefill in prefills:
        for ratio, budget in [*((ratio, None) for ratio in ratios), *((None, budget) for budget in budgets)]:
            for name in (m for m in METHODS if m in methods and m != "dense"):
                if (name == "thresholds" and budget is None) or (name == "full" and budget is not None):
                    continue
                for gamma in gammas if name == "pop" else [None]:
                    own = "dense" if name in ("full", "thresholds") else prefill
                    points.append(Point(name, ratio, gamma, own, budget))
    return list(dict.fromkeys(points))


@dataclass(frozen=True)
class Setup:
    """Everything but the grid that the figures depend on.

    Attributes
    ----------
    model : str
        As the user named it.
    prompt, continuation, generate : int
        Tokens: of a prompt, scored after it, and generated greedily to see where the outputs part (0: none).
    scope, batch : str
        As in :class:`~pop_mm.PopConfig`.
    batch_size : int
        Texts in one forward; with ``batch="shared"`` they share a partition.
    seed : int
        For the method ``random`` and the bootstrap.
    settings : dict
        More of :class:`~pop_mm.PopConfig`, for all methods.
    weight_format : str
        In which the model's weights are stored; where that is not "auto", the dense model it is compared with has them as loaded.
    """

    model: str
    prompt: int = 256
    continuation: int = 128
    generate: int = 16
    scope: str = "overall"
    batch: str = "per_sequence"
    batch_size: int = 4
    seed: int = 0
    settings: Mapping[str, Any] = field(default_factory=dict)
    weight_format: str = "auto"

    @property
    def tokens(self) -> int:
        """Of a text."""
        return self.prompt + self.continuation + 1


class Run:
    """One evaluation.

    Parameters
    ----------
    model : PreTrainedModel
    setup : Setup
    texts : sequence of Window
        Each of ``setup.tokens`` tokens.
    calibration : sequence of Window
        For ``wanda_sp``.
    folder : Path, optional
        Where finished parts are kept. A run with the same setup and texts goes on from them.
    reference : PreTrainedModel, optional
        The dense model that everything is compared with: of a quantised ``model``, what it was made from. Then the row "dense" is
        the quantised model, of which nothing is left out.

    Raises
    ------
    EvaluationError
        The folder holds parts of a run with another setup.
    """

    def __init__(
        self,
        model: Any,
        setup: Setup,
        texts: Sequence[Window],
        calibration: Sequence[Window] = (),
        folder: Path | None = None,
        reference: Any = None,
    ) -> None:
        self.model = model
        self._reference = model if reference is None else reference
        self.setup = setup
        self.texts = texts
        self._calibration_texts = calibration
        self._calibration: Calibration | None = None
        self.description = json.loads(json.dumps(self._describe()))  # as it comes back from a file
        self._file = None if folder is None else folder / UNITS
        self._units: dict[tuple[Point, int], dict[str, Any]] = {}
        if self._file is not None:
            self._read(self._file)

    def _describe(self) -> dict[str, Any]:
        return {
            **asdict(self.setup),
            "model_class": type(self.model).__name__,
            "parameters": self.model.num_parameters(),
            "weights": _fingerprint(self.model),
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "device": self.model.device.type,
            "texts": {window.name: digest(window) for window in self.texts},
            "calibration": {window.name: digest(window) for window in self._calibration_texts},
            "calibration_tokens": sum(len(window.ids) for window in self._calibration_texts),
            "versions": {
                "pop_mm": __version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "python": platform.python_version(),
            },
        }

    def _read(self, file: Path) -> None:
        """Take over what an earlier run has finished. A line that was cut off by an interruption is done again."""
        first = json.dumps({"setup": self.description})
        head, *lines = file.read_text(encoding="utf-8", errors="replace").split("\n") if file.exists() else [""]
        if not lines and first.startswith(head):  # there is none, or its first line was cut off
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(first + "\n", encoding="utf-8")
            return
        try:
            before = json.loads(head)["setup"]
        except (ValueError, KeyError, TypeError):
            raise EvaluationError(f"{file} is not the record of an evaluation. Name another folder.") from None
        if before != self.description:
            changed = sorted(k for k in {*before, *self.description} if before.get(k) != self.description.get(k))
            raise EvaluationError(
                f"{file.parent} holds an evaluation with another setup ({', '.join(changed)} differ). Name another folder, or "
                f"delete {file} to start anew."
            )
        for line in lines:
            try:
                unit = json.loads(line)
                self._units[Point(**unit["point"]), unit["batch"]] = unit
            except (ValueError, KeyError, TypeError):
                continue
        if lines[-1]:  # the next line must not go on where the last one was cut off
            with file.open("a", encoding="utf-8") as more:
                more.write("\n")

    def _keep(self, unit: dict[str, Any]) -> None:
        self._units[Point(**unit["point"]), unit["batch"]] = unit
        if self._file is not None:
            with self._file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(unit) + "\n")

    # work -----------------------------------------------------------------------------------------------------------

    def batches(self) -> Iterator[tuple[int, Tensor]]:
        """Number and token ids ``[B, tokens]`` of each batch of texts."""
        size = self.setup.batch_size
        for number, start in enumerate(range(0, len(self.texts), size)):
            yield number, torch.stack([window.ids for window in self.texts[start : start + size]]).to(self.model.device)

    @property
    def _batch_count(self) -> int:
        return -(-len(self.texts) // self.setup.batch_size)

    @cached_property
    def _dense_cost(self) -> Cost:
        return dense_cost(self._reference)

    def total(self, points: Sequence[Point]) -> int:
        """Parts of the whole work."""
        return len(points) * self._batch_count

    def work(self, points: Sequence[Point], advance: Callable[[], object] = lambda: None) -> None:
        """Do what is missing; ``advance`` is called after each part."""
        for number, ids in self.batches():
            missing = [point for point in points if (point, number) not in self._units]
            for _ in range(len(points) - len(missing)):
                advance()
            if not missing:
                continue
            prompt, tokens = self.setup.prompt, self.setup.generate
            logits = step_logits(self._reference, ids, prompt)
            outputs = greedy(self._reference, ids, prompt, tokens) if tokens else None
            for point in missing:
                self._keep(self._unit(point, number, ids, logits, outputs))
                advance()

    def _unit(self, point: Point, number: int, ids: Tensor, dense: Tensor, outputs: Tensor | None) -> dict[str, Any]:
        prompt, tokens = self.setup.prompt, self.setup.generate
        if point.method == "dense":
            known = self.model is self._reference
            scores = compare_rows(dense, dense if known else step_logits(self.model, ids, prompt), ids, prompt)
            whole = self._dense_cost if known else dense_cost(self.model)
            same = [tokens] * len(ids)
            if outputs is not None and not known:
                same = same_tokens(greedy(self.model, ids, prompt, tokens), outputs)
            cost, candidates = whole.to_dict(self._dense_cost), 0.0
        else:
            config = self.config(point)
            logits, session = pruned_step_logits(self.model, ids, prompt, config)
            scores = compare_rows(dense, logits, ids, prompt)
            sizes = [] if point.method == "thresholds" else [plan.sizes for plan in session.plans]
            candidates = sum(s.candidates for s in sizes) / sum(s.channels for s in sizes) if sizes else 0.0
            cost = cost_of(self.model, config, session.report).to_dict(self._dense_cost)
            same = [] if outputs is None else first_differences(self.model, ids, prompt, config, tokens, outputs)
        rows = [asdict(score) for score in scores]
        for row, count in zip(rows, same if tokens else [], strict=False):
            row["same_tokens"] = count
        return {"point": asdict(point), "batch": number, "scores": rows, "cost": cost, "candidates": candidates}

    def config(self, point: Point) -> Any:
        """The session's settings at a point that is not dense."""
        if point.method == "wanda_sp" and self._calibration is None:
            if not self._calibration_texts:
                raise EvaluationError("wanda_sp ranks channels by calibration text: give some (--calibration FILE).")
            ids = [window.ids.unsqueeze(0).to(self.model.device) for window in self._calibration_texts]
            self._calibration = calibrate(self.model, ids)
        settings = {"scope": self.setup.scope, "batch": self.setup.batch, "prefill": point.prefill}
        gamma = 0.1 if point.gamma is None else point.gamma
        return config_for(
            point.method,
            point.ratio,
            gamma,
            budget=point.budget,
            seed=self.setup.seed,
            calibration=self._calibration,
            **{**settings, **self.setup.settings},
        )

    # results --------------------------------------------------------------------------------------------------------

    def values(self, point: Point, name: str) -> list[float]:
        """One value of each text: "loss", "kl", "agreement" or "same_tokens"."""
        return [row[name] for number in range(self._batch_count) for row in self._units[point, number]["scores"]]

    def results(self, points: Sequence[Point]) -> dict[str, Any]:
        """``{"setup": ..., "rows": [...]}``; the same for the same setup and points."""
        return {"setup": self.description, "rows": [self._row(point, points) for point in points]}

    def _row(self, point: Point, points: Sequence[Point]) -> dict[str, Any]:
        seed = self.setup.seed
        several = len(self.texts) > 1  # one text says nothing about others
        loss = bootstrap(self.values(point, "loss"), seed=seed)
        row: dict[str, Any] = {
            "model": self.setup.model,
            "weight_format": self.setup.weight_format,
            **asdict(point),
            "candidates": self._units[point, 0]["candidates"],
            "texts": len(self.texts),
            "perplexity": math.exp(loss.value),
            "perplexity_interval": [math.exp(loss.low), math.exp(loss.high)] if several else None,
        }
        for name in ("kl", "agreement", *(["same_tokens"] if self.setup.generate else [])):
            found = bootstrap(self.values(point, name), seed=seed)
            row |= {name: found.value, f"{name}_interval": [found.low, found.high] if several else None}
        static = Point("static", point.ratio, None, point.prefill, point.budget)
        if static in points and point != static:
            apart = difference(self.values(point, "kl"), self.values(static, "kl"), seed)
            row["kl_minus_static"] = apart.to_list() if several else [apart.value, None, None]
        row["cost"] = self._cost(point)
        row["bytes_read"] = sum(size for part, size in row["cost"]["bytes"].items() if part != "scoring")
        return row

    def _cost(self, point: Point) -> dict[str, Any]:
        """Mean over batches, by texts: experts that wait for their tokens make it differ."""
        units = [(len(unit["scores"]), unit["cost"]) for (where, _), unit in self._units.items() if where == point]
        count = sum(n for n, _ in units)

        def mean(get: Callable[[dict[str, Any]], float]) -> float:
            return sum(n * get(cost) for n, cost in units) / count

        parts = {kind: list(units[0][1][kind]) for kind in ("multiply_adds", "bytes")}
        return {
            **{
                kind: {name: round(mean(lambda c, k=kind, n=name: c[k][n])) for name in names}  # type: ignore[misc]
                for kind, names in parts.items()
            },
            **{kind: mean(lambda c, k=kind: c[k]) for kind in ("multiply_adds_share", "bytes_share")},  # type: ignore[misc]
        }


def _fingerprint(model: Any) -> str:
    """A short hash of the beginning of every parameter: another checkpoint in the same folder is another model."""
    found = hashlib.sha256()
    for name, parameter in model.named_parameters():
        held = tensors_behind(parameter)
        start = (held[0] if held else parameter).detach().flatten()[:64].cpu()
        found.update(name.encode() + (b"" if start.is_meta else start.contiguous().view(torch.uint8).numpy().tobytes()))
    return found.hexdigest()[:16]


__all__ = ["EvaluationError", "Point", "Run", "Setup", "grid"]
