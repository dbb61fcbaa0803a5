"""KL divergence of thresholds from the dense model: dense prompts and teacher-forced steps, in one masked forward a text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..evaluation.fidelity import compare_rows, pruned_step_logits, step_logits
from ..evaluation.intervals import Interval, bootstrap
from ..evaluation.texts import Window
from ..settings.config import PopConfig

_AT_ONCE = 4  # texts in a forward; each has thresholds of its own
_MOST_KEPT = 2**30  # bytes of the dense model's logits that are kept from one setting to the next


@dataclass(frozen=True)
class Quality:
    """Of one setting, by text.

    Attributes
    ----------
    kl : list of float
        Mean over a text's steps, nats a token.
    agreement : float
        Share of all steps at which the dense model thinks the same token most likely.
    """

    kl: list[float]
    agreement: float

    @property
    def interval(self) -> Interval:
        """Mean KL over texts, with a 95 % bootstrap interval."""
        return bootstrap(self.kl)


class QualityMeter:
    """Measures settings on the same texts.

    Parameters
    ----------
    model : PreTrainedModel
    windows : sequence of Window
        Texts of ``prompt`` + steps + 1 tokens.
    prompt : int
    tick : callable
        Called after each forward of pruned texts.
    reference : PreTrainedModel, optional
        The dense model, if it is another one.
    """

    def __init__(
        self,
        model: Any,
        windows: Sequence[Window],
        prompt: int,
        tick: Callable[[], object],
        reference: Any = None,
    ) -> None:
        self._reference = model if reference is None else reference
        self._model, self._prompt, self._tick = model, prompt, tick
        ids = torch.stack([window.ids for window in windows]).to(model.device)
        self.batches = ids.split(_AT_ONCE)
        self._dense: list[Tensor] = []

    def measure(self, config: PopConfig) -> Quality:
        """The quality of a setting; the model is left bit for bit as it was."""
        masked = replace(config, backend="masked")
        scores = []
        for number, ids in enumerate(self.batches):
            dense = (
                self._dense[number] if number < len(self._dense) else step_logits(self._reference, ids, self._prompt)
            )
            kept = len(self._dense) == number and (number + 1) * dense.nbytes <= _MOST_KEPT
            self._dense += [dense] if kept else []
            pruned, _ = pruned_step_logits(self._model, ids, self._prompt, masked)
            scores += compare_rows(dense, pruned, ids, self._prompt)
            self._tick()
        return Quality([score.kl for score in scores], sum(score.agreement for score in scores) / len(scores))


__all__ = ["Quality", "QualityMeter"]
