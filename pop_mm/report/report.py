"""What a session did: sizes, backends, stability of the candidates and times; as numbers, JSON, a table or a picture."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..adapters import Adapter
from ..decoding.timings import Timings
from ..modality import by_name
from ..partition import Partition
from ..session.planning import FFNPlan
from ..session.spread import notes_of
from ..settings.config import PopConfig
from .footprint import bytes_per_token, weights_per_token
from .shown import ShownReport

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

    from ..decoding.state import FFNState, PromptState


@dataclass(frozen=True)
class ExpertsReport:
    """What the latest prompt made of a layer's experts. Lists are by expert.

    Attributes
    ----------
    prompt_tokens, decode_tokens : list of int
        Tokens that the router sent to each expert.
    dense_tokens : list of int
        Those of the decode tokens for which it ran dense, having no partition yet.
    partitioned, late, dense : list of int
        Experts (with ``batch="per_sequence"``: in at least one row) that the prompt partitioned, that got their
        partition while decoding, and that have none.
    overlap : float or None
        Mean share of an expert's R and C that another expert of the layer has in its own; None with fewer than two.
    overlap_by_chance : float
        What it would be for random channels.
    """

    prompt_tokens: list[int]
    decode_tokens: list[int]
    dense_tokens: list[int]
    partitioned: list[int]
    late: list[int]
    dense: list[int]
    overlap: float | None
    overlap_by_chance: float

    @classmethod
    def of(cls, state: FFNState) -> ExpertsReport:
        """The report of one prompt and layer."""
        sizes, count = state.sizes, state.experts
        assert count is not None
        tokens = torch.zeros(count, dtype=torch.int64) if state.prompt_tokens is None else state.prompt_tokens
        ready = torch.zeros_like(tokens, dtype=torch.bool) if state.ready is None else state.ready
        late = torch.zeros_like(ready) if state.late is None else state.late

        def having(units: torch.Tensor) -> list[int]:
            found: list[int] = units.unflatten(0, (-1, count)).any(0).nonzero().flatten().tolist()
            return found

        overlaps = []
        if state.partition is not None:
            fronts = state.partition.allowed().float().unflatten(0, (-1, count))
            for front, chosen in zip(fronts, ready.unflatten(0, (-1, count)), strict=True):
                mine = front[chosen]
                if len(mine) > 1:
                    shared = mine @ mine.t()
                    overlaps.append(float(shared.sum() - shared.trace()) / (len(mine) * (len(mine) - 1) * sizes.width))
        return cls(
            prompt_tokens=tokens.unflatten(0, (-1, count)).sum(0).tolist(),
            decode_tokens=list(state.decode_tokens),
            dense_tokens=list(state.dense_tokens),
            partitioned=having(ready & ~late),
            late=having(late),
            dense=having(~ready),
            overlap=sum(overlaps) / len(overlaps) if overlaps else None,
            overlap_by_chance=sizes.width / sizes.channels,
        )


@dataclass(frozen=True)
class FFNReport:
    """One FFN, or the experts of one layer: the plan, and what the latest prompt made of it.

    Attributes
    ----------
    partition : Partition or None
        Of the latest prompt; None before the first. Experts have one each, along the first axis.
    active_per_step : float or None
        Mean active channels of its decode steps.
    stability : float or None
        Mean share of a step's kept candidates that the next step keeps too; not counted for experts.
    experts : ExpertsReport or None
        For experts.
    alone : mapping of str to Partition
        Modality -> the partition that its tokens alone would make; of prompts with more than text.
    reached : mapping of str to Tensor
        For experts, modality -> ``[U]``, boolean: units that the router sent tokens of that modality. The others'
        partitions in ``alone`` mean nothing.
    """

    plan: FFNPlan
    partition: Partition | None
    active_per_step: float | None
    stability: float | None
    experts: ExpertsReport | None = None
    alone: Mapping[str, Partition] = field(default_factory=dict)
    reached: Mapping[str, torch.Tensor] = field(default_factory=dict)

    @property
    def share_kept(self) -> float:
        """Share of the weights that the steps read in place; for experts, the mean over the tokens that they got."""
        share = self.plan.share_intended
        if self.experts is None or not sum(self.experts.decode_tokens):
            return share
        dense = sum(self.experts.dense_tokens) / sum(self.experts.decode_tokens)
        return dense + (1 - dense) * share

    @property
    def modality_overlap(self) -> dict[str, float]:
        """Modality -> share of R and C that would be in R or C if its tokens alone had chosen.

        By chance it would be the share of channels that are in R and C. Experts that the modality did not reach are
        left out.
        """
        if self.partition is None:
            return {}
        mine, found = self.partition.allowed(), {}
        for name, part in self.alone.items():
            shared = (mine & part.allowed()).sum(-1) / self.plan.sizes.width
            shared = shared[self.reached[name]] if name in self.reached else shared
            found[name] = float(shared.mean()) if shared.numel() else math.nan
        return {name: share for name, share in found.items() if math.isfinite(share)}

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            **self.plan.to_dict(),
            "active_per_step": self.active_per_step,
            "candidate_stability": self.stability,
            "modality_overlap": self.modality_overlap,
            "routing": asdict(self.experts) if self.experts is not None else None,
        }


@dataclass(frozen=True, repr=False)
class Report(ShownReport):
    """What a session did. ``print(report)`` shows a table, :meth:`plot` a picture.

    Attributes
    ----------
    config : PopConfig
    ffns : sequence of FFNReport
    prompt_tokens : int
        Of the latest prompt.
    timings : Timings
    moved_channels : int
    weights_per_token : int
        Weights that a decoded token reads from the dense model.
    bytes_per_token : mapping of str to int or None
        Bytes of weights that a decoded token reads (see :mod:`pop_mm.report.footprint`): "dense"; "intended", in place;
        "read", on the backends of now; and "kept", in place with experts that ran dense as they did, None before the first step.
    kernels : {"stock", "compiled", "triton"}
        How FFNs in place decode one token of each of a few rows.
    modality_tokens : mapping of str to int
        Modality -> tokens of the latest prompt.
    notes : sequence of str
    """

    config: PopConfig
    ffns: Sequence[FFNReport]
    prompt_tokens: int
    timings: Timings
    moved_channels: int
    weights_per_token: int = 0
    kernels: str = "stock"
    modality_tokens: Mapping[str, int] = field(default_factory=dict)
    notes: Sequence[str] = field(default_factory=tuple)
    bytes_per_token: Mapping[str, int | None] = field(default_factory=dict)

    @property
    def backends(self) -> dict[str, int]:
        """How many FFNs run on each backend."""
        return dict(Counter(ffn.plan.backend for ffn in self.ffns))

    @property
    def left_out_share(self) -> float | None:
        """Share of all weights that a decoded token reads from the dense model which the latest prompt's steps left out.

        The overall ratio counts neither ``lm_head`` nor shared experts (paper, table 8); this does. None before the
        first step.
        """
        parts = [
            (ffn.plan.ffn.weight_count, ffn.active_per_step / ffn.plan.sizes.channels)
            for ffn in self.ffns
            if ffn.active_per_step is not None
        ]
        if not parts or not self.weights_per_token:
            return None
        return sum(weights * (1 - active) for weights, active in parts) / self.weights_per_token

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as :meth:`to_json` writes them."""
        return {
            "config": self.config.to_dict(),
            "method": self.config.chosen_method,
            "budget": self.config.budget,
            "backends": self.backends,
            "kernels": self.kernels,
            "prompt_tokens": self.prompt_tokens,
            "modality_tokens": dict(self.modality_tokens),
            "left_out_share": self.left_out_share,
            "bytes_per_token": dict(self.bytes_per_token),
            "forwards": {
                "prefill": self.timings.prefill_forwards,
                "decode": self.timings.decode_forwards,
                "decode_masked_not_resident": self.timings.masked_forwards,
            },
            "seconds": self.timings.seconds(),
            "moved_channels": self.moved_channels,
            "notes": list(self.notes),
            "ffns": [ffn.to_dict() for ffn in self.ffns],
        }

    def _shown_rows(self) -> Sequence[Mapping[str, Any]]:
        return [ffn.to_dict() for ffn in self.ffns]

    def _shown_table(self) -> tuple[Sequence[str], Sequence[Sequence[str]]]:
        cells = []
        for row in self._shown_rows():
            active = row["active_per_step"]
            sizes = (row["size"], row["retained"], row["candidates"], "-" if active is None else f"{active:.0f}")
            cells.append((str(row["layer"]), *map(str, sizes), str(row["backend"])))
        return ("layers", "channels", "retained", "candidates", "active per step", "backend"), cells

    def plot(self, path: str | Path, dark: bool = False) -> Path:
        """Save a picture: R, C and P layer by layer, which kept candidates stay from step to step; ``dark`` for dark pages."""
        from .plotting import plot_report

        return plot_report(self, path, dark)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The table that ``rich.print`` shows."""
        from .tables import report_table

        yield from report_table(self, options.max_width)


Alone = tuple[Mapping[str, Partition], Mapping[str, torch.Tensor]]  # FFNReport.alone and .reached


def build_report(
    model: nn.Module,
    adapter: Adapter,
    config: PopConfig,
    plans: Sequence[FFNPlan],
    state: PromptState | None,
    timings: Timings,
    moved_channels: int,
    kernels: str,
    alone: Sequence[Alone] = (),
) -> Report:
    """Put the report together from a session's plans and its latest prompt.

    ``alone`` has, for each FFN that is not dense, what single modalities would choose, and the units that they reached.
    """
    ffns = []
    pruned = 0
    for plan in plans:
        known = None
        by_modality: Alone = {}, {}
        if plan.backend != "dense":
            known = state.ffns[pruned] if state is not None else None
            by_modality = alone[pruned] if alone else by_modality
            pruned += 1
        report = _ffn_report(plan, known, timings.decode_forwards > 0, config.batch == "shared")
        ffns.append(replace(report, alone=by_modality[0], reached=by_modality[1]))
    counts = {} if state is None else by_name(state.tokens_of)
    tokens = sum(counts.values())
    notes = [*_notes(config, plans, timings), *_expert_notes(ffns)]
    weights = sum(weights_per_token(model, adapter, plans).values())
    kept = [ffn.share_kept for ffn in ffns] if timings.decode_forwards else None
    bytes_read = bytes_per_token(model, adapter, plans, kept)
    return Report(config, ffns, tokens, timings, moved_channels, weights, kernels, counts, notes, bytes_read)


def _ffn_report(plan: FFNPlan, known: FFNState | None, decoded: bool, shared: bool) -> FFNReport:
    if known is None:
        return FFNReport(plan, None, None, None)
    if known.experts is not None:
        experts = ExpertsReport.of(known)
        tokens, dense = sum(experts.decode_tokens), sum(experts.dense_tokens)
        active = (plan.sizes.kept * (tokens - dense) + plan.sizes.channels * dense) / tokens if tokens else None
        return FFNReport(plan, known.partition, active, None, experts)
    active = known.steps.mean_active()
    if not plan.sizes.candidates and decoded:
        active = float(plan.sizes.kept)  # without candidates there is no choice that a step could record
    part = known.partition
    return FFNReport(plan, part[0] if shared and part is not None else part, active, known.steps.stability())


def _notes(config: PopConfig, plans: Sequence[FFNPlan], timings: Timings) -> list[str]:
    notes, gamma = notes_of(plan.ffn for plan in plans), config.channel_method.gamma
    clamped = [p for p in plans if not p.sizes.dense and 2 * p.sizes.candidates_kept < gamma * p.ffn.size - 2]
    if clamped and config.chosen_method == "pop":
        notes.append(
            f"gamma={gamma:g} does not fit the ratio in {len(clamped)} FFNs and was clamped; "
            f"{clamped[0].ffn.name} has {clamped[0].sizes.candidates / clamped[0].ffn.size:.3f}."
        )
    masked = [p for p in plans if p.backend == "masked"]
    if masked:
        notes.append(f"{len(masked)} FFNs run masked, without speed-up: {masked[0].reason} ({masked[0].ffn.name}).")
    if timings.masked_forwards:
        why = "another prompt's channels were in place"
        if config.batch == "per_sequence":
            why = "the kernels take one token a row, at most 8 rows, and no autograd"
        notes.append(f"{timings.masked_forwards} decode forwards ran masked, without speed-up: {why}.")
    return notes


def _expert_notes(ffns: Sequence[FFNReport]) -> list[str]:
    """What the latest prompt did not reach."""
    layers = [(ffn.plan.ffn.layer, ffn.experts) for ffn in ffns if ffn.experts is not None]
    waiting = [(layer, found.dense) for layer, found in layers if found.dense]
    late = sum(len(found.late) for _, found in layers)
    notes = []
    if waiting:
        count = sum(len(experts) for _, experts in waiting)
        named = ", ".join(f"layer {layer}: {', '.join(map(str, experts))}" for layer, experts in waiting[:4])
        more = f" and {len(waiting) - 4} more layers" if len(waiting) > 4 else ""
        notes.append(f"{count} experts have seen too few tokens to be partitioned, and run dense ({named}{more}).")
    if late:
        notes.append(f"{late} experts were partitioned while decoding, from the first tokens that reached them.")
    return notes
