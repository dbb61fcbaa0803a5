"""What a harness run did with the requests of a task: how many tokens its figures rest on, and how many were pruned."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any


@dataclass
class Tally:
    """Requests (of rolling tasks: windows) and tokens of one task. A pruned token is one whose logits came from pruned FFNs.

    Generated tokens are those of the answers as the task gets them, cut at its stop sequences.
    """

    decode_requests: int = 0
    prefill_requests: int = 0
    scored_tokens: int = 0
    pruned_scored_tokens: int = 0
    generated_tokens: int = 0
    pruned_generated_tokens: int = 0

    def add_scored(self, tokens: int, prefill: bool, pruned: int) -> None:
        """Count one scored request."""
        self.prefill_requests += prefill
        self.decode_requests += not prefill
        self.scored_tokens += tokens
        self.pruned_scored_tokens += pruned

    def add_generated(self, tokens: int, pruned: int) -> None:
        """Count one generated answer."""
        self.generated_tokens += tokens
        self.pruned_generated_tokens += pruned

    @property
    def pruned_token_share(self) -> float | None:
        """Of the scored tokens; None without any."""
        return self.pruned_scored_tokens / self.scored_tokens if self.scored_tokens else None

    @property
    def pruned_generated_share(self) -> float | None:
        """Of the generated tokens; None without any."""
        return self.pruned_generated_tokens / self.generated_tokens if self.generated_tokens else None

    def warning(self, task: str) -> str | None:
        """What to say of a task that hardly shows what pruning does."""
        for share, what in ((self.pruned_token_share, "scored"), (self.pruned_generated_share, "generated")):
            if share is not None and share < 0.5:
                return (
                    f"{task}: only {share:.0%} of the {what} tokens came from a pruned step, so its figures say little about "
                    "pruning. With a dense prefill the first token of an answer is never pruned, and answers of one "
                    "token not at all: use prefill=partition."
                )
        return None

    def __add__(self, other: Tally) -> Tally:
        return Tally(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, shares included."""
        shares = {"pruned_token_share": self.pruned_token_share, "pruned_generated_share": self.pruned_generated_share}
        return {**vars(self), **shares}
