"""A pruning session: attach to a model, prune while it decodes, report, and restore the model exactly."""

from __future__ import annotations

import sys
import time
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from ..adapters import Adapter
from ..decoding.state import PromptState
from ..errors import AdapterError, ConfigError, NonFiniteError, PopWarning, SessionError
from ..executors.experts import IMPLEMENTATION
from ..modality import MODALITIES
from ..partition import Sizes
from ..report.report import Alone, Report, build_report
from ..report.shown import Shown, counts
from ..settings.advice import advise
from ..settings.config import PopConfig, as_config
from ..settings.keywords import Settings
from ..tracking.phase import Forward, Phase
from .attachment import Attachment, packed_message, written_message
from .eager import CompiledParts, in_compiled_call, is_compiled
from .planning import FFNPlan, plan_ffns


class Session(Attachment, Shown):
    """Prunes one model while it decodes. Use it as a context manager, or with :meth:`attach` and :meth:`detach`.

    Parameters
    ----------
    model : PreTrainedModel
        In eval mode. Inside the session its ``generate``, its forward, and pipelines built on it are pruned.
    config : PopConfig
    adapter : Adapter, optional
        Instead of the one that the model type names.

    Attributes
    ----------
    events : Events
        Tells a listener when statistics, partitions, choices and moves of channels begin and end.

    Raises
    ------
    AdapterError, ConfigError
        As :func:`plan_ffns`; nothing has been changed then.
    """

    def __new__(cls, model: nn.Module, config: PopConfig, adapter: Adapter | None = None) -> Session:
        """A session of the class that runs the config's method."""
        if cls is Session:
            module, name = config.chosen.session.split(":")
            cls = getattr(import_module(module), name)
        return super().__new__(cls)

    def __del__(self) -> None:
        if self._awaited and not sys.is_finalizing():
            self._awaited = False
            warnings.warn(
                "A session was made by prune() and never attached, so nothing was pruned: use "
                "`with pop_mm.prune(model, ...) as session:`, or call session.attach().",
                PopWarning,
                stacklevel=2,
            )

    # how it shows itself --------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Plain values: the model's class, the settings, and what is planned for each part of it."""
        rows = [dict(row) for row in self._shown_rows()]
        return {
            "model": type(self.model).__name__,
            "config": self.config.to_dict(),
            "attached": self.attached,
            "plans": rows,
        }

    def _shown_line(self) -> str:
        state = "attached" if self.attached else "not attached"
        backends = counts(Counter(plan.backend for plan in self.plans))
        return f"{type(self.model).__name__}, {self.config.label[:200]}, {state}; {backends}"

    def _shown_rows(self) -> Sequence[Mapping[str, Any]]:
        return [plan.to_dict() for plan in self.plans]

    def _shown_table(self) -> tuple[Sequence[str], Sequence[Sequence[str]]]:
        known = zip(self._shown_rows(), self.plans, strict=True)
        rows = [(str(row["layer"]), str(row["role"]), plan.backend) for row, plan in known]
        return ("layers", "part", "backend"), rows

    # use ------------------------------------------------------------------------------------------------------------

    def split(self, context_length: int | Tensor) -> AbstractContextManager[None]:
        """Score a text in one forward: columns before ``context_length`` are prefill, the others decode steps.

        Parameters
        ----------
        context_length : int or Tensor
            Columns of the input (padding included) that are context; for all rows, or ``[B]``.
        """
        self._require_attached("split()")
        return self._tracker.split(context_length)

    def adopt(self, cache: Any, original: Any) -> None:
        """Let a copy of a cache (``copy.deepcopy``) continue the prompt of the original, which was prefilled here."""
        self._require_attached("adopt()")
        self._tracker.adopt(cache, original)

    @property
    def report(self) -> Report:
        """What happened so far; the partition and the steps are those of the latest prompt."""
        self._inplace.static.flush()
        state = self._latest()
        name = "triton" if self.config.kernels == "triton" else "stock" if self._matvec is None else "compiled"
        alone = self._alone(state) if state is not None and self._engine.decides_alone else []
        return build_report(
            self.model, self._adapter, self.config, self.plans, state, self.timings, self.moved_channels, name, alone
        )

    def _latest(self) -> PromptState | None:
        """The latest prompt, for a report: decided, where this process decides alone."""
        self._awaited = False
        self.timings.moving = self.moving_seconds
        state = self._last
        if state is not None and state.tokens is not None and not state.partitioned and self._engine.decides_alone:
            self._engine.partition_all(state)
        return state

    def statistics(self) -> dict[str, Tensor]:
        """What the latest prompt's tokens did: name of an FFN -> sum of squared activations of each channel.

        ``[D]`` (with ``batch="per_sequence"`` ``[B, D]``), for experts ``[E, D]`` (``[B * E, D]``); in the original channel
        order. FFNs that are dense, or that the prompt did not run, are missing. Of a model that is spread over processes: of the
        channels (or experts) that this one has.
        """
        found = {}
        if self._last is not None:
            for ffn, state in zip(self._engine.ffns, self._last.ffns, strict=True):
                energy = state.energy({})
                if energy is not None:
                    found[ffn.name] = energy if self._engine.per_sequence or ffn.experts else energy[0]
        return found

    def _alone(self, state: PromptState) -> list[Alone]:
        """For each FFN that is not dense, the partition that each of the prompt's modalities would make alone."""
        present = [MODALITIES[m] for m in sorted(state.tokens_of) if bool(state.tokens_of[m].any())]
        if len(present) < 2:
            return []
        weights = {name: {other: float(other == name) for other in MODALITIES} for name in present}
        found: list[Alone] = []
        for index, ffn in enumerate(state.ffns):
            parts = {name: self._engine.rank(index, state, weights[name]) for name in present}
            if ffn.experts is None and not self._engine.per_sequence:
                parts = {name: part[0] for name, part in parts.items()}
            reached = {}
            if ffn.experts is not None:
                energies = {name: ffn.energy(weights[name]) for name in present}
                reached = {name: energy.sum(-1) > 0 for name, energy in energies.items() if energy is not None}
            elif self._engine.per_sequence:  # a row without such tokens
                device = parts[present[0]].pruned.device
                reached = {name: state.tokens_of[MODALITIES.index(name)].to(device) > 0 for name in present}
            found.append((parts, reached))
        return found

    def _require_attached(self, what: str) -> None:
        if not self.attached:
            raise SessionError(f"{what} needs an attached session: use `with prune(...) as session:`.")

    # what the phase tracker calls -----------------------------------------------------------------------------------

    def new_state(self, rows: int, cache: Any) -> PromptState:
        """State of a new prompt (called by the phase tracker)."""
        return self._engine.new_state(rows, cache)

    def begin(self, forward: Forward) -> None:
        """Before a forward (called by the phase tracker)."""
        if self.model.training:
            raise SessionError("The model was put in training mode inside the session; call model.eval().")
        self._check_rows(forward)
        self._check_experts()
        self._enter()
        try:
            self._check_model(forward)
            self._begin(forward)
        except BaseException:
            self._leave()
            raise
        self._started.at = time.perf_counter()

    def _begin(self, forward: Forward) -> None:
        state: PromptState = forward.state
        self._engine.settle(forward)
        if forward.next_chunk and self.config.chosen.prefill == "partition":
            raise ConfigError(
                "prefill='partition' needs the whole prompt in one forward, since the whole prompt chooses the channels on "
                "which it is completed. Leave prefill_chunk_size out, or use prefill='dense'."
            )
        if forward.phase is not Phase.DECODE:
            state.begin_chunk(forward)
            self._inplace.unpack()
            before = state.tokens
            self._engine.count_tokens(forward)
            if forward.phase is Phase.PREFILL or before is None or not torch.equal(before, state.tokens):  # type: ignore[arg-type]
                state.invalidate()
            if forward.phase is Phase.MIXED:
                self._engine.check_prompt(state)
            elif self.config.chosen.prefill == "partition" and "inplace" in self._backends:
                self._inplace.begin_prompt(forward)
            self._last = state
            return
        if not (state.moved or state.partitioned):  # what moved by its partitions has them
            started = time.perf_counter()
            self._engine.partition_all(state)
            self.timings.partitioning += time.perf_counter() - started
        self._last = state
        if "inplace" in self._backends:
            self._inplace.begin(forward)
        if "gathered" in self._backends:
            self._gathered.begin(forward)

    def end(self, forward: Forward, completed: bool) -> None:
        """After a forward, also one that raised (called by the phase tracker)."""
        if self._watch is not None:
            self._watch.forward_done()
        self._leave()
        elapsed = time.perf_counter() - self._started.at
        self.timings.add(forward, elapsed, masked=self._fast and not forward.fast)
        if completed and forward.phase is not Phase.DECODE:
            try:
                self._engine.check_finite(forward.state)
            except NonFiniteError:
                self._tracker.forget(forward)
                self._last = None
                raise
            forward.state.end_chunk(forward)
        if completed:
            forward.state.end_forward(forward)

    def _check_model(self, forward: Forward) -> None:
        """Follow what somebody else has changed in the model since the last forward, or say why that cannot be."""
        watch = self._watch
        if is_compiled(self.model) or (not self._eager.held and in_compiled_call()):
            raise SessionError(
                "The model, or a function that calls it, was compiled inside the session, and compiled code would run past what "
                "the session adds. Call the model itself; or leave the session and compile the model before a new one, in which "
                "it runs eagerly; for compiled decode steps, call generate(cache_implementation='static') inside the session."
            )
        change = "the model was changed" if watch is None else watch.change()
        if watch is not None and watch.replaced is not None:
            raise SessionError(
                f"The forward of a {watch.replaced} was replaced inside the session, which has put its own there. Leave the "
                "session, replace the forward, and start a new session."
            )
        if change is None and self._inplace.touched:
            change = "a weight was written to"
        if watch is not None and forward.phase is not Phase.DECODE and change is None:
            self._inplace.unpack()
            moved = self._inplace.moved_weights()
            rewritten = watch.rewritten()
            if rewritten:
                change = f"a weight of {rewritten[0].name} was written to"
                self._versions.written = self._versions.written or next(
                    (r.name for r in rewritten if r.name in moved), None
                )
            elif watch.settings_changed():
                change = "the settings of an adapter changed"
        if change is not None:
            for weights in self._inplace.moved_weights().values():
                weights.look()
        if self._versions.packed is not None:
            raise SessionError(packed_message(self._versions.packed))
        if self._versions.written is not None:
            raise SessionError(
                f"{written_message(self._versions.written)} Leave the session, write the weight again, and start a new session."
            )
        if change is not None:
            self._renew(change)

    def _renew(self, change: str) -> None:
        """Plan and take over the FFNs anew. Prompts keep what is known about them; new ones are ranked by the weights of now."""
        self._release()
        if self._versions.packed is not None:
            raise SessionError(packed_message(self._versions.packed))
        before = self._outline(self.plans)
        asked = self.config.backend
        config = replace(self.config, backend="auto") if asked == "inplace" else self.config
        try:
            plans = self._plan(config)  # what cannot be in place any more goes on masked
            if self._outline(plans) != before:
                raise SessionError(
                    f"Inside the session, {change}, so that the model has other FFNs, or keeps another number of their channels "
                    "(which depends on the dtype for experts). Leave the session and start a new one."
                )
            masked = next((plan for plan in plans if plan.backend == "masked"), None)
            if asked == "inplace" and masked is not None:
                warnings.warn(
                    f"Inside the session, {change}; now {masked.ffn.name} runs masked: {masked.reason}.", stacklevel=2
                )
            self._build(plans)
            self._suspend(CompiledParts(self.model, self._records()))
            self._engage()
        except (AdapterError, ConfigError) as error:
            self._release()
            raise SessionError(
                f"Inside the session, {change}. The model as it is now cannot be pruned with this session's settings: {error}"
            ) from error
        except BaseException:
            self._release()
            raise

    @staticmethod
    def _outline(plans: Sequence[FFNPlan]) -> list[tuple[str, Sizes, bool]]:
        """What the state of a prompt hangs on."""
        return [(plan.ffn.name, plan.sizes, plan.backend == "dense") for plan in plans]

    def _check_rows(self, forward: Forward) -> None:
        state: PromptState = forward.state
        if self._engine.per_sequence and state.rows != forward.rows:
            raise SessionError(
                f"The cache was prefilled with {state.rows} rows and is continued with {forward.rows}; with "
                "batch='per_sequence' every row needs its own partition. Use batch='shared', or prefill all rows."
            )

    def _check_experts(self) -> None:
        """Experts that are not called through this session would run dense without a word."""
        for config in self._expert_configs if self._engaged else ():
            if config._experts_implementation != IMPLEMENTATION:
                raise SessionError(
                    f"The experts implementation was set to {config._experts_implementation!r} inside the session, so the "
                    "experts would not be pruned. Choose it before the session: the prefill uses it then."
                )


def prune(
    model: nn.Module,
    config: PopConfig | float | None = None,
    *,
    adapter: Adapter | None = None,
    **settings: Unpack[Settings],
) -> Session:
    """A session that prunes a model online while it decodes.

    ``budget=0.65``, which is the default, leaves out what thresholds from the prompt leave out, so that a decoded token reads
    that share of the layers' weights. ``ratio=0.4`` is POP as in the paper (arXiv 2602.06822).

    Parameters
    ----------
    model : PreTrainedModel
        Or what wraps it: ``peft.PeftModel``, ``torch.compile(model)``. Inside the session both are pruned.
    config : PopConfig or float, optional
        Settings, or just the ratio.
    adapter : Adapter, optional
    **settings
        Fields of :class:`PopConfig`, instead of ``config``.

    Returns
    -------
    Session
        Not attached yet: ``with prune(model, ratio=0.4) as session: ...`` or ``session.attach()``.

    Raises
    ------
    ConfigError, AdapterError
        Before anything is changed.

    Examples
    --------
    >>> with pop_mm.prune(model, budget=0.65) as session:  # doctest: +SKIP
    ...     output = model.generate(**inputs, max_new_tokens=128)
    >>> print(session.report)  # doctest: +SKIP
    """
    session = Session(model, as_config(config, settings), adapter)
    advise(session.model, session.config)
    session._awaited = True
    return session


__all__: Sequence[str] = ["Session", "plan_ffns", "prune"]
