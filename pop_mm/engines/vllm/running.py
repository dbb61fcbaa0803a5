"""The masked inputs of one model on one worker, and the forward that runs. Knows no vLLM."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ...errors import EngineError
from ...settings.config import PopConfig
from .counts import Counting, Counts
from .masked import MaskedInput
from .planned import Planned
from .rows import ChosenRows
from .tokens import Tokens


class Running:
    """What a model runner holds of pop_mm.

    Parameters
    ----------
    config : PopConfig
    planned : Planned
    warn : callable
        Takes a message.

    Attributes
    ----------
    inputs : list of MaskedInput
    tokens : Tokens or None
        Of the forward that runs; None in between, and in forwards of made-up tokens.
    """

    def __init__(self, config: PopConfig, planned: Planned, warn: Callable[[str], None]) -> None:
        self.config = config
        self.planned = planned
        self.inputs: list[MaskedInput[Any]] = []
        self.tokens: Tokens | None = None
        self._warn = warn
        self._proven = False
        self._decoded = 0  # tokens
        self._counting = Counting()
        self._rows_bytes = 0
        self._why_no_rows: str | None = None

    def note_rows(self, rows: ChosenRows | None, reason: str | None) -> None:
        """A module's steps of one request are computed by chosen rows, or why they are not."""
        self._rows_bytes += 0 if rows is None else rows.bytes
        self._why_no_rows = self._why_no_rows or reason

    def complain(self, message: str) -> None:
        """Pass on what makes a request decode dense somewhere."""
        self._warn(f"pop_mm: {message}")

    def mask(self, masked: MaskedInput[Any], values: Tensor) -> Tensor:
        """What decode steps leave of an input, ``[..., width]``; the very same where nothing is left out."""
        if self.tokens is None:
            return values
        rows = values.view(-1, values.shape[-1])
        found = masked.leave_out(rows, self.tokens)
        return values if found is rows else found.view(values.shape)

    @contextmanager
    def forward(self, tokens: Tokens | None = None) -> Iterator[None]:
        """Within: the model runs on these tokens, or on those that ``tokens`` is set to meanwhile.

        Raises
        ------
        EngineError
            The first forward did not go through every input, so that some would be served dense.
        """
        self.tokens = tokens
        try:
            yield
            tokens = self.tokens
        finally:
            self.tokens = None
        if tokens is None:
            return
        self._decoded += len(tokens.row)
        if not self._proven:
            missed = [masked.name for masked in self.inputs if not masked.saw(tokens)]
            if missed:
                raise EngineError(
                    f"The model computes {missed[0]} (and {len(missed) - 1} more) without asking its linear layer, so pop_mm "
                    "would leave nothing out of it. Leave pop_mm's settings out to serve the model dense."
                )
            self._proven = True

    def reserve(self, blocks: int, device: torch.device) -> int:
        """Make room for the statistics of so many KV blocks; their bytes."""
        for masked in self.inputs:
            masked.reserve(blocks, device)
        return blocks * self.block_bytes

    @property
    def block_bytes(self) -> int:
        """Bytes of all statistics of one KV block."""
        return sum(masked.block_bytes for masked in self.inputs)

    def counts(self) -> Counts | None:
        """What decode steps kept since the last answer, as :meth:`.Counting.since_last`."""
        return self._counting.since_last(self.inputs, self._decoded)

    def forget(self, request: str) -> None:
        """A request has ended."""
        for masked in self.inputs:
            masked.forget(request)

    @property
    def summary(self) -> str:
        """What is left out where, in words."""
        config, planned = self.config, self.planned
        asked = f"ratio {config.ratio:g}" if config.ratio is not None else f"budget {config.budget:g}"
        attention = len({found.record for found in planned.inputs} - set(planned.ffns))
        beside = f" and the inputs of {attention} attention projections" if attention else ""
        return (
            f"method {config.chosen_method}, {asked}, scope {config.scope}: took over {planned.pruned_ffns} of "
            f"{len(planned.ffns)} FFNs{beside}; {self._how}"
        )

    @property
    def _how(self) -> str:
        if self._rows_bytes:
            size = self._rows_bytes / 2**20
            return f"one running request by chosen rows of weights that are kept twice ({size:.1f} MiB more), several masked"
        return "masked" if self._why_no_rows is None else f"masked, since {self._why_no_rows}"


__all__ = ["Running"]
