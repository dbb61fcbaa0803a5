"""ExpertPolicy: what the experts of a mixture need beside the method."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from ..checks import check_choice, is_whole
from ..errors import ConfigError


@dataclass(frozen=True)
class ExpertPolicy:
    """How experts are pruned; ``experts=`` of :class:`~pop_mm.PopConfig`. Thresholds take ``prune_shared`` alone.

    Parameters
    ----------
    min_tokens : int
        Tokens that a routed expert must have seen before it is partitioned.
    unseen : {"dense", "weights"}
        What happens to an expert that the prompt sent fewer tokens: it runs ``dense`` until it has seen enough of them
        while decoding, or it is partitioned at once by the norms of its ``weights``.
    score : {"plain", "routed"}
        Whether a token's activations count in an expert's scores as they are, or times the router's weight.
    prune_shared : bool
        Whether shared experts, which see every token, are pruned like dense FFNs.

    Raises
    ------
    ConfigError
        A value of the wrong type, out of range, or unknown.
    """

    min_tokens: int = 1
    unseen: Literal["dense", "weights"] = "dense"
    score: Literal["plain", "routed"] = "plain"
    prune_shared: bool = True

    def __post_init__(self) -> None:
        if not is_whole(self.min_tokens) or self.min_tokens < 1:
            raise ConfigError(f"min_tokens must be a positive integer; got {self.min_tokens!r}.")
        check_choice("unseen", self.unseen, ("dense", "weights"))
        check_choice("score", self.score, ("plain", "routed"))
        if not isinstance(self.prune_shared, bool):
            raise ConfigError(f"prune_shared must be true or false; got {self.prune_shared!r}.")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as :meth:`from_dict` takes them."""
        return asdict(self)

    def changes(self) -> dict[str, Any]:
        """Plain values of what differs from the defaults."""
        return {f.name: value for f in fields(self) if (value := getattr(self, f.name)) != f.default}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ExpertPolicy:
        """A policy from plain values; unknown keys are an error."""
        known = [f.name for f in fields(cls)]
        if unknown := [name for name in values if name not in known]:
            raise ConfigError(f"Unknown setting {unknown[0]!r} of experts; known: {', '.join(known)}.")
        return cls(**values)


def check_policy(value: object) -> None:
    """Raise ``ConfigError`` unless a value is a policy."""
    if not isinstance(value, ExpertPolicy):
        raise ConfigError(f"experts must be a pop_mm.ExpertPolicy; got {value!r}.")


__all__ = ["ExpertPolicy", "check_policy"]
