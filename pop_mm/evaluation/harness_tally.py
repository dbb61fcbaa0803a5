"""What a harness run did with the requests of a task: how many tokens its figures rest on, and how many were pruned."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any

from ..errors import ConfigError
from ..session.session import Session
from ..settings.config import PopConfig
from ..settings.keywords import flat, nested

MODES = ("decode", "prefill")


def config_from(settings: Mapping[str, Any], file: str | None) -> PopConfig:
    """The config of a settings file and of single settings, which win. Rows of a batch are pruned each by itself unless asked.

    Raises
    ------
    ConfigError
        A setting that is wrong.
    """
    stored = {} if file is None else flat(PopConfig.load(file).changes())
    if "ratio" in settings or "budget" in settings:
        stored = {name: value for name, value in stored.items() if name not in ("ratio", "budget", "method")}
    return PopConfig.from_dict(nested({"batch": "per_sequence", **stored, **settings}))


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

    def warning(self, task: str, remedy: str = ": use prefill=partition") -> str | None:
        """What to say of a task that hardly shows what pruning does."""
        for share, what in ((self.pruned_token_share, "scored"), (self.pruned_generated_share, "generated")):
            if share is not None and share < 0.5:
                return (
                    f"{task}: only {share:.0%} of the {what} tokens came from a pruned step, so its figures say little about "
                    "pruning. With a dense prefill the first token of an answer is never pruned, and answers of one "
                    f"token not at all{remedy}."
                )
        return None

    def __add__(self, other: Tally) -> Tally:
        return Tally(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, shares included."""
        shares = {"pruned_token_share": self.pruned_token_share, "pruned_generated_share": self.pruned_generated_share}
        return {**vars(self), **shares}


class Counting:
    """What the models of both harnesses keep: their settings, whether they prune just now, and what was counted.

    Attributes
    ----------
    pop_config : PopConfig
    mode : {"decode", "prefill"}
        How continuations are scored.
    prunes : bool
        Whether the settings leave anything out.
    tallies : dict of str to Tally
        By task, of what was not dense.
    """

    pop_config: PopConfig
    mode: str
    prunes: bool
    tallies: dict[str, Tally]

    def _start_counting(self, config: PopConfig, loglikelihood: str) -> None:
        if loglikelihood not in MODES:
            raise ConfigError(f"loglikelihood must be one of {', '.join(map(repr, MODES))}; got {loglikelihood!r}.")
        if config.chosen_method == "thresholds" and loglikelihood == "prefill":
            raise ConfigError(
                "loglikelihood='prefill' scores a prompt that is completed on the channels that POP retains, and thresholds "
                "leave the prefill dense. Take loglikelihood='decode', or ratio=0.2."
            )
        self.pop_config, self.mode, self.tallies, self._dense = config, loglikelihood, {}, False

    @contextmanager
    def dense(self) -> Iterator[None]:
        """Within: no pruning, and nothing is counted."""
        self._dense = True
        try:
            yield
        finally:
            self._dense = False

    def _count_scored(self, task: str | None, tokens: int, prefill: bool) -> None:
        if not self._dense:
            self._tally(task).add_scored(tokens, prefill, self._pruned(tokens, prefill))

    def _count_generated(self, task: str | None, tokens: int) -> None:
        if not self._dense:
            self._tally(task).add_generated(tokens, self._pruned(tokens, False))

    def _tally(self, task: str | None) -> Tally:
        return self.tallies.setdefault(task or "unnamed", Tally())

    def _pruned(self, tokens: int, prefill: bool) -> int:
        """How many tokens of an answer have logits of pruned steps: not the first, if those are the dense prefill's."""
        if prefill and self._thresholds:
            return 0
        dense = self.pop_config.chosen.prefill == "dense" and not prefill
        return max(tokens - dense, 0) if self.prunes else 0

    def _warnings(self) -> dict[str, str]:
        """Task -> what to say of one that hardly shows what pruning does."""
        if not self.prunes or self._dense:
            return {}
        remedy = ", nor texts without a context" if self._thresholds else ": use prefill=partition"
        return {task: warning for task, tally in self.tallies.items() if (warning := tally.warning(task, remedy))}

    @property
    def _thresholds(self) -> bool:
        return self.pop_config.chosen_method == "thresholds"

    def _prefill_session(self, model: Any) -> Session:
        """Scores what is one prefill: as the paper does, on R and C; thresholds leave it dense."""
        config = self.pop_config
        if not self._thresholds:
            config = replace(config, method=config.channel_method.replace(prefill="partition"))
        return Session(model, config)

    def pop_info(self) -> dict[str, Any]:
        """Settings, what was counted (in all and by task), and warnings."""
        return {
            "config": self.pop_config.to_dict(),
            "loglikelihood": self.mode,
            **sum(self.tallies.values(), Tally()).to_dict(),
            "tasks": {task: tally.to_dict() for task, tally in self.tallies.items()},
            "warnings": list(self._warnings().values()),
        }
