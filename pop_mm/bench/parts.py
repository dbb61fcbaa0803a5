"""Time by part of a decode step and of a prefill, in runs of their own: looking at parts costs time too.

Forwards are wrapped on their instances for one run, and put back exactly; a session tells its own parts. A part's time is its
own: what a part inside it takes is not in it. On a GPU every part waits for the device, so that what overlaps in a real step adds
up here.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters import Adapter, adapter_for
from ..patching import Patches
from ..session.session import Session
from ..weights.experts import Experts
from ..weights.layout import FFN
from .timing import generate, synchronise

STEP_PARTS = ("ffn", "attention", "lm_head", "selection")  # and framework, the rest
_PROJECTIONS = "projections"  # within attention
PROMPT_PARTS = ("statistics", "partition", "reordering")


@dataclass(frozen=True)
class Parts:
    """Seconds by part of one prompt and its decode steps.

    Attributes
    ----------
    step : dict of str to float
        Medians over decode steps: "ffn", "attention", "lm_head", "selection" (scoring and selection), and "framework", which
        is all the rest: norms, residuals, and what ``generate`` does between two forwards.
    prompt : dict of str to float
        Once a prompt: "statistics", "partition", "reordering", and "forward", the prefill's forward without these.
    projections : float
        Of attention, its modules that share an input with others or have one: q, k, v and o.
    """

    step: dict[str, float]
    prompt: dict[str, float]
    projections: float = 0.0

    @property
    def ffn_share(self) -> float:
        """F / T of a dense decode step."""
        return self.step["ffn"] / sum(self.step.values())

    @property
    def projections_share(self) -> float:
        """Attention's projections, of a dense decode step."""
        return self.projections / sum(self.step.values())

    @property
    def selection_share(self) -> float:
        """Scoring and selection, of a decode step."""
        return self.step["selection"] / sum(self.step.values())

    @property
    def prompt_overhead(self) -> float:
        """Statistics, partition and reordering, of the prefill's forward without them."""
        return sum(self.prompt[name] for name in PROMPT_PARTS) / self.prompt["forward"]


class PartClock:
    """A streamer for ``generate`` that charges time to the innermost part that runs.

    It keeps one record a token, that of the prompt's arrival first.

    Parameters
    ----------
    device : torch.device
    choosing : callable
        Seconds so far of choosing within the FFNs' kernels.
    """

    def __init__(self, device: torch.device, choosing: Callable[[], float] = lambda: 0.0) -> None:
        self.records: list[dict[str, float]] = []
        self._device = device
        self._choosing = choosing
        self._chosen = choosing()
        self.chosen = 0.0  # and what other choices took
        self._running = ["outside"]
        self._seconds: dict[str, float] = defaultdict(float)
        self._at = time.perf_counter()

    def push(self, part: str) -> None:
        """A part begins."""
        self._charge()
        self._running.append(part)

    def pop(self) -> None:
        """The part that began last ends."""
        self._charge()
        self._running.pop()

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function as a part."""

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            self.push(part)
            try:
                return function(*args, **kwargs)
            finally:
                self.pop()

        return call

    def now(self) -> float:
        """Seconds on a clock, once the device has done what it was given."""
        synchronise(self._device)
        return time.perf_counter()

    def took(self, part: str, seconds: float) -> None:
        """A choice within an FFN took so long."""
        self.chosen += seconds

    def put(self, value: Tensor) -> None:
        """One more token."""
        self._charge()
        before, self._chosen = self._chosen, self._choosing() + self.chosen
        self._seconds["selection"] += self._chosen - before
        self._seconds["ffn"] -= self._chosen - before
        self.records.append(dict(self._seconds))
        self._seconds.clear()

    def end(self) -> None:
        """Nothing is left to do."""

    def _charge(self) -> None:
        synchronise(self._device)
        now = time.perf_counter()
        self._seconds[self._running[-1]] += now - self._at
        self._at = now

    def parts(self) -> Parts:
        """Of a run of at least three tokens."""
        first, steps = self.records[1], self.records[3:]  # the step before them is the one that reorders
        projections = statistics.median(record.get(_PROJECTIONS, 0) for record in steps)
        for record in steps:
            record["attention"] = record.get("attention", 0) + record.pop(_PROJECTIONS, 0)
        step = {name: statistics.median(record.get(name, 0) for record in steps) for name in STEP_PARTS}
        rest = [sum(v for k, v in record.items() if k not in STEP_PARTS) for record in steps]
        prompt = {name: sum(record.get(name, 0) for record in self.records) for name in PROMPT_PARTS}
        forward = sum(v for k, v in first.items() if k not in (*PROMPT_PARTS, "outside"))
        return Parts({**step, "framework": statistics.median(rest)}, {**prompt, "forward": forward}, projections)


def measure_parts(
    model: Any, records: Sequence[FFN | Experts], session: Session | None, ids: Tensor, new_tokens: int, **options: Any
) -> Parts:
    """One ``generate`` call on ids ``[B, tokens]``, by part.

    Parameters
    ----------
    records : sequence of FFN or Experts
        All of the model's.
    session : Session or None
        That which is attached to the model.
    """
    clock = PartClock(model.device, (lambda: 0.0) if session is None else (lambda: session.choosing_seconds))
    with watched(model, records, session, clock):
        generate(model, ids, new_tokens, clock, **options)
    return clock.parts()


@contextmanager
def watched(model: Any, records: Sequence[FFN | Experts], session: Session | None, clock: PartClock) -> Iterator[None]:
    """Within: the clock is told of every part."""
    with Patches() as patches:
        for instance, name, part in _model_targets(model, records):
            own = getattr(instance, name)
            patches.replace(instance, name, clock.timed(part, own))
        if session is not None:
            patches.replace(session.events, "listener", clock)
        patches.hook(model.register_forward_pre_hook(lambda *_: clock.push("framework"), prepend=True))
        patches.hook(model.register_forward_hook(lambda *_: clock.pop()))
        yield


def _model_targets(model: Any, records: Sequence[FFN | Experts]) -> Iterator[tuple[Any, str, str]]:
    adapter = adapter_for(model)
    for record in records:
        if isinstance(record, Experts):
            yield record.module, "forward", "ffn"
        else:
            for module in record.modules if record.holder is None else [record.holder]:
                yield module, "forward", "ffn"
    for module in attention_modules(model, adapter, records):
        yield module, "forward", "attention"
    for group in adapter.input_groups(model):
        for module in group.modules:
            yield module, "forward", _PROJECTIONS
    head = model.get_output_embeddings()
    if head is not None:
        yield head, "forward", "lm_head"


def attention_modules(model: Any, adapter: Adapter, records: Sequence[FFN | Experts]) -> list[nn.Module]:
    """Parts of the decoder layers that hold no FFN and are no norm: attention and other token mixers."""
    ffn = {module for record in records for module in record.modules}
    return [
        child
        for layer in adapter.layers(model)[1]
        for child in layer.children()
        if any(parameter.dim() >= 2 for parameter in child.parameters())
        and not any(module in ffn for module in child.modules())
    ]


__all__ = ["PROMPT_PARTS", "STEP_PARTS", "Parts", "measure_parts"]
