"""The methods that an evaluation compares: all run by one engine, so that they differ in what they choose alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError
from ..methods import METHODS as _METHODS
from ..methods import Method, Random, Thresholds, WandaSp, get_method
from ..methods.fixed import Calibration
from ..session.session import Session
from ..settings.config import PopConfig
from ..settings.keywords import nested


class _WithDense(Mapping[str, str]):
    """Name -> what it does: the dense model, and every method that is registered."""

    def __getitem__(self, name: str) -> str:
        return "the model as it is" if name == "dense" else _METHODS[name]

    def __iter__(self) -> Iterator[str]:
        yield "dense"
        yield from _METHODS

    def __len__(self) -> int:
        return len(_METHODS) + 1


METHODS = _WithDense()


@torch.inference_mode()
def calibrate(model: Any, texts: Iterable[Any]) -> Calibration:
    """Run calibration text through the dense model.

    Parameters
    ----------
    texts : iterable of Tensor or mapping
        ``[1, T]`` token ids, or arguments of the model's forward.
    """
    energies: dict[str, Tensor] = {}
    with Session(model, PopConfig(0.5, scope="ffn", method="static", backend="masked")) as session:
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
        As in :class:`~pop_mm.PopConfig` and :class:`~pop_mm.Pop`.
    budget : float, optional
        Instead of the ratio; ``thresholds`` has nothing else.
    seed : int
        For ``random``.
    calibration : Calibration, optional
        For ``wanda_sp``, which needs it.
    **settings
        More of :class:`~pop_mm.PopConfig`, and settings of the method (``prefill="partition"``) by their names. By default
        rows are pruned per sequence, so that results do not depend on how texts are batched, by masks.

    Raises
    ------
    ConfigError
        An unknown method, a setting that does not fit, or no calibration where it is needed.
    """
    if method not in METHODS:
        raise ConfigError(f"Unknown method {method!r}; known: {', '.join(METHODS)}.")
    if method == "dense":
        return None
    chosen: Method = get_method(method)
    if isinstance(chosen, Thresholds):
        own = {"backend": "masked", **{k: v for k, v in settings.items() if (k, v) != ("prefill", "dense")}}
        return PopConfig.from_dict(nested({"ratio": ratio, "budget": budget, "method": chosen, **own}))
    if isinstance(chosen, WandaSp):
        if calibration is None:
            raise ConfigError("wanda_sp ranks channels by calibration text: give some.")
        chosen = WandaSp(calibration)
    elif isinstance(chosen, Random):
        chosen = Random(seed)
    own = {"ratio": ratio, "gamma": gamma, "budget": budget, "method": chosen}
    return PopConfig.from_dict(nested({"batch": "per_sequence", "backend": "masked", **own, **settings}))


__all__ = ["METHODS", "Calibration", "calibrate", "config_for"]
