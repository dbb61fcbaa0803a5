"""What a session puts on a model, from the plans to the executors, and takes off again."""

from __future__ import annotations

import threading
import warnings
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import nn

from .. import kernels
from ..accel.attention import SingleTokenAttention
from ..accel.few import FewTokens
from ..accel.layers import FewTokensLayers
from ..accel.linears import FewTokensLinears
from ..accel.norms import FewTokensNorms
from ..adapters import Adapter, adapter_for
from ..adapters.checking import probe_foreign
from ..decoding.channel_engine import ChannelEngine
from ..decoding.state import PromptState
from ..decoding.timings import Timings
from ..errors import ConfigError, SessionError
from ..events import Events
from ..executors.gathered import GatheredExecutor
from ..executors.masked import MaskedExecutor
from ..executors.moved import Versions
from ..executors.narrow import NarrowExecutor
from ..formats.asking import has_unloaded_weights
from ..interrupts import uninterrupted
from ..kernels import gpu
from ..modality import MODALITIES
from ..patching import Patches
from ..settings.config import PopConfig
from ..tracking.phase import Forward, Phase, PhaseTracker
from ..weights.experts import Experts
from ..weights.layout import FFN
from .compiled import CompiledSteps
from .eager import CompiledParts, EagerCalls, modules_around, without_wrappers
from .planning import FFNPlan, kind_of, plan_ffns
from .sharing import fixed_weights
from .taken import TakenWeights
from .unwrap import unwrap
from .watch import Watch

_PRUNED_MODULES: weakref.WeakSet[nn.Module] = weakref.WeakSet()
A = TypeVar("A", bound="Attachment")


def written_message(name: str) -> str:
    """What to say of a weight that was written to while its channels were reordered."""
    return (
        f"{name} was written to inside the session while its channels were reordered, so nobody can tell which channels the new "
        "values belong to."
    )


def packed_message(name: str) -> str:
    """What to say of a weight that was packed while its channels were reordered."""
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


class Attachment(ABC):
    """The life of a session: everything that it changes in the model, undone exactly by :meth:`detach`.

    Parameters
    ----------
    model : PreTrainedModel
    config : PopConfig
    adapter : Adapter, optional
        Instead of the one that the model type names.
    """

    _awaited = False  # whether it was made to be attached, and nobody has done so or asked for its report yet

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
        probe_tokens = getattr(config.chosen, "probe_tokens", 0)
        if probe_tokens and experts is not None:
            raise ConfigError(
                f"probe_tokens={probe_tokens} is not for mixtures of experts: the few tokens would not reach every one of "
                f"the experts of {experts}. Use prefill='partition' without probe_tokens."
            )
        before = getattr(self, "_inplace", None)
        self.plans = plans
        self._engine: Any = self._make_engine(pruned)
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
            common = (self._matvec, self._few, self._inplace.static)
            # layers come first: they leave forwards alone that somebody else has replaced
            norms = FewTokensNorms(*common, self._is_prompt)
            layers = FewTokensLayers(*common, self._tracker, self._masked.by_rows, norms)
            self._besides = [layers, FewTokensLinears(*common), SingleTokenAttention(*common), norms]
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

    def _make_engine(self, pruned: Sequence[Any]) -> Any:  # an Engine; a ChannelEngine where channels are left out
        return ChannelEngine(
            [p.ffn for p in pruned], [p.sizes for p in pruned], self.config, self._modalities, self.events
        )

    # life -----------------------------------------------------------------------------------------------------------

    def attach(self: A) -> A:
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
        around = set(modules_around(self.model, {m for ffn in ffns for m in ffn.modules}))
        for module in {*around, *besides}:
            for name in ("__deepcopy__", "__reduce_ex__"):
                self._refusals.replace(module, name, _refuse_copy)
        TakenWeights(self._put_back()).install((*around, *self._wrappers.wrappers), self._refusals)
        self._inplace.before_back = self._look
        self._steps = None
        self._watch = Watch(self.model, self._engine.ffns, self._versions, self._inplace.positions, besides)

    def _put_back(self) -> Mapping[nn.Module, Callable[[], None]]:
        """What puts the weights of a module back as the model holds them outside."""
        return self._inplace.backs

    def _look(self, record: FFN | Experts) -> None:
        """Note if somebody has written to an FFN's weights, whose channels are about to be put back."""
        if self._watch is not None and self._watch.rewritten([record]):
            self._versions.written = self._versions.written or record.name

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
            modules = [module for plan in self.plans for module in plan.ffn.modules]
            traceable = all(plan.backend in ("inplace", "dense") for plan in self.plans)
            traceable = traceable and self._engine.own_choice is None and "int8" not in kind_of(modules)
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
            warnings.warn(packed_message(self._versions.packed), stacklevel=2)
        if self._versions.written is not None:
            warnings.warn(
                f"{written_message(self._versions.written)} It was put back as if each channel had been changed alone.",
                stacklevel=2,
            )

    def _few(self) -> bool:
        """Whether the forward that runs now is a step of a few tokens that the compiled library may compute."""
        forward = self._tracker.current
        return forward is not None and forward.few

    def _is_prompt(self) -> bool:
        """Whether the forward that runs now is a prompt's, without what the compiled library knows nothing of."""
        forward = self._tracker.current
        plain = forward is not None and forward.phase is Phase.PREFILL
        return plain and not torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")

    def __enter__(self: A) -> A:
        return self.attach()

    def __exit__(self, *_: object) -> None:
        self.detach()

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

    # what the phase tracker calls -----------------------------------------------------------------------------------

    @abstractmethod
    def new_state(self, rows: int, cache: Any) -> Any:
        """State of a new prompt."""

    @abstractmethod
    def begin(self, forward: Forward) -> None:
        """Before a forward."""

    @abstractmethod
    def end(self, forward: Forward, completed: bool) -> None:
        """After a forward, also one that raised."""


__all__ = ["Attachment"]
