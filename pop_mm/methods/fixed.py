"""Fixed masks, for comparison: no step chooses anything, and of most of them not even the prompt does."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..partition import Sizes
from .scoring import ActivationScorer, Scorer
from .static import Static

if TYPE_CHECKING:
    from ..weights.experts import Experts
    from ..weights.layout import FFN


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


class Fixed(Static):
    """A method that ranks channels by a score of its own."""

    settings: ClassVar[tuple[str, ...]] = tuple(name for name in Static.settings if name != "scorer")
    saves_time = False


class Magnitude(Fixed):
    """By the weights alone."""

    name = "magnitude"
    about = "fixed: by the norm of a channel's weights in gate, up and down"
    scorer = MagnitudeScorer()


class Griffin(Fixed):
    """GRIFFIN (Dong et al. 2024, arXiv 2404.01365)."""

    name = "griffin"
    about = "the prompt's best channels by GRIFFIN's statistic: norms of each token's normalised activations"
    scorer = GriffinScorer()


class Random(Fixed):
    """By chance, the same for the same seed.

    Parameters
    ----------
    seed : int
    **settings
        As of any method that leaves out channels.
    """

    name = "random"
    about = "fixed: at random"
    settings = (*Fixed.settings, "seed")
    seed: int = 0

    def __init__(self, seed: int = 0, **settings: Any) -> None:
        super().__init__(**settings)
        self.seed = seed

    def ranks_by(self) -> Scorer:
        """The seed's scores."""
        return RandomScorer(self.seed)


class WandaSp(Fixed):
    """Wanda-sp: by calibration text instead of the prompt.

    Parameters
    ----------
    calibration : Calibration, optional
        From :func:`pop_mm.evaluation.calibrate`; a session cannot be made without it.
    **settings
        As of any method that leaves out channels.
    """

    name = "wanda_sp"
    about = "fixed: Wanda-sp, by the scores of calibration text"
    scorer = None

    def __init__(self, calibration: Calibration | None = None, **settings: Any) -> None:
        super().__init__(**settings)
        self.scorer = None if calibration is None else CalibratedScorer(calibration)

    def sizes(self, channels: int, ratio: float, gamma: float, round_to: int = 1) -> Sizes:
        """As ``static``."""
        if self.scorer is None:
            raise ConfigError(
                "wanda_sp ranks channels by calibration text: give some (method=WandaSp(calibrate(model, texts)), "
                "or --calibration)."
            )
        return super().sizes(channels, ratio, gamma, round_to)


__all__ = ["CalibratedScorer", "Calibration", "Griffin", "Magnitude", "Random", "WandaSp"]
