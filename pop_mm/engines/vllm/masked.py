"""One input of an FFN or of attention on one rank: statistics by KV block, what was decided for each request, and the masks.

Statistics of a prompt lie where its KV cache lies: a prefix that is found in the cache brings its own along, and a block that
is given away takes its own with it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from ...methods import ChannelMethod
from ...methods.scoring import channel_energy
from ...methods.thresholds import BINS, PASS_ALL, kept, magnitudes, not_finite, threshold
from ...modality import TEXT
from ...ops.histogram import histogram
from ...ops.select import choose
from ...partition import Sizes, partition
from .shard import Shard
from .tokens import Prompt, Tokens

Decided = TypeVar("Decided")
Complain = Callable[[str], None]


class MaskedInput(ABC, Generic[Decided]):
    """An input whose entries decode steps leave out.

    Parameters
    ----------
    name : str
        Of the modules that are given it, for messages.
    shard : Shard
    complain : callable
        Is told what a request's prompt has that nothing can be decided from; the request then decodes dense.

    Attributes
    ----------
    entry_bytes : int
        Of this rank's weights, in all modules that are given the input, that stand for one of its entries.
    kept_entries : Tensor
        ``[1]``, int64: how many entries decode tokens have kept so far; once, however many modules are given them.
    """

    block_entries: int  # of the statistics of one KV block
    statistics_dtype: torch.dtype

    def __init__(self, name: str, shard: Shard, complain: Complain) -> None:
        self.name = name
        self.shard = shard
        self.entry_bytes = 0
        self.kept_entries = torch.zeros(1, dtype=torch.int64)
        self._complain = complain
        self._statistics: Tensor | None = None
        self._decided: dict[str, tuple[int, Decided]] = {}
        self._observed: Tokens | None = None
        self._together: tuple[tuple[tuple[str, int], ...], Decided] | None = None

    @property
    def block_bytes(self) -> int:
        """Bytes of the statistics of one KV block."""
        return self.block_entries * self.statistics_dtype.itemsize

    def reserve(self, blocks: int, device: torch.device) -> None:
        """Make room for the statistics of so many KV blocks, and count kept entries on their device."""
        self.kept_entries = self.kept_entries.to(device)
        self._statistics = torch.zeros(blocks, self.block_entries, dtype=self.statistics_dtype, device=device)

    def saw(self, tokens: Tokens) -> bool:
        """Whether the latest forward that it was part of is that of these tokens."""
        return self._observed is tokens

    def forget(self, request: str) -> None:
        """A request has ended."""
        self._decided.pop(request, None)
        self._together = None

    @torch.inference_mode()
    def leave_out(self, values: Tensor, tokens: Tokens) -> Tensor:
        """The input with the entries zero that decode steps leave out; observe the prompt's.

        Parameters
        ----------
        values : Tensor
            ``[T, width]``; rows behind the last token are padding.
        tokens : Tokens

        Returns
        -------
        Tensor
            Like ``values``; the very same where nothing is left out.
        """
        first = self._observed is not tokens  # modules that share an input are given it one after another
        if first:
            self._observed = tokens
            self._observe(values, tokens)
        if not tokens.decoding:
            return values
        decided = self._of(tokens)
        own = values[tokens.rows]
        kept = self._kept(own, decided, tokens)
        if first:
            self.kept_entries.add_(kept.count_nonzero())
        masked = own.where(kept, 0)
        if len(own) == len(values):
            return masked
        values = values.clone()
        values[tokens.rows] = masked
        return values

    def _observe(self, values: Tensor, tokens: Tokens) -> None:
        statistics = self._statistics
        if statistics is None or not tokens.parts:
            return
        for part in tokens.parts:
            found = self._statistic(values[part.start + part.begins * self.skips_first : part.stop])
            if part.fresh:
                statistics[part.block] = found
            else:
                statistics[part.block] += found

    def _of(self, tokens: Tokens) -> Decided:
        """What was decided for the requests that decode, together; kept until others do."""
        keys = tokens.keys
        if self._together is None or self._together[0] != keys:
            self._together = keys, self._stacked([self._for(prompt) for prompt in tokens.decoding])
        return self._together[1]

    def _for(self, prompt: Prompt) -> Decided:
        known = self._decided.get(prompt.request)
        if known is None or known[0] != prompt.length:
            assert self._statistics is not None
            decided = self._decide(self._statistics[prompt.blocks.to(self._statistics.device)].sum(0), prompt)
            known = self._decided[prompt.request] = prompt.length, decided
        return known[1]

    def _not_finite(self, prompt: Prompt) -> None:
        self._complain(
            f"The activations of {self.name} are NaN or infinite in the prompt of request {prompt.request}, so nothing can be "
            "left out: the request decodes dense there."
        )

    skips_first = False  # whether a sequence's first token does not count

    @abstractmethod
    def _statistic(self, values: Tensor) -> Tensor:
        """``[block_entries]``: of some prompt tokens, ``[n, width]``."""

    @abstractmethod
    def _decide(self, statistics: Tensor, prompt: Prompt) -> Decided:
        """What the statistics of a prompt, ``[block_entries]``, decide for its decode steps."""

    @abstractmethod
    def _stacked(self, decided: list[Decided]) -> Decided:
        """Of several requests, along a first axis."""

    @abstractmethod
    def _kept(self, values: Tensor, decided: Decided, tokens: Tokens) -> Tensor:
        """``[N, width]``, boolean: which entries of decode tokens are not left out."""


@dataclass(frozen=True)
class Channels:
    """What POP decided for R requests.

    Attributes
    ----------
    allowed : Tensor
        ``[R, width]``, boolean: this rank's channels of R and C.
    candidates : Tensor
        ``[R, |C|]``, int64, channels of all ranks.
    weight : Tensor
        ``[R, |C|]``: the scorer's weight of each.
    dense : Tensor or None
        ``[R]``, boolean: requests that leave nothing out. None: none of them.
    """

    allowed: Tensor
    candidates: Tensor
    weight: Tensor
    dense: Tensor | None


class MaskedChannels(MaskedInput[Channels]):
    """The input of a down projection, of which POP leaves out channels.

    Parameters
    ----------
    sizes : Sizes
        Of the FFN on all ranks.
    method : ChannelMethod
    weight : Tensor
        ``[width]``: the scorer's weight of this rank's channels.
    """

    statistics_dtype = torch.float32

    def __init__(
        self, name: str, shard: Shard, complain: Complain, sizes: Sizes, method: ChannelMethod, weight: Tensor
    ) -> None:
        super().__init__(name, shard, complain)
        self.sizes = sizes
        self.block_entries = shard.size
        self._own_choice = method if method.chooses_by_itself else None
        self._weight = weight
        self._all_weights = shard.gathered(weight)

    def _statistic(self, values: Tensor) -> Tensor:
        return channel_energy(values)

    def _decide(self, statistics: Tensor, prompt: Prompt) -> Channels:
        scores = self.shard.gathered(self._weight * statistics.sqrt())
        finite = bool(scores.isfinite().all())
        if not finite:
            self._not_finite(prompt)
            scores = torch.zeros_like(scores)
        part = partition(scores, self.sizes)
        allowed = self.shard.own(part.allowed())
        dense = None if finite else torch.ones(1, dtype=torch.bool, device=scores.device)
        weight = self._all_weights[part.candidates]
        return Channels(allowed.unsqueeze(0), part.candidates.unsqueeze(0), weight.unsqueeze(0), dense)

    def _stacked(self, decided: list[Channels]) -> Channels:
        allowed, candidates, weight = (
            torch.cat([getattr(each, name) for each in decided]) for name in ("allowed", "candidates", "weight")
        )
        if all(each.dense is None for each in decided):
            return Channels(allowed, candidates, weight, None)
        none = torch.zeros(1, dtype=torch.bool, device=allowed.device)
        dense = torch.cat([none if each.dense is None else each.dense for each in decided])
        return Channels(allowed, candidates, weight, dense)

    def _kept(self, values: Tensor, decided: Channels, tokens: Tokens) -> Tensor:
        row = tokens.row.to(values.device)
        active = decided.allowed[row]
        if self.sizes.candidates_dropped:
            channels, weight = decided.candidates[row], decided.weight[row]
            found = self.shard.picked(values, channels)
            if self._own_choice is not None:
                found = self._own_choice.step_scores(found, weight, channels, tokens.position.to(values.device))
                weight = found.new_ones(found.shape[1])
            dropped = choose(found, weight, self.sizes.candidates_dropped)
            active = self.shard.without(active, channels.gather(1, dropped))
        if decided.dense is not None:
            active = active | decided.dense[row].unsqueeze(1)
        return active


class MaskedEntries(MaskedInput[Tensor]):
    """An input of which the entries below a threshold are left out. What is decided is the threshold, ``[R]``.

    Parameters
    ----------
    share : float
        Of the entries, to keep.
    weight : Tensor or None
        ``[width]``, float32: norms of the down projection's columns in front of it.
    """

    block_entries = BINS
    statistics_dtype = torch.int32
    skips_first = True

    def __init__(self, name: str, shard: Shard, complain: Complain, share: float, weight: Tensor | None) -> None:
        super().__init__(name, shard, complain)
        self.share = share
        self._weight = weight

    def of_step(self, tokens: Tokens) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """For products that read only what passes.

        Returns
        -------
        tuple
            Thresholds of the requests that decode, ``[R]``; the norms; and where to add the number of kept entries, None if
            another module has done so in this forward.
        """
        count = None if self._observed is tokens else self.kept_entries
        self._observed = tokens
        return self._of(tokens), self._weight, count

    def _statistic(self, values: Tensor) -> Tensor:
        counts = torch.zeros(BINS, dtype=torch.int64, device=values.device)
        histogram(values, counts, self._weight)
        return counts

    def _decide(self, statistics: Tensor, prompt: Prompt) -> Tensor:
        counts = self.shard.sum(statistics)
        if bool(not_finite(counts).any()):
            self._not_finite(prompt)
            return torch.full((1,), PASS_ALL, device=counts.device)
        tokens = torch.tensor([prompt.length], device=counts.device)
        return threshold({TEXT: counts.view(1, 1, -1)}, {TEXT: tokens}, [self.share])[0]

    def _stacked(self, decided: list[Tensor]) -> Tensor:
        return torch.cat(decided)

    def _kept(self, values: Tensor, decided: Tensor, tokens: Tokens) -> Tensor:
        limit = decided[tokens.row.to(values.device)].unsqueeze(1)
        return kept(magnitudes(values, self._weight), limit)


__all__ = ["MaskedChannels", "MaskedEntries", "MaskedInput"]
