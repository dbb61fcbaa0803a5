"""What both backends need."""

from __future__ import annotations

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
