"""The model of a benchmark: one that is loaded, or a published config with random weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..samples.quantise import quantise
from .configs import config_of, materialise, skeleton


@dataclass(frozen=True)
class Source:
    """What to measure.

    Attributes
    ----------
    name : str
        A sample's name, a folder or a hub id; or a published config's name.
    config : bool
        Whether it is a config's name: then the weights are random.
    layers : int or None
        Decoder layers of a config, if fewer than published.
    dtype : str
        "auto" is the checkpoint's own, and bfloat16 for a config.
    weights : str
        As :func:`pop_mm.quantise.quantise` takes them.
    """

    name: str
    config: bool = False
    layers: int | None = None
    dtype: str = "auto"
    weights: str = "auto"

    @property
    def label(self) -> str:
        """Name for every output: it says what is not as published."""
        stored = "" if self.weights == "auto" else f", {self.weights} weights"
        if not self.config:
            return self.name + stored
        whole = config_of(self.name).get_text_config().num_hidden_layers
        layers = "" if self.layers in (None, whole) else f", {self.layers} of {whole} layers"
        return f"{self.name} dimensions{layers}, random weights{stored}"

    @property
    def notes(self) -> list[str]:
        """Sentences that belong to every output."""
        found = []
        if self.weights != "auto":
            found.append(
                f"Dense is the {self.weights} model, by torchao on stock kernels, which is no faster than what it was made "
                "from: run this without --weights too before you call anything a speed-up."
            )
        if self.config and hasattr(config_of(self.name), "vision_config"):
            found.append("The prompts are text alone: the language tower is measured, and the vision tower never runs.")
        return found

    def skeleton(self) -> Any:
        """A config's model without weights."""
        return skeleton(config_of(self.name, self.layers), self._dtype)

    def load(self, device: torch.device, seed: int = 0) -> tuple[Any, Any]:
        """Model on the device, in eval mode, and its tokenizer (None for a config).

        Raises
        ------
        BenchError
            As :func:`~pop_mm.bench.configs.materialise`.
        SampleError
            As :func:`pop_mm.samples.load`.
        """
        if self.config:
            return quantise(materialise(self.skeleton(), device, seed), self.weights), None
        from ..samples import load

        return load(self.name, dtype=self.dtype, device=device, weights=self.weights)

    @property
    def _dtype(self) -> torch.dtype:
        found: torch.dtype = torch.bfloat16 if self.dtype == "auto" else getattr(torch, self.dtype)
        return found


__all__ = ["Source"]
