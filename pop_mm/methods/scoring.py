"""Channel scores. A scorer turns activation norms into scores with one weight a channel (paper, equation of section 3.1)."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import kernels
from ..errors import ConfigError
from .registry import Registry

if TYPE_CHECKING:
    from ..weights.experts import Experts
    from ..weights.layout import FFN

_BLOCK = 1 << 20  # activations that are squared at once: the scratch stays small


def channel_energy(h: Tensor, counted: Tensor | None = None) -> Tensor:
    """Sum of squared activations of each channel over tokens, in float32 or wider; by the compiled library where it can.

    Parameters
    ----------
    h : Tensor
        ``[..., T, D]``.
    counted : Tensor, optional
        ``[..., T]``, boolean: tokens that count; the others may hold anything.

    Returns
    -------
    Tensor
        ``[..., D]``.
    """
    library = kernels.library() if h.is_cpu else None
    if library is not None and library.energy.takes(h):
        return library.energy(h, counted)
    dtype = torch.promote_types(h.dtype, torch.float32)
    if h.device.type != "cpu":
        h = h if counted is None else h.masked_fill(~counted.unsqueeze(-1), 0)
        return torch.linalg.vector_norm(h, dim=-2, dtype=dtype).square_()
    energy = h.new_zeros((*h.shape[:-2], h.shape[-1]), dtype=dtype)
    tokens = max(1, _BLOCK * h.shape[-2] // h.numel())
    for start in range(0, h.shape[-2], tokens):
        block = h[..., start : start + tokens, :]
        squared = block.square() if block.dtype == dtype else block.to(dtype).square_()
        if counted is not None:
            squared.masked_fill_(~counted[..., start : start + tokens].unsqueeze(-1), 0)
        # a product with ones: torch's norm and sum along that axis take several times as long on a CPU
        energy += squared.new_ones(squared.shape[-2]) @ squared
    return energy


class Scorer(ABC):
    """How important a channel is, from the norm of its activations. Subclass it and register it, or pass an instance.

    The score of channel i is ``channel_weight(ffn)[i] * ||h[..., i]||_2``: in prefill the norm runs over the prompt's
    tokens, in a decode step over the step's tokens.
    """

    name: str
    fixed = False  # whether no activation changes the ranking, so that an expert without a token can be ranked too

    @abstractmethod
    def channel_weight(self, ffn: FFN | Experts) -> Tensor:
        """Weight of each channel, ``[D]`` (``[E, D]`` for experts), float32 or wider, not negative. Called once per model."""

    def prompt_activations(self, h: Tensor) -> Tensor:
        """What the norm over the prompt's tokens runs over, ``[..., D]`` like ``h``: by default the activations themselves.

        The order of the channels is that of the weights, which changes from prompt to prompt: treat all channels alike.
        """
        return h


class WandaScorer(Scorer):
    """``I_i = ||W_down[:, i]||_2 * ||h[..., i]||_2``: the paper's score (Wanda / Probe Pruning)."""

    name = "wanda"

    def channel_weight(self, ffn: FFN | Experts) -> Tensor:
        """Column norms of the down projection, ``[D]`` or ``[E, D]``."""
        return ffn.down_column_norms()


class ActivationScorer(Scorer):
    """``I_i = ||h[..., i]||_2``: the activation alone, as in GRIFFIN-like methods."""

    name = "activation"

    def channel_weight(self, ffn: FFN | Experts) -> Tensor:
        """Ones, ``[D]`` or ``[E, D]``."""
        dtype = torch.promote_types(ffn.float_dtype, torch.float32)
        return torch.ones(ffn.channel_shape, dtype=dtype, device=ffn.device)


_SCORERS: Registry[Scorer] = Registry("scorer", Scorer)  # type: ignore[type-abstract]


def register_scorer(cls: type[Scorer]) -> type[Scorer]:
    """Class decorator: make a scorer available by its ``name``.

    Raises
    ------
    ConfigError
        It is no scorer, its name is taken, or what it says of a small FFN has another shape, is NaN, infinite or negative.
    """
    if not (isinstance(cls, type) and issubclass(cls, Scorer)) or not isinstance(getattr(cls, "name", None), str):
        raise ConfigError(f"register_scorer takes a subclass of pop_mm.Scorer that has a name; got {cls!r}.")
    _SCORERS.check_free(cls)
    _probe(cls)
    _SCORERS.register(cls)
    return cls


def _probe(cls: type[Scorer]) -> None:
    """Ask a scorer about a small FFN, and about activations."""
    from ..weights.layout import FFN, Projection

    size, hidden = 8, 4
    up, down = (  # without touching the random numbers of whoever imports this
        torch.nn.utils.skip_init(torch.nn.Linear, *shape, bias=False) for shape in ((hidden, size), (size, hidden))
    )
    for module in (up, down):
        module.requires_grad_(False).weight.copy_(torch.linspace(-1, 1, size * hidden).view_as(module.weight))
    small = FFN("a small FFN", 0, (Projection("up", up, "out"),), Projection("down", down, "in"), size)
    try:
        scorer = cls()
    except TypeError as error:
        raise ConfigError(
            f"The scorer {cls.name!r} cannot be made without arguments ({error}). Register a class that can, or pass an instance "
            "to the method: Pop(scorer=...)."
        ) from error
    try:
        weight, h = scorer.channel_weight(small), torch.linspace(-1, 1, 3 * size).view(3, size)
        found = scorer.prompt_activations(h)
    except Exception:  # it looks at what only a real model has, where it is checked anyway
        return
    check_channel_weight(scorer, small, weight)
    if found.shape != h.shape or not bool(torch.isfinite(found).all()):
        raise ConfigError(
            f"The scorer {cls.name!r} made activations of shape {tuple(found.shape)} from {tuple(h.shape)}, or some that are not "
            "finite: prompt_activations gives as many finite values as it gets."
        )


def check_channel_weight(scorer: Scorer, ffn: FFN | Experts, weight: Tensor) -> None:
    """Whether a scorer's weights can rank channels.

    Raises
    ------
    ConfigError
        Another shape than ``ffn.channel_shape``, or values that are NaN, infinite or negative.
    """
    said = f"The scorer {scorer.name!r} gave {ffn.name}"
    if not isinstance(weight, Tensor) or weight.numel() != math.prod(ffn.channel_shape):
        shape = tuple(weight.shape) if isinstance(weight, Tensor) else type(weight).__name__
        raise ConfigError(f"{said} weights of shape {shape}: channel_weight returns a tensor {ffn.channel_shape}.")
    if not bool(torch.isfinite(weight).all()) or bool((weight < 0).any()):
        raise ConfigError(
            f"{said} weights that are NaN, infinite or negative: channel_weight returns finite values from 0."
        )


for _scorer in (WandaScorer, ActivationScorer):
    _SCORERS.register(_scorer)


def get_scorer(scorer: str | Scorer) -> Scorer:
    """The scorer of that name, or the instance itself."""
    return _SCORERS.get_instance(scorer)
