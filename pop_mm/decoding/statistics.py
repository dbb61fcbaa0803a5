"""What a prompt's tokens say about channels: sums of squared activations, by modality and unit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import NonFiniteError
from ..events import Events, tells
from ..formats.asking import is_ours
from ..methods.scoring import channel_energy, check_channel_weight
from ..modality import MODALITIES
from ..partition import Sizes
from ..settings.config import PopConfig
from ..tracking.phase import Forward
from ..tracking.step import Step
from ..weights.experts import Experts
from ..weights.layout import FFN
from .engine import Engine, where
from .state import FFNState, PromptState

_BLOCK = 1 << 22  # activations that are squared at once


class ChannelStatistics(Engine):
    """The prefill of methods that leave out channels.

    Parameters
    ----------
    ffns : sequence of FFN or Experts
        Those that are really pruned.
    sizes : sequence of Sizes
        Of each.
    config, modalities, events
        As of :class:`Engine`.
    """

    def __init__(
        self,
        ffns: Sequence[FFN | Experts],
        sizes: Sequence[Sizes],
        config: PopConfig,
        modalities: int = 1,
        events: Events | None = None,
    ) -> None:
        super().__init__(ffns, config, modalities, events)
        self.sizes = sizes
        self.method = method = config.channel_method
        self.scorer = method.ranks_by()
        self.own_choice = method if method.chooses_by_itself else None
        self._stand_ins: dict[int, Tensor | None] = {}
        self._waiting = [index for index, ffn in enumerate(ffns) if ffn.experts is not None]

    def new_state(self, rows: int, cache: Any) -> PromptState:
        """State of a new prompt of ``rows`` sequences."""
        states = [FFNState(sizes, ffn.experts) for ffn, sizes in zip(self.ffns, self.sizes, strict=True)]
        return PromptState(states, rows, cache)

    def _read(self, index: int) -> Tensor:
        """What the weights of an FFN say about its channels; they must be in the original order."""
        ffn = self.ffns[index]
        weight = self.scorer.channel_weight(ffn)
        if not is_ours(type(self.scorer)):
            check_channel_weight(self.scorer, ffn, weight)
        weight = weight.to(torch.promote_types(weight.dtype, torch.float32))  # a scorer of one's own may be narrower
        weight = weight.view(-1, ffn.size)
        waits = ffn.experts is not None and not self.scorer.fixed
        stand_in: Tensor | None = weight
        if waits:
            by_weights = self.config.experts.unseen == "weights"
            stand_in = weight * ffn.input_norms().to(weight.device) if by_weights else None
        self._stand_ins[index] = stand_in
        return weight

    def _per_unit(self, by_expert: Tensor, state: PromptState) -> Tensor:
        """``[U, D]`` from ``[E, D]``."""
        return by_expert.repeat(state.rows, 1) if self.per_sequence else by_expert

    @tells("statistics")
    def observe(
        self,
        index: int,
        forward: Forward,
        step: Step,
        h: Tensor,
        positions: Tensor | None,
        probes: Tensor | None = None,
    ) -> None:
        """Add the squared activations of the prompt's tokens (of its probe tokens, if there are any); padding never counts.

        Parameters
        ----------
        h : Tensor
            ``[N, D]``, inputs of the down projection; ``[n, D]`` of the tokens that ``probes`` names.
        positions : Tensor or None
            ``[E, D]``: where each original channel is in ``h``; None if in its own place.
        probes : Tensor, optional
            ``[n]``, from :meth:`probe_numbers`.
        """
        ffn, h = forward.state.ffns[index], h.detach()
        if step.expert is not None:
            self._observe_routed(ffn, step, h, positions, in_prompt=True)
            return
        units = forward.rows if self.per_sequence else 1
        h = self.scorer.prompt_activations(h).view(units, -1, h.shape[-1])
        energies: list[Tensor | None] = [None] * self._modalities
        counts: Tensor | int = 0
        for modality, mask in self._observed(forward, step):
            if mask is not None:
                mask = (mask if probes is None else mask[probes]).view(units, -1)
            alone = units == 1  # the compiled library takes matrices
            energy = channel_energy(h[0] if alone else h, mask[0] if alone and mask is not None else mask)
            energies[modality] = energy.view(units, -1)
            counts = counts + (h.shape[1] if mask is None else mask.sum(-1))
        zero = next(energy for energy in energies if energy is not None).new_zeros(()).expand(units, h.shape[-1])
        sums = torch.stack([zero if energy is None else energy for energy in energies])
        seen = torch.zeros(units, dtype=torch.int64, device=h.device) + counts
        ffn.add(sums if positions is None else sums[..., positions[0]], seen, seen)

    def _observe_routed(self, ffn: FFNState, step: Step, h: Tensor, positions: Tensor | None, in_prompt: bool) -> None:
        assert step.weight is not None and ffn.experts is not None
        units = ffn.experts * (step.rows if self.per_sequence else 1)
        valid = step.counted if in_prompt else step.valid
        modality = torch.zeros_like(step.unit) if step.modality is None or not in_prompt else step.modality
        place = step.unit + modality * units
        dtype = torch.promote_types(h.dtype, torch.float32)
        sums = torch.zeros(self._modalities * units, h.shape[1], dtype=dtype, device=h.device)
        for part in torch.arange(len(h), device=h.device).split(max(1, _BLOCK // h.shape[1])):
            values = in_original_order(h[part], step.expert if step.expert is None else step.expert[part], positions)
            values = self._weighted(self.scorer.prompt_activations(values.to(dtype)), step.weight[part])
            squared = values.square()
            if valid is not None:
                squared.masked_fill_(~valid[part].unsqueeze(1), 0)
            sums.index_add_(0, place[part], squared)
        ones = torch.ones_like(step.unit) if valid is None else valid.long()
        tokens = torch.zeros(units, dtype=torch.int64, device=h.device).index_add_(0, step.unit, ones)
        seen = tokens
        if self.config.modality_weights:
            weights = [self.config.modality_weights.get(name, 1.0) for name in MODALITIES]
            counting = (torch.tensor(weights, device=h.device)[modality] > 0).long()
            seen = torch.zeros_like(tokens).index_add_(0, step.unit, ones * counting)
        ffn.add(sums.view(self._modalities, units, -1), seen, tokens if in_prompt else None)

    def _weighted(self, values: Tensor, weight: Tensor | None) -> Tensor:
        """Activations of experts as the score takes them, ``[N, ...]``."""
        if self.config.experts.score == "routed" and weight is not None:
            return values * weight.detach().to(values.dtype).unsqueeze(1)
        return values

    def _observed(self, forward: Forward, step: Step) -> list[tuple[int, Tensor | None]]:
        """The tokens of this forward that statistics of dense FFNs are made from, by modality."""
        if not self.method.probe_tokens:
            return step.by_modality
        probes = self._probes(forward, step).flatten()
        return [(m, probes if mask is None else mask & probes) for m, mask in step.by_modality]

    def _probes(self, forward: Forward, step: Step) -> Tensor:
        """``[B, q]``: the ``probe_tokens`` of each row's prompt, evenly spaced over those that count, the last one included.

        All of them if there are no more.
        """
        counting = torch.zeros(len(step), dtype=torch.bool, device=step.unit.device)
        for modality, mask in step.by_modality:
            if self.config.modality_weights.get(MODALITIES[modality], 1) > 0:
                counting = counting | (True if mask is None else mask)
        counting = counting.view(forward.rows, forward.length)
        wanted, count = self.method.probe_tokens, counting.sum(-1, keepdim=True).clamp_(min=1)
        number = counting.cumsum(-1)  # from 1
        return counting & (number * wanted // count > (number - 1) * wanted // count)

    def probe_numbers(self, forward: Forward) -> Tensor:
        """``[n]``: the probe tokens of this forward as numbers of its positions, row by row."""
        return self._probes(forward, self.step(forward, where(forward))).flatten().nonzero().squeeze(1)

    @tells("statistics")
    def check_finite(self, state: PromptState) -> None:
        """Raise :class:`NonFiniteError` if the prompt's statistics are not finite; one look for all FFNs."""
        totals = {i: ffn.energies.sum() for i, ffn in enumerate(state.ffns) if ffn.energies is not None}
        if not totals and self.processes is None:
            return
        device = next(iter(totals.values())).device if totals else self.ffns[0].device
        bad = torch.zeros(len(state.ffns), dtype=torch.int32, device=device)
        if totals:
            sums = torch.stack([total.to(bad.device) for total in totals.values()])
            bad[list(totals)] = (~sums.isfinite()).int()
        first = self._first_bad(bad)
        if first is not None:
            raise NonFiniteError(
                f"The activations of {self.ffns[first].name} are NaN or infinite in the prompt, so its channels cannot be "
                "ranked. Check the weights and inputs, or run the model in bfloat16 or float32 if it overflows in float16."
            )


def in_original_order(h: Tensor, expert: Tensor | None, positions: Tensor | None) -> Tensor:
    """``[N, D]``: ``h`` with every channel in its own place."""
    if positions is None:
        return h
    return h[:, positions[0]] if expert is None else h.gather(1, positions[expert])


__all__ = ["ChannelStatistics", "in_original_order"]
