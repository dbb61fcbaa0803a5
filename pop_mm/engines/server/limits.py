"""What one request may cost, and how many may wait."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Limits of a server.

    Attributes
    ----------
    max_new_tokens : int
        Longest answer that a request may ask for, and the length of those that do not say.
    waiting : int
        Requests that may wait behind the one that is answered.
    body_bytes : int
        Of one request.
    body_seconds : float
        Until a request's body must be there.
    pixels : int
        Of all images of a request together.
    """

    max_new_tokens: int = 1024
    waiting: int = 64
    body_bytes: int = 32 * 2**20
    body_seconds: float = 60
    pixels: int = 2**25


__all__ = ["Limits"]
