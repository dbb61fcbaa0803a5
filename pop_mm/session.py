"""A pruning session: attach to a model, prune while it decodes, report, and restore the model exactly."""

from __future__ import annotations

import sys
import threading
import time
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from . import kernels
from .accel.attention import SingleTokenAttention
from .accel.few import FewTokens
from .accel.linears import FewTokensLinears
from .accel.norms import FewTokensNorms
from .adapters import Adapter, adapter_for
from .adapters.checking import probe_foreign
from .advice import advise
from .asking import has_unloaded_weights
from .channel_engine import ChannelEngine
from .compiled import CompiledSteps
from .config import PopConfig, as_config
from .eager import CompiledParts, EagerCalls, in_compiled_call, is_compiled, modules_around, without_wrappers
from .engine import Engine
from .errors import AdapterError, ConfigError, NonFiniteError, PopWarning, SessionError
from .events import Events
from .executors.experts import IMPLEMENTATION
from .executors.gathered import GatheredExecutor, gathered_fits
from .executors.masked import MaskedExecutor
from .executors.moved import Versions
from .executors.narrow import NarrowExecutor
from .experts import Experts
from .interrupts import uninterrupted
from .kernels import gpu
from .layout import FFN
from .methods import Method, get_method
from .methods.budget import budget_ratios, ffn_sizes
from .modality import MODALITIES
from .partition import Sizes
from .patching import Patches
from .phase import Forward, Phase, PhaseTracker
from .ratio import ffn_ratios
from .report import Alone, FFNPlan, Report, Timings, build_report
from .settings import Settings
from .sharing import fixed_weights
from .shown import Shown, counts
from .state import PromptState
from .unwrap import unwrap
from .watch import Watch

_PRUNED_MODULES: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def plan_ffns(
    model: nn.Module, config: PopConfig, adapter: Adapter | None = None, fixed: Mapping[str, str] | None = None
) -> list[FFNPlan]:
    """What a session would do with every FFN of a model: sizes, backend and the reason for it. Changes nothing.

    Works on the meta device too.

    Parameters
    ----------
    fixed : mapping of str to str, optional
        Name of an FFN -> why its channels cannot be moved, from :func:`pop_mm.sharing.fixed_weights`.

    Raises
    ------
    AdapterError
        No adapter fits, or nothing can be pruned.
    ConfigError
        The ratio or an override does not fit the model, or ``backend="inplace"`` cannot serve an FFN.
    """
    adapter = adapter_for(model) if adapter is None else adapter
    if not isinstance(adapter, Adapter):
        raise AdapterError(f"adapter must be an instance of pop_mm.adapters.Adapter; got {adapter!r}.")
    records = [without_wrappers(record) for record in adapter.projections(model)]
    if not records:
        raise AdapterError(f"{type(adapter).__name__} found no prunable FFN in {type(model).__name__}.")
    with CompiledParts(model, records):  # FFNs run, and are judged, without what was compiled
        return _plan_records(model, config, adapter, records, fixed or {})


def _plan_records(
    model: nn.Module,
    config: PopConfig,
    adapter: Adapter,
    records: Sequence[FFN | Experts],
    fixed: Mapping[str, str],
) -> list[FFNPlan]:
    layers = adapter.layer_weights(model, records)
    if config.budget is None:
        assert config.ratio is not None
        ratios = ffn_ratios(config.ratio, config.scope, layers, config.layer_ratios)
    else:
        ratios = budget_ratios(records, layers, config)
    shared = shared_storages(model)
    plans = []
    for ffn in records:
        kept_whole = ffn.role == "shared_expert" and not config.prune_shared
        ratio = 0.0 if kept_whole else ratios[ffn.layer]
        sizes = ffn_sizes(ffn, ratio, config)
        backend, reason = _choose_backend(ffn, sizes, config, shared, fixed.get(ffn.name))
        if kept_whole:
            reason = "prune_shared=False"
        plans.append(FFNPlan(ffn, ratio, sizes, backend, reason))
    if config.backend == "inplace":
        refused = [plan for plan in plans if plan.backend == "masked"]
        if refused:
            raise ConfigError(
                f"backend='inplace' cannot serve {len(refused)} of {len(plans)} FFNs; the first is {refused[0].ffn.name}: "
                f"{refused[0].reason}. Use backend='auto' to mask those."
            )
    return plans


def _choose_backend(
    ffn: FFN | Experts, sizes: Sizes, config: PopConfig, shared: Counter[int], fixed: str | None
) -> tuple[str, str]:
    reason = _why_masked(ffn, config, shared)
    if reason is None and fixed is not None:
        reason = f"{fixed}, so its channels cannot be reordered; no speed-up"
    if sizes.dense:
        if reason is None and config.kernels == "compiled":
            return "inplace", "its ratio leaves nothing out; kernels='compiled' decodes all of it"
        return "dense", "its ratio leaves nothing out"
    if reason is not None:
        return "masked", reason
    if config.batch == "per_sequence":
        return "gathered", "plain weights, of which each row reads its own channels"
    return "inplace", "asked for" if config.backend == "inplace" else "plain weights"


def _why_masked(ffn: FFN | Experts, config: PopConfig, shared: Counter[int]) -> str | None:
    """Why an FFN cannot decode on narrow views of its weights, or None if it can."""
    if config.backend == "masked":
        return "asked for"
    per_sequence = config.batch == "per_sequence"
    if per_sequence and not (config.kernels == "triton" and isinstance(ffn, FFN)):
        return "batch='per_sequence' needs a mask for each row; no speed-up"
    reason = ffn.why_not_plain()
    if reason is None and any(shared[storage(p)] > 1 for module in ffn.modules for p in module.parameters(False)):
        reason = f"{ffn.name} shares its weights with another module"
    if reason is None and per_sequence and isinstance(ffn, FFN) and not gathered_fits(ffn):
        reason = f"{ffn.name} computes something that the kernels do not"
    if reason is None:
        return None
    consequence = "batch='per_sequence' needs a mask" if per_sequence else "its channels cannot be reordered"
    return f"{reason}, so {consequence}; no speed-up"


def storage(tensor: Tensor) -> int:
    """Address of a tensor's storage; 0 where it has none (meta, and tensor subclasses that pack their weights)."""
    if tensor.device.type == "meta" or type(tensor) not in (Tensor, nn.Parameter):
        return 0
    return tensor.untyped_storage().data_ptr()


def shared_storages(model: nn.Module) -> Counter[int]:
    """How many places in the model use each parameter storage."""
    uses = Counter(storage(p) for _, p in model.named_parameters(remove_duplicate=False))
    uses[0] = 0
    return uses


def _written(name: str) -> str:
    return (
        f"{name} was written to inside the session while its channels were reordered, so nobody can tell which channels the new "
        "values belong to."
    )


def _packed(name: str) -> str:
    return (
        f"{name} was packed, parametrised or pruned, or another weight was made of it, inside the session while its channels "
        "were reordered, so that one is in another order than the rest of the model. Load the model again, and do that before "
        "the session."
    )


def _refuse_copy(*_: Any) -> Any:
    raise SessionError(
        "The model was to be copied or pickled inside a session, which would take a part of the session along. Leave the session "
        "first, or save model.state_dict() or model.save_pretrained(), which give the model's own weights."
    )


class Session(Shown):
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

    _awaited = False  # whether it was made to be attached, and nobody has done so or asked for its report yet

    def __new__(cls, model: nn.Module, config: PopConfig, adapter: Adapter | None = None) -> Session:
        """A session of the class that runs the config's method."""
        if cls is Session:
            method = config.method if isinstance(config.method, Method) else get_method(config.chosen_method)
            module, name = method.session.split(":")
            cls = getattr(import_module(module), name)
        return super().__new__(cls)

    def __init__(self, model: nn.Module, config: PopConfig, adapter: Adapter | None = None) -> None:
        self._wrappers = unwrap(model)
        self.model = model = self._wrappers.model
        self.config = config
        self._adapter = adapter_for(model) if adapter is None else adapter
        plans = self._make_plans(config, {})
        tokens = self._adapter.modality_token_ids(model)
        self._modalities = len(MODALITIES) if tokens else 1
        self._tracker = PhaseTracker(model, self, self._rows_matter, tokens)
        self._patches = Patches()
        self._engaged = False
        self._watch: Watch | None = None
        self._refusals = Patches()
        self._left_compiled: set[nn.Module] = set()
        self._steps: CompiledSteps | None = None
        self._eager = EagerCalls()
        self._busy = threading.Lock()
        self._owner: threading.Thread | None = None
        self._last: PromptState | None = None
        self._started = threading.local()
        self.timings = Timings()
        self.events = Events()
        self.attached = False
        self._build(plans)
        self._probed = probe_foreign(model, self._adapter, self._ffns)
        if config.modality_weights and not tokens:
            raise ConfigError(
                f"modality_weights={dict(config.modality_weights)} was given, but {type(model).__name__} takes text alone, or "
                "its adapter does not say which tokens stand for images."
            )

    def _build(self, plans: list[FFNPlan]) -> None:
        """Make what serves these plans; changes nothing in the model.

        Raises
        ------
        ConfigError
            A setting does not fit what the plans have.
        """
        config = self.config
        pruned = [plan for plan in plans if plan.backend != "dense"]
        if config.kernels == "triton":
            gpu.require(plan.ffn.device for plan in pruned)
        experts = next((plan.ffn.name for plan in pruned if isinstance(plan.ffn, Experts)), None)
        if config.probe_tokens and experts is not None:
            raise ConfigError(
                f"probe_tokens={config.probe_tokens} is not for mixtures of experts: the few tokens would not reach every one of "
                f"the experts of {experts}. Use prefill='partition' without probe_tokens."
            )
        before = getattr(self, "_inplace", None)
        self.plans = plans
        self._engine = self._make_engine(pruned)
        self._masked = MaskedExecutor(self._engine, self._tracker)
        self._backends = [plan.backend for plan in pruned]
        ours = {"inplace", "rows"} & set(self._backends)
        self._matvec = kernels.load(config.kernels) if ours else None
        self._versions = Versions()
        self._inplace = NarrowExecutor(
            self._engine, self._tracker, self._versions, self._matvec, config.kernels == "triton"
        )
        if before is not None:
            self._inplace.count_on(before)
        self._gathered = GatheredExecutor(self._engine, self._tracker)
        self._fast = bool({"inplace", "gathered", "rows"} & set(self._backends))
        self._besides: list[FewTokens] = []  # what else a few tokens run by the compiled library
        if self._matvec is not None:
            kinds = (FewTokensLinears, SingleTokenAttention, FewTokensNorms)
            self._besides = [kind(self._matvec, self._few, self._inplace.static) for kind in kinds]
        modules = [plan.ffn.module for plan in pruned if isinstance(plan.ffn, Experts)]
        self._expert_configs: list[Any] = list({id(module.config): module.config for module in modules}.values())

    # what the session of another method replaces ---------------------------------------------------------------------

    @property
    def _rows_matter(self) -> bool:
        """Whether each row of a batch has knowledge of its own."""
        return self.config.batch == "per_sequence"

    @property
    def _ffns(self) -> list[FFN | Experts]:
        """What is planned, but for what is no FFN."""
        return [plan.ffn for plan in self.plans]

    def _records(self) -> Sequence[Any]:
        """What the adapter finds now."""
        return self._adapter.projections(self.model)

    def _make_plans(self, config: PopConfig, fixed: Mapping[str, str]) -> list[FFNPlan]:
        """``fixed``: name of an FFN -> why its channels cannot be moved."""
        return plan_ffns(self.model, config, self._adapter, fixed)

    def _make_engine(self, pruned: Sequence[Any]) -> Engine:
        return ChannelEngine(
            [p.ffn for p in pruned], [p.sizes for p in pruned], self.config, self._modalities, self.events
        )

    # life -----------------------------------------------------------------------------------------------------------

    def attach(self) -> Session:
        """Start pruning. The model must be in eval mode and not in another session."""
        self._awaited = False
        if self.attached:
            raise SessionError("This session is attached already.")
        if self.model.training:
            raise SessionError("The model is in training mode; pruning is for inference. Call model.eval() first.")
        self._require_free()
        if has_unloaded_weights(self.model):
            raise SessionError("The model is on the meta device, without weights; load it first.")
        if not self._probed:  # it had no weights to be probed on
            self._probed = probe_foreign(self.model, self._adapter, self._ffns)
        compiled = CompiledParts(self.model, self._records())
        self._build(self._plan(self.config))
        self._require_free()
        self._suspend(compiled)
        self._last = None
        self.attached = True
        try:
            self._eager.hold()
            self._tracker.install()
            self._engage()
            self._wrappers.install(self._patches)
            if hasattr(self.model, "get_compiled_call"):
                self._patches.replace(self.model, "get_compiled_call", self._compiled_call)
        except BaseException:
            self.detach()
            raise
        return self

    def _suspend(self, compiled: CompiledParts) -> None:
        """Let compiled parts of the model run eagerly until the session ends, and say so."""
        compiled.warn()
        compiled.suspend()
        self._patches.undo_by(compiled.resume)
        self._left_compiled = compiled.left

    def _plan(self, config: PopConfig) -> list[FFNPlan]:
        """Plan for the model as it is now."""
        records = list(map(without_wrappers, self._records()))
        fixed = {} if config.backend == "masked" else fixed_weights(self.model, records)
        return self._make_plans(config, fixed)

    def _require_free(self) -> None:
        if any(plan.ffn.modules[-1] in _PRUNED_MODULES for plan in self.plans):
            raise SessionError("The model is being pruned by another session; leave that one first.")

    @torch.inference_mode(False)  # what is made here serves forwards in and out of inference mode
    def _engage(self) -> None:
        """Take over the FFNs, as they are planned."""
        self._engaged = True
        ffns = [plan.ffn for plan in self.plans]
        _PRUNED_MODULES.update(ffn.modules[-1] for ffn in ffns)
        self._engine.channel_weights()
        for index, backend in enumerate(self._backends):
            self._backend(backend).attach(index)
        besides: list[nn.Module] = []
        if self._besides:
            besides = [m for m in self._adapter.besides_ffns(self.model, ffns) if m not in self._left_compiled]
        for few in self._besides:
            few.attach(besides)
        for module in {*modules_around(self.model, {m for ffn in ffns for m in ffn.modules}), *besides}:
            for name in ("__deepcopy__", "__reduce_ex__"):
                self._refusals.replace(module, name, _refuse_copy)
        self._steps = None
        self._watch = Watch(self.model, self._engine.ffns, self._versions, besides)

    def _release(self) -> None:
        """Undo :meth:`_engage`: the FFNs are as they were, but for what somebody else has changed."""
        if not self._engaged:
            return
        self._inplace.unpack()
        moved = self._inplace.moved_weights()
        for weights in moved.values():
            weights.look()
        if moved and self._watch is not None and self._versions.written is None:
            self._versions.written = next((r.name for r in self._watch.rewritten() if r.name in moved), None)
        self._engaged, self._watch = False, None
        try:
            self._inplace.detach()
        finally:
            for besides in self._besides:
                besides.detach()
            self._gathered.detach()
            self._masked.detach()
            self._refusals.undo()
            for plan in self.plans:
                _PRUNED_MODULES.discard(plan.ffn.modules[-1])

    def _compiled_call(self, compile_config: Any = None) -> Callable[..., Any]:
        """In the place of the model's ``get_compiled_call``."""
        if self._steps is None:
            traceable = all(plan.backend in ("inplace", "dense") for plan in self.plans)
            traceable = traceable and self._engine.own_choice is None
            self._steps = CompiledSteps(
                self.model, self._tracker, self._inplace if traceable else None, self._eager.compiled
            )
        return self._steps.get_compiled_call(compile_config)

    def _backend(self, name: str) -> Any:
        if name == "inplace":
            return self._inplace
        return self._gathered if name == "gathered" else self._masked

    @uninterrupted()
    def detach(self) -> None:
        """Stop pruning and restore the model bit for bit. Harmless if not attached."""
        if not self.attached:
            return
        try:
            self._release()
        finally:
            self._tracker.remove()
            self._patches.undo()
            self._eager.release()
            self.attached = False
        if self._versions.packed is not None:
            warnings.warn(_packed(self._versions.packed), stacklevel=2)
        if self._versions.written is not None:
            warnings.warn(
                f"{_written(self._versions.written)} It was put back as if each channel had been changed alone.",
                stacklevel=2,
            )

    def _few(self) -> bool:
        """Whether the forward that runs now is a step of a few tokens that the compiled library may compute."""
        forward = self._tracker.current
        return forward is not None and forward.few

    def __enter__(self) -> Session:
        return self.attach()

    def __exit__(self, *_: object) -> None:
        self.detach()

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

    @property
    def live_prompts(self) -> int:
        """Prompts whose caches are alive."""
        return self._tracker.live

    @property
    def moving_seconds(self) -> float:
        """Time spent moving channels."""
        return self._inplace.seconds

    @property
    def moved_channels(self) -> int:
        """Channels moved so far."""
        return self._inplace.moved_channels

    @property
    def choosing_seconds(self) -> float:
        """Time that compiled kernels have spent choosing among candidates, within an FFN's call."""
        return self._inplace.choosing_seconds

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
        self._awaited = False
        self._inplace.static.flush()
        state = self._last
        if state is not None and state.tokens is not None and not state.partitioned:
            self._engine.partition_all(state)
        self.timings.moving = self.moving_seconds
        name = "triton" if self.config.kernels == "triton" else "stock" if self._matvec is None else "compiled"
        alone = self._alone(state) if state is not None else []
        return build_report(
            self.model, self._adapter, self.config, self.plans, state, self.timings, self.moved_channels, name, alone
        )

    def statistics(self) -> dict[str, Tensor]:
        """What the latest prompt's tokens did: name of an FFN -> sum of squared activations of each channel.

        ``[D]`` (with ``batch="per_sequence"`` ``[B, D]``), for experts ``[E, D]`` (``[B * E, D]``); in the original channel
        order. FFNs that are dense, or that the prompt did not run, are missing.
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
        if forward.next_chunk and self.config.prefill == "partition":
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
            elif self.config.prefill == "partition" and "inplace" in self._backends:
                self._inplace.begin_prompt(forward)
            self._last = state
            return
        if not state.partitioned:
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
            raise SessionError(_packed(self._versions.packed))
        if self._versions.written is not None:
            raise SessionError(
                f"{_written(self._versions.written)} Leave the session, write the weight again, and start a new session."
            )
        if change is not None:
            self._renew(change)

    def _renew(self, change: str) -> None:
        """Plan and take over the FFNs anew. Prompts keep what is known about them; new ones are ranked by the weights of now."""
        self._release()
        if self._versions.packed is not None:
            raise SessionError(_packed(self._versions.packed))
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

    def _enter(self) -> None:
        """One forward at a time where channels are in place; the lock of an interrupted forward is taken over."""
        if not self._fast:
            return
        me = threading.current_thread()
        if not self._busy.acquire(blocking=False):
            owner = self._owner
            if owner is not None and owner is not me and owner.is_alive():
                raise SessionError(
                    "Two threads run forwards of one in-place pruned model at once, but it holds the channels of one "
                    "prompt at a time. Take turns, use backend='masked', or load the model twice."
                )
        self._owner = me

    def _leave(self) -> None:
        if self._busy.locked() and self._owner is threading.current_thread():
            self._owner = None
            self._busy.release()


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
