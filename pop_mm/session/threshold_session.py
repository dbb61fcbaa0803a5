"""A session of the method ``thresholds``: its plan by a budget, and what differs from POP's session."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..adapters import Adapter
from ..decoding.engine import Engine
from ..decoding.state import PromptState
from ..decoding.threshold_engine import ThresholdEngine
from ..decoding.threshold_state import Record, RecordState
from ..errors import AdapterError, SessionError
from ..executors.rows import RowsExecutor
from ..executors.rows_record import why_not as why_not_rows
from ..formats import tensors_behind
from ..methods import Thresholds
from ..methods.budget import Weights, threshold_shares
from ..report.threshold_report import ThresholdReport
from ..settings.config import PopConfig
from ..tracking.phase import Forward, Phase
from ..weights.experts import Experts
from ..weights.groups import InputGroup
from ..weights.layout import FFN, PLAIN_TYPES
from .eager import CompiledParts, without_wrappers
from .planning import kind_of, prunable, shared_storages, storage
from .session import Session
from .spread import fixed_in, on_process


@dataclass(frozen=True)
class ThresholdPlan:
    """What a session does with one FFN, the experts of a layer, or attention modules that share an input.

    Attributes
    ----------
    record : FFN, Experts or InputGroup
    shares : mapping of str to float
        Input ("x"; "h" in front of the down projection) -> share of its entries that decode steps keep.
    backend : str
        ``"rows"`` (for one sequence reads what it needs), ``"masked"`` (reads all), or ``"dense"`` (leaves nothing out).
    reason : str
        Why.
    """

    record: Record
    shares: Mapping[str, float]
    backend: str
    reason: str

    @property
    def ffn(self) -> Any:
        """The record, by the name that POP's plans have for it."""
        return self.record

    @property
    def matrices(self) -> dict[str, int]:
        """Input -> weights that a token reads of the matrices behind it, those of its experts only."""
        record = self.record
        if isinstance(record, InputGroup):
            return {"x": record.weight_count}
        down = record.size * record.hidden_size * (record.top_k if isinstance(record, Experts) else 1)
        return {"x": record.weight_count - down, "h": down}

    def share_read(self, batch: int = 1) -> float:
        """Share of the weights that a decode step of ``batch`` rows reads: by rows what is meant for one row, else all."""
        return self.share_intended if self.backend == "rows" and batch == 1 else 1.0

    @property
    def share_intended(self) -> float:
        """Share of the weights that a step of one row is meant to read."""
        read = sum(count * self.shares[which] for which, count in self.matrices.items())
        return read / sum(self.matrices.values())

    def to_dict(self) -> dict[str, Any]:
        """Plain values, one row of ``pop-mm inspect --json``."""
        record = self.record
        return {
            "name": record.name,
            "layer": record.layer,
            "role": record.role,
            "kind": record.kind if isinstance(record, InputGroup) else "ffn",
            "experts": record.count if isinstance(record, Experts) else None,
            "top_k": record.top_k if isinstance(record, Experts) else None,
            "size": record.size,
            "shares": dict(self.shares),
            "weights": self.matrices,
            "backend": self.backend,
            "reason": self.reason,
        }


def plan_thresholds(
    model: nn.Module, config: PopConfig, adapter: Adapter | None = None, fixed: Mapping[str, str] | None = None
) -> list[ThresholdPlan]:
    """What a session would do with every input of a model. Changes nothing; works on the meta device too.

    Parameters
    ----------
    fixed : mapping of str to str, optional
        Name of a record -> why its weights cannot be moved, from :func:`pop_mm.session.sharing.fixed_weights`.

    Raises
    ------
    AdapterError
        No adapter fits, or nothing can be pruned.
    ConfigError
        The budget is less than what stays dense.
    """
    adapter, records = prunable(model, adapter)
    records = [on_process(record, together=True) for record in records]
    groups = [without_wrappers(group) for group in adapter.input_groups(model)] if config.scope == "overall" else []
    groups = [on_process(group, together=True) for group in groups]
    whole = [ffn for ffn in records if ffn.role == "shared_expert" and not config.experts.prune_shared]
    plain = [ThresholdPlan(record, {"x": 1.0, "h": 1.0}, "dense", "") for record in (*records, *groups)]
    mine = [plan for plan in plain if plan.record not in whole]
    attention = 0
    if config.scope == "overall":
        attention = sum(layer.attention for layer in adapter.layer_weights(model, records).values())
    rest = attention - sum(group.weight_count for group in groups)
    weights = Weights(
        x=sum(plan.matrices["x"] for plan in mine),
        h=sum(plan.matrices.get("h", 0) for plan in mine),
        dense=rest + sum(ffn.weight_count for ffn in whole),
    )
    shares = dict(zip("xh", threshold_shares(weights, config.budget or 1.0), strict=True))
    head = head_of(model, config, adapter)
    if head is not None:
        mine.append(ThresholdPlan(head, {}, "", ""))
    choose = _chooser(model, config, records, fixed_in(model, [plan.record.name for plan in mine], fixed or {}))
    with CompiledParts(model, [plan.record for plan in mine]):  # they run, and are judged, without what was compiled
        plans = [ThresholdPlan(plan.record, _shares(plan, shares, config), *choose(plan.record)) for plan in mine]
    plans += [ThresholdPlan(ffn, {"x": 1.0, "h": 1.0}, "dense", "prune_shared=False") for ffn in whole]
    return sorted(plans, key=lambda plan: (plan.record.layer, not isinstance(plan.record, InputGroup)))


def head_of(model: nn.Module, config: PopConfig, adapter: Adapter) -> InputGroup | None:
    """The lm_head if entries of its input are to be left out.

    Raises
    ------
    AdapterError
        They are, and the adapter names none.
    """
    budget = _head_budget(config)
    if budget in (None, 1):
        return None
    head = adapter.head(model)
    if head is None:
        raise AdapterError(
            f"head_budget={budget:g} was given, but {type(adapter).__name__} names no lm_head of "
            f"{type(model).__name__} that is linear and whose input it knows. Leave head_budget out, or write an adapter whose "
            "head() names it."
        )
    return without_wrappers(head)


def _head_budget(config: PopConfig) -> float | None:
    assert isinstance(config.chosen, Thresholds)
    return config.chosen.head_budget


def _shares(plan: ThresholdPlan, shares: Mapping[str, float], config: PopConfig) -> dict[str, float]:
    if plan.record.role == "lm_head":
        budget = _head_budget(config)
        assert budget is not None
        return {"x": budget}
    return {which: shares[which] for which in plan.matrices}


def _chooser(
    model: nn.Module, config: PopConfig, records: Sequence[FFN | Experts], fixed: Mapping[str, str]
) -> Callable[[Record], tuple[str, str]]:
    """What tells a record's backend, and why."""
    types = dict.fromkeys((*PLAIN_TYPES, *(t for r in records if isinstance(r, FFN) for t in r.down.plain_types)))
    shared = shared_storages(model)

    def choose(record: Record) -> tuple[str, str]:
        if config.budget == 1 and record.role != "lm_head":
            return "dense", "a budget of 1"
        if config.backend == "masked" or config.kernels == "stock":
            return "masked", "asked for"
        reason = why_not_rows(record, tuple(types), config.kernels == "triton")
        own = 2 if isinstance(record, InputGroup) and _plainly_tied(record) else 1
        if reason is None and _is_shared(record, shared, own):
            reason = f"{record.name} shares its weights with another module"
        reason = reason or fixed.get(record.name)
        return ("rows", f"{kind_of(record.modules)} weights") if reason is None else ("masked", reason)

    return choose


def _is_shared(record: Record, shared: Mapping[int, int], own: int) -> bool:
    """Whether memory of its weights is used in more than ``own`` places."""
    parameters = (p for module in record.modules for p in module.parameters(False))
    return any(shared[storage(tensor)] > own for p in parameters for tensor in tensors_behind(p))


def _plainly_tied(group: InputGroup) -> bool:
    """Whether a tied embedding looks up the same bits where its weight is stored in another order."""
    return type(group.tied) is nn.Embedding and group.tied.max_norm is None


class ThresholdSession(Session):
    """A :class:`Session` whose decode steps leave out the entries below thresholds from the prompt."""

    _engine: ThresholdEngine

    @property
    def _rows_matter(self) -> bool:
        """Whether each row of a batch has knowledge of its own."""
        return True

    @property
    def _ffns(self) -> list[FFN | Experts]:
        """What is planned, but for what is no FFN."""
        return [plan.ffn for plan in self.plans if not isinstance(plan.ffn, InputGroup)]

    def _records(self) -> Sequence[Any]:
        """What the adapter finds now."""
        groups = self._adapter.input_groups(self.model) if self.config.scope == "overall" else []
        head = head_of(self.model, self.config, self._adapter)
        return [*super()._records(), *groups, *([] if head is None else [head])]

    def _make_plans(self, config: PopConfig, fixed: Mapping[str, str]) -> list[Any]:
        return plan_thresholds(self.model, config, self._adapter, fixed)

    def _make_engine(self, pruned: Sequence[Any]) -> Engine:
        shares, weights = [plan.shares for plan in pruned], [plan.matrices for plan in pruned]
        records = [plan.record for plan in pruned]
        return ThresholdEngine(records, shares, weights, self.config, self._modalities, self.events)

    def _build(self, plans: list[Any]) -> None:
        super()._build(plans)
        before = getattr(self, "_rows", None)
        self._rows = RowsExecutor(
            self._engine, self._tracker, self._masked, self._moved, self.config.kernels == "triton"
        )
        self._rows.seconds = 0.0 if before is None else before.seconds

    def _moved(self, tensors: Iterable[Tensor]) -> None:
        if self._watch is not None:
            self._watch.moved(tensors)

    def _put_back(self) -> Mapping[nn.Module, Callable[[], None]]:
        return {**super()._put_back(), **self._rows.backs}

    def _backend(self, name: str) -> Any:
        return self._rows if name == "rows" else super()._backend(name)

    def _begin(self, forward: Forward) -> None:
        if forward.phase is Phase.MIXED and (name := self._engine.spread_experts()) is not None:
            raise SessionError(
                f"split() needs thresholds in the middle of a forward, for which all processes must run {name}, but with expert "
                "parallelism a process whose experts get no token runs none. Prefill the context, and score the rest after it."
            )
        super()._begin(forward)
        if forward.phase is not Phase.PREFILL:
            self._engine.begin_answer(forward)
        if forward.phase is Phase.DECODE and "rows" in self._backends:
            self._rows.begin(forward)

    def end(self, forward: Forward, completed: bool) -> None:
        """After a forward, also one that raised (called by the phase tracker)."""
        super().end(forward, completed)
        if completed:
            self._rows.end(forward)
            self._engine.end_answer(forward)

    def _release(self) -> None:
        try:
            if self._engaged:
                self._rows.detach()
        finally:
            super()._release()

    def adopt(self, cache: Any, original: Any) -> None:
        """Let a copy of a cache (``copy.deepcopy``) continue the prompt of the original, which was prefilled here."""
        self._rows.flush()
        super().adopt(cache, original)

    @property
    def moving_seconds(self) -> float:
        """Time spent turning weights."""
        return self._rows.seconds

    @staticmethod
    def _outline(plans: Sequence[Any]) -> list[Any]:
        """What the state of a prompt hangs on."""
        return [(plan.record.name, plan.shares, plan.backend == "dense") for plan in plans]

    @property
    def report(self) -> ThresholdReport:  # type: ignore[override]
        """What happened so far; thresholds and kept shares are those of the latest prompt."""
        self._rows.flush()
        state = self._latest()
        plans: list[Any] = self.plans
        return ThresholdReport.of(self.model, self._adapter, self.config, plans, state, self.timings)

    def statistics(self) -> dict[str, Tensor]:
        """The latest prompt's magnitudes: ``"name.x"`` or ``"name.h"`` -> ``[B, 4096]``, counts of bins.

        Of a model that is spread over processes: of the entries that this one has.
        """
        found: dict[str, Tensor] = {}
        if self._last is not None:
            for record, state in zip(self._engine.ffns, self._last.ffns, strict=True):
                assert isinstance(state, RecordState)
                for which, inputs in state.inputs.items():
                    if inputs.counts:
                        found[f"{record.name}.{which}"] = sum(
                            inputs.counts.values(), 0 * next(iter(inputs.counts.values()))
                        )
        return found

    def _check_rows(self, forward: Forward) -> None:
        state: PromptState = forward.state
        if state.rows not in (1, forward.rows):
            raise SessionError(
                f"The cache was prefilled with {state.rows} rows and is continued with {forward.rows}, so it is unknown which "
                "row's thresholds are whose. Prefill all rows."
            )


__all__ = ["ThresholdPlan", "ThresholdSession", "plan_thresholds"]
