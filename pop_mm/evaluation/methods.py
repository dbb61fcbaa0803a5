"""The methods that an evaluation compares: all are settings of the one engine, so that they differ in the choice alone."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..config import PopConfig
from ..errors import ConfigError
from ..experts import Experts
from ..layout import FFN
from ..scoring import ActivationScorer, Scorer, WandaScorer
from ..session import Session

METHODS = {
    "dense": "the model as it is",
    "static": "the prompt's best channels by POP's score, at every step (the paper's variant 1)",
    "pop": "Partition-guided Online Pruning",
    "full": "the best of all channels at every step; saves nothing (the paper's variant 2)",
    "wanda_sp": "fixed: Wanda-sp, by the scores of calibration text",
    "magnitude": "fixed: by the norm of a channel's weights in gate, up and down",
    "griffin": "the prompt's best channels by GRIFFIN's statistic: norms of each token's normalised activations",
    "random": "fixed: at random",
    "thresholds": "entries of each matrix's input above a threshold from the prompt; by a budget, not a ratio",
}


class FixedScorer(Scorer):
    """A score that no prompt changes."""

    fixed = True

    def prompt_activations(self, h: Tensor) -> Tensor:
        """Ones."""
        return torch.ones_like(h)


class MagnitudeScorer(FixedScorer):
    """The l2 norm of all of a channel's weights: its rows of gate and up, and its column of down."""

    name = "magnitude"

    def channel_weight(self, ffn: FFN | Experts) -> Tensor:
        """``[D]`` or ``[E, D]``."""
        down = ffn.down_column_norms()
        return torch.hypot(ffn.input_norms().to(down.device), down)


class RandomScorer(FixedScorer):
    """Scores drawn for each FFN, the same for the same seed and name."""

    name = "random"

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def channel_weight(self, ffn: FFN | Experts) -> Tensor:
        """``[D]`` or ``[E, D]``."""
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self.seed} {ffn.name}".encode()))
        return torch.rand(ffn.channel_shape, generator=generator).to(ffn.device) + 1e-3


class GriffinScorer(ActivationScorer):
    """GRIFFIN's statistic (Dong et al. 2024): each token's activations are normalised before the norm over tokens."""

    name = "griffin"

    def prompt_activations(self, h: Tensor) -> Tensor:
        """Every token's activations, divided by their norm."""
        return nn.functional.normalize(h.to(torch.promote_types(h.dtype, torch.float32)), dim=-1)


@dataclass(frozen=True)
class Calibration:
    """What a dense model does on calibration text.

    Attributes
    ----------
    energies : mapping of str to Tensor
        Name of an FFN -> sum of squared activations of each channel over all tokens, ``[D]`` or ``[E, D]``.
    """

    energies: Mapping[str, Tensor]


class CalibratedScorer(FixedScorer):
    """Wanda-sp: ``||W_down[:, i]||_2 * ||h[..., i]||_2`` over calibration text instead of the prompt."""

    name = "wanda_sp"

    def __init__(self, calibration: Calibration) -> None:
        self._calibration = calibration

    def channel_weight(self, ffn: FFN | Experts) -> Tensor:
        """``[D]`` or ``[E, D]``."""
        weight, energy = ffn.down_column_norms(), self._calibration.energies.get(ffn.name)
        if energy is not None and bool((energy.sum(-1) > 0).all()):
            return weight * energy.sqrt().to(weight.device)
        by_weights = weight * ffn.input_norms().to(
            weight.device
        )  # of FFNs and experts that no calibration token reached
        if energy is None:
            return by_weights
        energy = energy.to(weight.device)
        return (weight * energy.sqrt()).where(energy.sum(-1, keepdim=True) > 0, by_weights)


@torch.inference_mode()
def calibrate(model: Any, texts: Iterable[Any]) -> Calibration:
    """Run calibration text through the dense model.

    Parameters
    ----------
    texts : iterable of Tensor or mapping
        ``[1, T]`` token ids, or arguments of the model's forward.
    """
    energies: dict[str, Tensor] = {}
    with Session(model, PopConfig(0.5, scope="ffn", gamma=0, backend="masked")) as session:
        for text in texts:
            inputs = text if isinstance(text, Mapping) else {"input_ids": text}
            model(**inputs, use_cache=False)
            for name, energy in session.statistics().items():
                energies[name] = energies[name] + energy if name in energies else energy
    return Calibration(energies)


def config_for(
    method: str,
    ratio: float | None = None,
    gamma: float = 0.1,
    *,
    budget: float | None = None,
    seed: int = 0,
    calibration: Calibration | None = None,
    **settings: Any,
) -> PopConfig | None:
    """The settings of a method; None for the dense model.

    Parameters
    ----------
    method : str
        One of :data:`METHODS`.
    ratio, gamma : float
        As in :class:`~pop_mm.PopConfig`; gamma is for ``pop`` alone.
    budget : float, optional
        Instead of the ratio; ``thresholds`` has nothing else.
    seed : int
        For ``random``.
    calibration : Calibration, optional
        For ``wanda_sp``, which needs it.
    **settings
        More of :class:`~pop_mm.PopConfig`. By default rows are pruned per sequence, so that results do not depend on how
        texts are batched, by masks.

    Raises
    ------
    ConfigError
        An unknown method, a setting that does not fit, or no calibration where it is needed.
    """
    if method not in METHODS:
        raise ConfigError(f"Unknown method {method!r}; known: {', '.join(METHODS)}.")
    if method == "dense":
        return None
    if method == "thresholds":
        own = {"backend": "masked", **{k: v for k, v in settings.items() if (k, v) != ("prefill", "dense")}}
        return PopConfig(ratio, budget=budget, method=method, **own)
    scorer: Scorer = WandaScorer()
    if method == "wanda_sp":
        if calibration is None:
            raise ConfigError("wanda_sp ranks channels by calibration text: give some.")
        scorer = CalibratedScorer(calibration)
    elif method == "random":
        scorer = RandomScorer(seed)
    elif method in ("magnitude", "griffin"):
        scorer = {"magnitude": MagnitudeScorer, "griffin": GriffinScorer}[method]()
    own_method: Any = method if method in ("pop", "full") else "static"
    own = {"batch": "per_sequence", "backend": "masked", "scorer": scorer, "method": own_method}
    return PopConfig(ratio, gamma=gamma, budget=budget, **{**own, **settings})


__all__ = ["METHODS", "Calibration", "calibrate", "config_for"]
