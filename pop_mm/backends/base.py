"""What both backends need."""

from __future__ import annotations

from typing import cast

from torch import Tensor

from ..engine import Engine
from ..errors import PhaseError
from ..experts import Experts
from ..layout import FFN
from ..phase import Forward, PhaseTracker


def current_forward(tracker: PhaseTracker, ffn: FFN | Experts) -> Forward:
    """The forward that this FFN runs in. An FFN that was called past the model cannot be attributed."""
    forward = tracker.current
    if forward is None:
        raise PhaseError(
            f"{ffn.name} ran outside a forward of the pruned model (a part of the model was called directly), so it is unknown "
            "whether this is prefill or decode. Call the model that was given to prune(), or leave the session first."
        )
    return forward


def apply(engine: Engine, index: int, forward: Forward, h: Tensor, positions: Tensor | None) -> Tensor:
    """:meth:`Engine.apply` for the input of a dense FFN's down projection, ``[B, q, D]`` or ``[B * q, D]``."""
    return engine.apply(index, forward, engine.step(forward, h.device), h.reshape(-1, h.shape[-1]), positions).view(
        h.shape
    )


def dense_ffn(engine: Engine, index: int) -> FFN:
    """Number ``index`` of the FFNs, which is not a set of experts."""
    return cast(FFN, engine.ffns[index])


def voices(forward: Forward) -> Tensor | None:
    """Which sequences of a step of one token each have a say in a choice that they share, ``[B]``; None for all, or one alone."""
    return None if forward.valid is None or forward.rows == 1 else forward.valid[:, 0]
