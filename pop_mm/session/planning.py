"""What a session would do with every FFN of a model: sizes, backends and reasons. Changes nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..adapters import Adapter, adapter_for
from ..errors import AdapterError, ConfigError
from ..executors.gathered import gathered_fits
from ..formats import format_of, tensors_behind
from ..methods.budget import budget_ratios, ffn_sizes
from ..methods.ratio import ffn_ratios
from ..partition import Sizes
from ..settings.config import PopConfig
from ..weights.experts import Experts
from ..weights.layout import FFN
from .eager import CompiledParts, without_wrappers
from .spread import fixed_in, on_process


@dataclass(frozen=True)
class FFNPlan:
    """What a session does with one FFN.

    Attributes
    ----------
    ffn : FFN or Experts
        All routed experts of a layer have one plan.
    ratio : float
        The FFN's own ratio.
    sizes : Sizes
    backend : str
        ``"inplace"``, ``"gathered"``, ``"masked"`` or ``"dense"`` (nothing to leave out).
    reason : str
        Why this backend.
    """

    ffn: FFN | Experts
    ratio: float
    sizes: Sizes
    backend: str
    reason: str

    def share_read(self, batch: int = 1) -> float:
        """Share of the weights that a decode step of ``batch`` rows reads: K of D channels in place, K a row if gathered."""
        width, whole = self.sizes.width, self.sizes.channels
        return {"inplace": width, "gathered": min(batch * width, whole)}.get(self.backend, whole) / whole

    @property
    def share_intended(self) -> float:
        """Share of the weights that a step of one row reads in place: K of D channels."""
        return self.sizes.width / self.sizes.channels

    def to_dict(self) -> dict[str, Any]:
        """Plain values, one row of ``pop-mm inspect --json``."""
        return {
            "name": self.ffn.name,
            "layer": self.ffn.layer,
            "experts": self.ffn.count if isinstance(self.ffn, Experts) else None,
            "top_k": self.ffn.top_k if isinstance(self.ffn, Experts) else None,
            "role": self.ffn.role,
            "layout": self.ffn.layout,
            "size": self.ffn.size,
            "ffn_ratio": self.ratio,
            "retained": self.sizes.retained,
            "candidates": self.sizes.candidates,
            "pruned": self.sizes.pruned,
            "kept": self.sizes.kept,
            "backend": self.backend,
            "reason": self.reason,
        }


def plan_ffns(
    model: nn.Module, config: PopConfig, adapter: Adapter | None = None, fixed: Mapping[str, str] | None = None
) -> list[FFNPlan]:
    """What a session would do with every FFN of a model: sizes, backend and the reason for it. Changes nothing.

    Works on the meta device too.

    Parameters
    ----------
    fixed : mapping of str to str, optional
        Name of an FFN -> why its channels cannot be moved, from :func:`pop_mm.session.sharing.fixed_weights`.

    Raises
    ------
    AdapterError
        No adapter fits, or nothing can be pruned.
    ConfigError
        The ratio or an override does not fit the model, or ``backend="inplace"`` cannot serve an FFN.
    """
    adapter, records = prunable(model, adapter)
    with CompiledParts(model, records):  # FFNs run, and are judged, without what was compiled
        return _plan_records(model, config, adapter, records, fixed or {})


def prunable(model: nn.Module, adapter: Adapter | None = None) -> tuple[Adapter, list[FFN | Experts]]:
    """The adapter of a model, and its FFNs and experts.

    Raises
    ------
    AdapterError
        No adapter fits, or nothing can be pruned.
    """
    adapter = adapter_for(model) if adapter is None else adapter
    if not isinstance(adapter, Adapter):
        raise AdapterError(f"adapter must be an instance of pop_mm.adapters.Adapter; got {adapter!r}.")
    records = [without_wrappers(record) for record in adapter.projections(model)]
    if not records:
        raise AdapterError(f"{type(adapter).__name__} found no prunable FFN in {type(model).__name__}.")
    return adapter, records


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
    fixed = fixed_in(model, [ffn.name for ffn in records], fixed)
    plans = []
    for ffn in records:
        kept_whole = ffn.role == "shared_expert" and not config.experts.prune_shared
        ratio = 0.0 if kept_whole else ratios[ffn.layer]
        ffn = on_process(ffn, together=config.channel_method.tp_partition == "global")
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
    return "inplace", "asked for" if config.backend == "inplace" else f"{kind_of(ffn.modules)} weights"


def _why_masked(ffn: FFN | Experts, config: PopConfig, shared: Counter[int]) -> str | None:
    """Why an FFN cannot decode on narrow views of its weights, or None if it can."""
    if config.backend == "masked":
        return "asked for"
    per_sequence = config.batch == "per_sequence"
    if per_sequence and not (config.kernels == "triton" and isinstance(ffn, FFN)):
        return "batch='per_sequence' needs a mask for each row; no speed-up"
    narrow = (
        isinstance(ffn, FFN)
        and not per_sequence
        and config.kernels != "triton"
        and not config.channel_method.probe_tokens
    )
    reason = ffn.why_not_moved() if narrow else ffn.why_not_plain()  # type: ignore[union-attr]
    tensors = (t for module in ffn.modules for p in module.parameters(False) for t in tensors_behind(p))
    if reason is None and any(shared[storage(tensor)] > 1 for tensor in tensors):
        reason = f"{ffn.name} shares its weights with another module"
    if reason is None and per_sequence and isinstance(ffn, FFN) and not gathered_fits(ffn):
        reason = f"{ffn.name} computes something that the kernels do not"
    if reason is None:
        return None
    consequence = "batch='per_sequence' needs a mask" if per_sequence else "its channels cannot be reordered"
    return f"{reason}, so {consequence}; no speed-up"


def kind_of(modules: Sequence[nn.Module]) -> str:
    """The form of weights that are fast: ``"plain"``, ``"int8"``, or both."""
    forms = (format_of(module._parameters.get("weight")) for module in modules)
    return " and ".join(sorted({form.name for form in forms if form is not None})) or "plain"


def storage(tensor: Tensor) -> int:
    """Address of a tensor's storage; 0 where it has none (meta, and tensor subclasses that pack their weights)."""
    if tensor.device.type == "meta" or type(tensor) not in (Tensor, nn.Parameter):
        return 0
    return tensor.untyped_storage().data_ptr()


def shared_storages(model: nn.Module) -> Counter[int]:
    """How many places in the model use each parameter storage."""
    uses = Counter(
        storage(tensor)
        for _, p in model.named_parameters(remove_duplicate=False)
        for tensor in tensors_behind(p) or (p,)
    )
    uses[0] = 0
    return uses


__all__ = ["kind_of", "plan_ffns", "prunable", "shared_storages", "storage"]
