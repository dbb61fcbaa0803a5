"""What a session with thresholds did: thresholds, intended and kept shares, bytes; as numbers, JSON or a table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from ..adapters import Adapter
from ..decoding.threshold_state import InputState, RecordState
from ..decoding.timings import Timings
from ..methods.thresholds import MIN_PROMPT_TOKENS, PASS_ALL, deciding, share_above
from ..modality import MODALITIES, by_name
from ..session.spread import notes_of
from ..settings.config import PopConfig
from ..weights.groups import InputGroup
from .footprint import bytes_per_token, weights_per_token
from .paragraphs import Paragraphs, number_of
from .shown import ShownReport
from .shown import share as percent

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

    from ..decoding.state import PromptState
    from ..session.threshold_session import ThresholdPlan

# matrices behind an input, by the role and the kind of its record
MATRICES = {
    ("attention_in", "x"): "q, k, v",
    ("attention_out", "x"): "o",
    ("lm_head", "x"): "lm_head",
    ("dense", "x"): "gate, up",
    ("dense", "h"): "down",
    ("shared_expert", "x"): "gate, up of shared experts",
    ("shared_expert", "h"): "down of shared experts",
    ("expert", "x"): "gate, up of experts",
    ("expert", "h"): "down of experts",
}


@dataclass(frozen=True)
class InputReport:
    """One input of one record.

    Attributes
    ----------
    plan : ThresholdPlan
    which : {"x", "h"}
    share : float
        Of its entries, meant to be kept.
    kept : float or None
        Share that the latest prompt's decode steps kept; None before the first.
    thresholds : list of float
        Of each sequence; empty before the first prompt. -1 lets everything pass.
    prompt_share : mapping of str to float
        Modality -> share of its prompt tokens' entries above the thresholds.
    """

    plan: ThresholdPlan
    which: str
    share: float
    kept: float | None = None
    thresholds: Sequence[float] = ()
    prompt_share: Mapping[str, float] = field(default_factory=dict)

    @property
    def matrix(self) -> str:
        """The matrices behind this input."""
        record = self.plan.record
        return MATRICES[record.kind if isinstance(record, InputGroup) else record.role, self.which]

    @property
    def weights(self) -> int:
        """Of those matrices, as a dense model reads them for a token."""
        return self.plan.matrices[self.which]

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "name": self.plan.record.name,
            "layer": self.plan.record.layer,
            "input": self.which,
            "matrix": self.matrix,
            "weights": self.weights,
            "share": self.share,
            "kept": self.kept,
            "thresholds": list(self.thresholds),
            "prompt_share": dict(self.prompt_share),
            "backend": self.plan.backend,
        }

    @classmethod
    def of(cls, plan: ThresholdPlan, which: str, state: InputState | None) -> InputReport:
        """The report of one input; ``state`` is the latest prompt's."""
        share = plan.shares[which]
        if state is None or state.threshold is None:
            return cls(plan, which, share)
        entries = float(state.entries)
        prompt = {}
        for modality, counts in state.counts.items():
            above = share_above(counts, state.threshold.to(counts.device))
            weight = counts.sum(-1).double()
            if float(weight.sum()):
                prompt[MODALITIES[modality]] = float((above.nan_to_num() * weight).sum() / weight.sum())
        return cls(
            plan, which, share, float(state.kept) / entries if entries else None, state.threshold.tolist(), prompt
        )


@dataclass(frozen=True, repr=False)
class ThresholdReport(ShownReport):
    """What a session did. ``print(report)`` shows a table.

    Attributes
    ----------
    config : PopConfig
    inputs : sequence of InputReport
    prompt_tokens : int
        Of the latest prompt.
    modality_tokens : mapping of str to int
        Modality -> tokens of the latest prompt.
    threshold_tokens : mapping of str to int
        Modality -> those tokens that set the thresholds.
    timings : Timings
    weights_per_token : mapping of str to int
        Part -> weights that a decoded token reads from the dense model.
    bytes_per_token : mapping of str to int or None
        Bytes of weights that a decoded token reads (see :mod:`pop_mm.report.footprint`): "dense"; "intended"; "read", on the
        backends of now, where what is masked is read all the same; and "kept", of the rows that the steps' entries picked, None
        before the first.
    notes : sequence of str
    """

    config: PopConfig
    inputs: Sequence[InputReport]
    prompt_tokens: int
    modality_tokens: Mapping[str, int]
    threshold_tokens: Mapping[str, int]
    timings: Timings
    weights_per_token: Mapping[str, int]
    plans: Sequence[ThresholdPlan] = ()
    notes: Sequence[str] = ()
    bytes_per_token: Mapping[str, int | None] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        model: nn.Module,
        adapter: Adapter,
        config: PopConfig,
        plans: Sequence[ThresholdPlan],
        state: PromptState | None,
        timings: Timings,
    ) -> ThresholdReport:
        """Put the report together from a session's plans and its latest prompt."""
        known: dict[int, RecordState] = {}
        if state is not None:
            pruned = [number for number, plan in enumerate(plans) if plan.backend != "dense"]
            for number, found in zip(pruned, state.ffns, strict=True):
                assert isinstance(found, RecordState)
                known[number] = found
        inputs = [
            InputReport.of(plan, which, known[number].inputs[which] if number in known else None)
            for number, plan in enumerate(plans)
            for which in plan.matrices
        ]
        counts: dict[str, int] = {}
        notes = notes_of(plan.record for plan in plans)
        if state is not None:
            counts = by_name(state.tokens_of)
            if state.tokens is not None and (short := int((state.tokens < MIN_PROMPT_TOKENS).sum())):
                notes.append(
                    f"{short} of {state.rows} sequences decoded dense: their prompts have fewer than {MIN_PROMPT_TOKENS} tokens."
                )
        masked = [plan for plan in plans if plan.backend == "masked"]
        if masked:
            notes.append(
                f"Entries of {len(masked)} of {len(plans)} inputs are masked, without speed-up: {masked[0].reason}."
            )
        if timings.masked_forwards:
            notes.append(
                f"{timings.masked_forwards} of {timings.decode_forwards} decode steps ran masked, without speed-up: rows are "
                "read for one token of one sequence, without gradients or autocast."
            )
        used = {} if state is None else _deciding_tokens(state, known.values())
        weights = weights_per_token(model, adapter, plans)
        report = cls(config, inputs, sum(counts.values()), counts, used, timings, weights, plans, notes)
        kept = report.shares_kept if any(found.kept is not None for found in inputs) else None
        return replace(report, bytes_per_token=bytes_per_token(model, adapter, plans, kept))

    @property
    def shares_kept(self) -> list[float]:
        """Of each plan, the share of its weights that the steps' entries picked; before the first step the intended one."""
        read: dict[int, float] = dict.fromkeys(map(id, self.plans), 0.0)
        for found in self.inputs:
            read[id(found.plan)] += found.weights * (found.share if found.kept is None else found.kept)
        return [read[id(plan)] / sum(plan.matrices.values()) for plan in self.plans]

    @property
    def kept_share(self) -> dict[str, tuple[float, float | None]]:
        """Matrix kind -> intended share of its weights that a step reads, and the one that the steps read."""
        found: dict[str, tuple[float, float | None]] = {}
        for matrix in dict.fromkeys(report.matrix for report in self.inputs):
            mine = [report for report in self.inputs if report.matrix == matrix]
            total = sum(report.weights for report in mine)
            kept = [report.weights * report.kept for report in mine if report.kept is not None]
            shown = sum(kept) / total if len(kept) == len(mine) and total else None
            found[matrix] = sum(report.weights * report.share for report in mine) / total, shown
        return found

    def read_weights(self) -> tuple[float, float | None]:
        """Weights of all layers and the lm_head that a decoded token is meant to read, and those that the steps read."""
        total = sum(self.weights_per_token.values())
        meant = total - sum(report.weights * (1 - report.share) for report in self.inputs)
        pruned = [report for report in self.inputs if report.plan.backend != "dense"]
        known = [report.weights * (1 - report.kept) for report in pruned if report.kept is not None]
        return meant, total - sum(known) if known else None

    @property
    def scope_share(self) -> tuple[float, float | None]:
        """Of the weights in the config's scope, the share that is meant to be read, and the one that the steps read."""
        layers = {name: count for name, count in self.weights_per_token.items() if name != "lm_head"}
        if self.config.scope == "ffn":
            layers.pop("attention", None)
        total = sum(layers.values())
        mine = [report for report in self.inputs if report.plan.record.role != "lm_head"]
        left_out = sum(report.weights * (1 - report.share) for report in mine)
        known = [report.weights * (1 - report.kept) for report in mine if report.kept is not None]
        return 1 - left_out / total, 1 - sum(known) / total if known else None

    @property
    def left_out_share(self) -> float | None:
        """Share of all weights that a decoded token reads from the dense model which the latest prompt's steps left out."""
        read = self.read_weights()[1]
        return None if read is None else 1 - read / sum(self.weights_per_token.values())

    @property
    def backends(self) -> dict[str, int]:
        """How many records run on each backend."""
        plans = {id(report.plan): report.plan.backend for report in self.inputs}
        return {name: list(plans.values()).count(name) for name in dict.fromkeys(plans.values())}

    @property
    def kernels(self) -> str:
        """What decodes: ``"compiled"`` or ``"triton"`` where rows are read, else ``"stock"``."""
        if "rows" not in self.backends:
            return "stock"
        return "triton" if self.config.kernels == "triton" else "compiled"

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as :meth:`to_json` writes them."""
        return {
            "config": self.config.to_dict(),
            "method": "thresholds",
            "budget": self.config.budget,
            "backends": self.backends,
            "kernels": self.kernels,
            "prompt_tokens": self.prompt_tokens,
            "modality_tokens": dict(self.modality_tokens),
            "threshold_tokens": dict(self.threshold_tokens),
            "left_out_share": self.left_out_share,
            "budget_read": {"intended": self.scope_share[0], "kept": self.scope_share[1]},
            "bytes_per_token": dict(self.bytes_per_token),
            "matrices": [
                {"matrix": name, "share": share, "kept": kept, "prompt_share": self._by_modality(name)}
                for name, (share, kept) in self.kept_share.items()
            ],
            "forwards": {
                "prefill": self.timings.prefill_forwards,
                "decode": self.timings.decode_forwards,
                "decode_masked": self.timings.masked_forwards,
            },
            "seconds": self.timings.seconds(),
            "notes": list(self.notes),
            "inputs": [report.to_dict() for report in self.inputs],
        }

    def _threshold_range(self, matrix: str) -> str:
        """Smallest and largest threshold of one kind of matrix, over its layers and the sequences that have one."""
        mine = [bound for found in self.inputs if found.matrix == matrix for bound in found.thresholds]
        real = [bound for bound in mine if bound != PASS_ALL]
        return f"{min(real):.2g} to {max(real):.2g}" if real else "-"

    def _by_modality(self, matrix: str) -> dict[str, float]:
        """Modality -> mean share of its prompt tokens' entries above the thresholds of one kind of matrix."""
        mine = [report.prompt_share for report in self.inputs if report.matrix == matrix]
        names = dict.fromkeys(name for shares in mine for name in shares)
        return {
            name: sum(found) / len(found)
            for name in names
            if (found := [shares[name] for shares in mine if name in shares])
        }

    def _shown_rows(self) -> Sequence[Mapping[str, Any]]:
        return [found.to_dict() for found in self.inputs]

    def _shown_table(self) -> tuple[Sequence[str], Sequence[Sequence[str]]]:
        rows = [(name, percent(meant), percent(kept)) for name, (meant, kept) in self.kept_share.items()]
        return ("matrix", "meant to be read", "read"), rows

    def plot(self, path: str | Path, dark: bool = False) -> Path:
        """Save a picture: the kept share of every input, layer by layer; ``dark`` for dark pages."""
        from .plotting_thresholds import plot_thresholds

        return plot_thresholds(self, path, dark)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The table that ``rich.print`` shows."""
        yield threshold_summary(self)
        from .tables import narrowed

        yield from narrowed(threshold_table(self), ("matrix", "thresholds", "intended", "kept"), options.max_width)


def threshold_summary(report: ThresholdReport) -> Paragraphs:
    """A few lines: settings, tokens, times, bytes and everything that needs saying."""
    from .tables import byte_size

    config, times = report.config, report.timings
    of = "attention and FFN weights" if config.scope == "overall" else "FFN weights"
    lines = [f"Thresholds from the prompt: a decoded token is meant to read {config.budget:.0%} of the {of}."]
    if not times.prefill_forwards:
        lines.append("No prompt has been processed yet.")
    else:
        counts, used = (
            ", ".join(f"{count} {name}" for name, count in tokens.items())
            for tokens in (report.modality_tokens, report.threshold_tokens)
        )
        lines.append(
            f"Prompt tokens: {counts}; of these set the thresholds: {used or 'none'}. Prefill {times.prefill:.2f} s, "
            f"{number_of(times.decode_forwards, 'decode step')} {times.decode:.2f} s."
        )
    sizes = {name: byte_size(size) for name, size in report.bytes_per_token.items() if size is not None}
    line = f"Bytes of weights per decoded token, lm_head included: {sizes['dense']} dense, {sizes['intended']} intended"
    lines.append(line + (f", {sizes['kept']} kept." if "kept" in sizes else "."))
    return Paragraphs.summary(lines, report.notes)


def threshold_table(report: ThresholdReport) -> Any:
    """One row per kind of matrix: inputs, intended and kept share, and the share of the prompt's tokens by modality."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("matrix")
    for name in (
        "inputs",
        "thresholds",
        "intended",
        "kept",
        *(f"of prompt's {name}" for name in report.modality_tokens),
    ):
        table.add_column(name, justify="right", no_wrap=name == "thresholds")  # "0.38 to 0.47" stays in one line
    for matrix, (share, kept) in report.kept_share.items():
        count = sum(found.matrix == matrix for found in report.inputs)
        by_modality = report._by_modality(matrix)
        shares = [f"{by_modality[name]:.1%}" if name in by_modality else "-" for name in report.modality_tokens]
        bounds, now = report._threshold_range(matrix), "-" if kept is None else f"{kept:.1%}"
        table.add_row(matrix, str(count), bounds, f"{share:.1%}", now, *shares)
    return table


def _deciding_tokens(state: PromptState, records: Iterable[RecordState]) -> dict[str, int]:
    """Modality -> tokens of a prompt that set its thresholds; the same for every record that the prompt ran."""
    for record in records:
        found = record.inputs["x"]
        if found.counts:
            own = deciding(found.counts, state.tokens_of)
            return {MODALITIES[m]: n for m, counts in own.items() if (n := int(counts.sum()) // found.width)}
    return {}


__all__ = ["InputReport", "ThresholdReport", "threshold_summary", "threshold_table"]
