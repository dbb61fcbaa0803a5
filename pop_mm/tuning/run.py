"""The search: which budgets are measured, in which order, and which is chosen."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from ..adapters import adapter_for
from ..errors import ConfigError
from ..evaluation import texts as reading
from ..evaluation.intervals import difference
from ..report.footprint import weights_per_token
from ..samples import load_passages
from ..session.threshold_session import ThresholdPlan, plan_thresholds
from ..settings.config import PopConfig
from .quality import Quality, QualityMeter
from .result import TuneError, TunePoint, TuneResult
from .search import first_that_holds, most_questions
from .speed import measure_speed

_LEAST = 20  # hundredths: below it, answers are of no use on any model that was measured
_KL_STEP, _SPEED_STEP = 1, 5  # hundredths between two budgets that are told apart


def tune(
    model: Any,
    tokenizer: Any,
    *,
    max_kl: float | None = None,
    min_speedup: float | None = None,
    text: str | Sequence[str] | Mapping[str, str] | None = None,
    prompt: int = 256,
    continuation: int = 128,
    limit: int | None = 12,
    new_tokens: int = 64,
    rounds: int = 3,
    progress: Callable[[int, int], object] = lambda done, total: None,
    reference: Any = None,
) -> TuneResult:
    """Find the budget of ``thresholds`` for a target on a text.

    ``max_kl``: the smallest budget, to a hundredth, whose KL divergence from the dense model is at most this. It is then compared
    with leaving attention dense at the same bytes (``scope="ffn"``); where that is better beyond doubt, the search goes on there.
    ``min_speedup``: the largest budget, in steps of 0.05, that decodes so much faster than the dense model on torch's kernels.
    Both are bisections: the KL falls, and the time grows, with the budget.

    Parameters
    ----------
    model : PreTrainedModel
        In eval mode; it is left bit for bit as it was.
    tokenizer : PreTrainedTokenizerBase
    max_kl : float, optional
        Nats a token, above 0: mean over the texts of the mean over their steps. The prompt is dense, each later token is a decode
        step of its own (teacher forcing).
    min_speedup : float, optional
        Above 1, measured through ``generate`` at batch 1 with dense and pruned in turn; needs a quiet machine. Give one of both.
    text : str, sequence of str, or mapping of name to str, optional
        Prose that ships, without it. A long text is cut into as many windows as it has.
    prompt, continuation : int
        Tokens of each window: of its prompt, and scored after it.
    limit : int, optional
        Most windows; of several texts, the first of each come first. None: all.
    new_tokens : int
        Decoded in each round of a measurement of speed.
    rounds : int
        Of each measurement of speed. 0 with ``max_kl``: no speed is measured.
    progress : callable
        Called with the steps that are done, and with how many there are at most.
    reference : PreTrainedModel, optional
        The dense model to compare with, in quality and in speed: of a quantised ``model``, what it was made from. Without it,
        ``model`` itself.

    Returns
    -------
    TuneResult
        Its ``config`` is for :func:`pop_mm.prune`; None if the target cannot be met.

    Raises
    ------
    TuneError
        Not one target, or a value out of range; nothing is read by rows, so that no speed can be met.
    TextError
        The texts are too short.
    AdapterError
        The model cannot be pruned.
    """
    check_target(max_kl, min_speedup, new_tokens, rounds)
    search = _Search(model, max_kl, min_speedup, new_tokens, rounds, progress, reference)
    windows = reading.windows(_named(text), tokenizer, prompt + continuation + 1, limit)
    reading.check_tokens(model, windows, tokenizer)
    search.meter = QualityMeter(model, windows, prompt, search.tick, reference)
    search.prompts = [window.ids[:prompt].unsqueeze(0).to(model.device) for window in windows]
    chosen = search.by_kl() if max_kl is not None else search.by_speed()
    curve = list(search.points.values())
    best = chosen or (curve[-1] if max_kl is not None else max(curve, key=lambda point: point.speedup or 0))
    return TuneResult(max_kl, min_speedup, curve, chosen, best, len(windows), prompt, continuation, search.notes)


def check_target(max_kl: float | None, min_speedup: float | None, new_tokens: int, rounds: int) -> None:
    """Raise ``TuneError`` unless there is one target, and all numbers are in range."""
    if (max_kl is None) == (min_speedup is None):
        raise TuneError("Give one target: max_kl (0.05, for example) or min_speedup (1.5); not both, not neither.")
    for name, value, least in (("max_kl", max_kl, 0), ("min_speedup", min_speedup, 1)):
        if value is not None and (isinstance(value, bool) or not math.isfinite(value) or value <= least):
            raise TuneError(f"{name} must be a number above {least}; got {value!r}.")
    fewest = 0 if min_speedup is None else 1
    for name, count, least in (("new_tokens", new_tokens, 4), ("rounds", rounds, fewest)):
        if count < least:
            raise TuneError(f"{name} must be {least} or more; got {count!r}.")


def _named(text: str | Sequence[str] | Mapping[str, str] | None) -> dict[str, str]:
    if text is None:
        return load_passages()
    if isinstance(text, str):
        return {"text": text}
    return dict(text) if isinstance(text, Mapping) else {f"text {n}": one for n, one in enumerate(text, start=1)}


def _why_masked(plans: Sequence[ThresholdPlan]) -> str | None:
    """Why no weights are read by rows; None if some are."""
    return None if any(plan.backend == "rows" for plan in plans) else plans[0].reason


class _Search:
    """What was measured so far. Budgets are told apart by the share of all layers' bytes, whatever they are a budget of."""

    meter: QualityMeter
    prompts: list[Tensor]

    def __init__(
        self,
        model: Any,
        max_kl: float | None,
        min_speedup: float | None,
        new_tokens: int,
        rounds: int,
        progress: Callable[[int, int], object],
        reference: Any = None,
    ) -> None:
        self.model, self.max_kl, self.min_speedup = model, max_kl, min_speedup
        self._reference = reference
        self._new_tokens, self._rounds, self._progress = new_tokens, rounds, progress
        self._done = self._total = 0
        self.points: dict[tuple[str, int], TunePoint] = {}
        self._qualities: dict[tuple[str, int], Quality] = {}
        self.notes: list[str] = []
        plans = plan_thresholds(model, PopConfig(budget=0.99))
        if (reason := _why_masked(plans)) is not None:
            said = f"Nothing is read by rows here, so there is no speed-up: {reason}."
            if min_speedup is not None:
                raise TuneError(said)
            self.notes.append(said)
        counts = weights_per_token(model, adapter_for(model), plans)
        layers = sum(count for name, count in counts.items() if name != "lm_head")
        self._attention = counts["attention"] / layers

    def tick(self) -> None:
        """A part of the work is done."""
        self._done += 1
        self._progress(self._done, max(self._done, self._total))

    def by_kl(self) -> TunePoint | None:
        """The smallest budget that keeps the KL, and its split."""
        shares = self._fitting("overall", range(_LEAST, 100, _KL_STEP))
        forwards = len(self.meter.batches)
        self._total = (most_questions(len(shares)) + 1) * forwards + self._rounds
        share = self._smallest("overall", shares)
        if share is None:
            return None
        place = ("overall", share)
        if self._fits("ffn", share):
            self._measure_kl("ffn", share)
            others = self._qualities["ffn", share].kl, self._qualities[place].kl
            if difference(*others).high < 0:
                lower = self._fitting("ffn", range(_LEAST, share, _KL_STEP))
                self._total += most_questions(len(lower)) * forwards
                further = self._smallest("ffn", lower)
                place = ("ffn", share if further is None else further)
        if self._rounds:
            self._measure_speed(*place)
        return self.points[place]

    def by_speed(self) -> TunePoint | None:
        """The largest budget that reaches the speed, and what it costs."""
        shares = self._fitting("overall", range(_LEAST, 100, _SPEED_STEP))[::-1]
        self._total = most_questions(len(shares)) * self._rounds + len(self.meter.batches)
        share = first_that_holds(shares, lambda share: self._measure_speed("overall", int(share)))
        if share is None:
            return None
        self._measure_kl("overall", int(share))
        return self.points["overall", int(share)]

    def _smallest(self, scope: str, shares: Sequence[int]) -> int | None:
        found = first_that_holds(shares, lambda share: self._measure_kl(scope, int(share)))
        return None if found is None else int(found)

    def _measure_kl(self, scope: str, share: int) -> bool:
        point = self._point(scope, share)
        quality = self._qualities[scope, share] = self.meter.measure(point.config)
        kl = quality.interval
        point = replace(point, kl=kl.value, agreement=quality.agreement)
        if len(quality.kl) > 1:
            point = replace(point, kl_interval=(kl.low, kl.high))
        if self.max_kl is not None:
            point = replace(point, holds=kl.value <= self.max_kl)
        self.points[scope, share] = point
        return point.holds

    def _measure_speed(self, scope: str, share: int) -> bool:
        point = self._point(scope, share)
        asked = (self.prompts, self._new_tokens, self._rounds, self.tick, self._reference)
        found = measure_speed(self.model, point.config, *asked)
        point = replace(
            point,
            speedup=found.speedup,
            speedup_range=(min(found.speedups), max(found.speedups)),
            tokens_per_s=found.tokens_per_s,
            dense_tokens_per_s=found.dense_tokens_per_s,
        )
        if self.min_speedup is not None:
            point = replace(point, holds=found.speedup >= self.min_speedup)
        self.points[scope, share] = point
        return point.holds

    def _point(self, scope: str, share: int) -> TunePoint:
        """What is known of a setting."""
        known = self.points.get((scope, share))
        return known or TunePoint(self._budget(scope, share), scope, share / 100)

    def _budget(self, scope: str, share: int) -> float:
        """The budget in a scope with which a token reads so many hundredths of the layers' bytes."""
        if scope == "overall":
            return share / 100
        return round((share / 100 - self._attention) / (1 - self._attention), 4)

    def _fits(self, scope: str, share: int) -> bool:
        budget = self._budget(scope, share)
        if not 0 < budget < 1:
            return False
        try:
            plan_thresholds(self.model, PopConfig(budget=budget, scope=scope))  # type: ignore[arg-type]
        except ConfigError:
            return False
        return True

    def _fitting(self, scope: str, shares: Sequence[int]) -> list[int]:
        """Those that the model can meet: all from the smallest on."""
        least = first_that_holds(shares, lambda share: self._fits(scope, int(share)))
        return [] if least is None else [share for share in shares if share >= least]


__all__ = ["check_target", "tune"]
