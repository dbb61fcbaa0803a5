"""How long the forwards of a session took."""

from __future__ import annotations

from dataclasses import dataclass

from ..tracking.phase import Forward, Phase


@dataclass
class Timings:
    """Counts and host seconds of a session's forwards (on a GPU, the host's share only).

    Attributes
    ----------
    prefill, decode : float
        Seconds in forwards of each phase; scoring in one forward counts as prefill.
    partitioning, moving : float
        Seconds spent making partitions and moving channels before the first decode step of each prompt; not in ``decode``.
        Only an expert's channels move later, when a step first needs it, and that is in ``decode`` too. With
        ``prefill="partition"`` both happen within the prefill, and partitioning is counted as that alone.
    masked_forwards : int
        Decode forwards that ran masked though FFNs are in place: another prompt's order was resident. With a partition for
        each row: those that its kernels do not take.
    """

    prefill: float = 0.0
    decode: float = 0.0
    partitioning: float = 0.0
    moving: float = 0.0
    prefill_forwards: int = 0
    decode_forwards: int = 0
    masked_forwards: int = 0

    def add(self, forward: Forward, seconds: float, masked: bool) -> None:
        """Count one forward."""
        if forward.phase is Phase.DECODE:
            self.decode += seconds
            self.decode_forwards += 1
            self.masked_forwards += masked
        else:
            self.prefill += seconds
            self.prefill_forwards += 1

    def seconds(self) -> dict[str, float]:
        """Seconds by what they were spent on, as reports have them."""
        return {name: getattr(self, name) for name in ("prefill", "decode", "partitioning", "moving")}


__all__ = ["Timings"]
