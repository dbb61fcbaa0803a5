"""What the soak sends: prompts of every kind, some of them abandoned half-way, and a few caches kept for a while."""

from __future__ import annotations

import contextlib
import random
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.generation import StoppingCriteria
from transformers.generation.streamers import BaseStreamer

KINDS = {"alone": 4, "batch": 3, "second turn": 2, "later turn": 2, "static": 2, "sampled": 2}  # and how often
LENGTHS = (4, 400)
NEW_TOKENS = (2, 8)
LONGEST = 1200  # tokens of a conversation
KEPT = 4  # conversations at a time


class Abandoned(Exception):
    """What a user's own code raises in the middle of a generation."""


class RaisingStreamer(BaseStreamer):  # type: ignore[misc]
    """Raises when the given number of tokens has come; the prompt comes first, as one piece."""

    def __init__(self, tokens: int) -> None:
        self._left = tokens + 1

    def put(self, value: Tensor) -> None:
        """Take a piece."""
        self._left -= 1
        if self._left <= 0:
            raise Abandoned

    def end(self) -> None:
        """Nothing is left to do."""


class RaisingCriterion(StoppingCriteria):  # type: ignore[misc]
    """Raises when the given number of tokens has come."""

    def __init__(self, tokens: int) -> None:
        self._left = tokens

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        """Count a step."""
        self._left -= 1
        if self._left <= 0:
            raise Abandoned
        return torch.zeros(len(input_ids), dtype=torch.bool)


class Conversation(NamedTuple):
    """All tokens so far, ``[B, L]``, which of them count, and the cache."""

    ids: Tensor
    mask: Tensor
    cache: DynamicCache


class Traffic:
    """Sends prompts to a model, and keeps a few caches for a while."""

    def __init__(self, model: Any, seed: int = 0) -> None:
        self._model = model
        self._random = random.Random(seed)
        self._generator = torch.Generator().manual_seed(seed)
        self._vocabulary = model.config.get_text_config().vocab_size
        self.kept: list[Conversation] = []
        self.sent: Counter[str] = Counter()

    def send(self, kind: str, abandoned: bool = False, longest: bool = False) -> None:
        """One prompt of a kind, or a turn; ``longest`` takes the most tokens and rows that can come."""
        self.sent[kind] += 1
        self.sent["abandoned"] += abandoned
        several = kind == "batch" or (kind in ("static", "second turn") and self._random.random() < 0.5)
        rows = 1 if not several else 4 if longest else self._random.randint(2, 4)
        lengths = [LENGTHS[1] if longest else self._random.randint(*LENGTHS) for _ in range(rows)]
        new_tokens = NEW_TOKENS[1] if longest else self._random.randint(*NEW_TOKENS)
        with contextlib.suppress(Abandoned):
            if kind in ("static", "sampled"):
                ids, mask = self._draw(lengths)
                own = {"cache_implementation": "static"} if kind == "static" else {"do_sample": True, "top_k": 20}
                self._generate(ids, mask, new_tokens, abandoned, **own)
                return
            talk = self._kept_one() if kind == "later turn" else None
            if talk is None:
                talk = self._turn(None, lengths, new_tokens, abandoned and kind != "second turn")
            if kind in ("second turn", "later turn"):
                talk = self._turn(talk, lengths[:1] * len(talk.ids), new_tokens, abandoned)
            if self._random.random() < 0.3:
                self.kept = [*self.kept, talk][-KEPT:]

    def send_any(self, abandoned: bool) -> None:
        """A prompt of a random kind."""
        self.send(self._random.choices(list(KINDS), list(KINDS.values()))[0], abandoned)

    def _kept_one(self) -> Conversation | None:
        return self.kept.pop(self._random.randrange(len(self.kept))) if self.kept else None

    def _turn(
        self, before: Conversation | None, lengths: Sequence[int], new_tokens: int, abandoned: bool
    ) -> Conversation:
        ids, mask = self._draw(lengths)
        if before is not None:
            room = max(LONGEST - before.ids.shape[1], 1)
            ids = torch.cat([before.ids, ids[:, :room]], 1)
            mask = torch.cat([before.mask, mask[:, :room]], 1)
        cache = DynamicCache(config=self._model.config.get_text_config()) if before is None else before.cache
        out = self._generate(ids, mask, new_tokens, abandoned, past_key_values=cache)
        return Conversation(out, torch.cat([mask, torch.ones_like(out[:, ids.shape[1] :])], 1), cache)

    def _draw(self, lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Random tokens, padded on the left, and their mask."""
        shape = len(lengths), max(lengths)
        ids = torch.randint(3, self._vocabulary, shape, generator=self._generator)
        mask = (torch.arange(shape[1]) >= shape[1] - torch.tensor(lengths).unsqueeze(1)).long()
        return ids * mask, mask

    def _generate(self, ids: Tensor, mask: Tensor, new_tokens: int, abandoned: bool, **own: Any) -> Tensor:
        if abandoned and len(ids) == 1 and self._random.random() < 0.5:
            own["streamer"] = RaisingStreamer(new_tokens // 2)
        elif abandoned:
            own["stopping_criteria"] = [RaisingCriterion(max(new_tokens // 2, 1))]
        return generate(self._model, ids, mask, new_tokens, **own)


def generate(model: Any, ids: Tensor, mask: Tensor, new_tokens: int, **own: Any) -> Tensor:
    """Greedy unless ``own`` says otherwise; always the full length."""
    settings: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "min_new_tokens": new_tokens, **own}
    return model.generate(ids, attention_mask=mask, max_new_tokens=new_tokens, **settings)
