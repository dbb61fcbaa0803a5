"""How far a pruned model is from the dense one, on text: loss, KL divergence, agreement, and where greedy outputs part.

A text gives ``prompt + n + 1`` tokens. All but the last go through the model in one forward: the prompt's columns are
prefill, each of the ``n`` later ones is a decode step of its own (teacher forcing). Exactly these steps are scored. The
prompt's last column predicts a token too, but with a dense prefill it is dense in every method: it would only dilute the
figures, so it is left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from ..session.session import Session
from ..settings.config import PopConfig


@dataclass(frozen=True)
class Score:
    """Means over the decode steps of one text.

    Attributes
    ----------
    loss : float
        Of the text's tokens, nats a token.
    kl : float
        KL divergence of the pruned model's predictions from the dense model's, nats a token.
    agreement : float
        Share of steps at which both think the same token most likely.
    """

    loss: float
    kl: float
    agreement: float


@torch.inference_mode()
def step_logits(model: Any, ids: Tensor, prompt: int) -> Tensor:
    """Logits of the scored columns, ``[B, n, V]``; ``ids`` is ``[B, prompt + n + 1]``. In a session they are pruned ones."""
    count = ids.shape[1] - 1 - prompt
    keep = {"logits_to_keep": count} if "logits_to_keep" in signature(model.forward).parameters else {}
    logits: Tensor = model(input_ids=ids[:, :-1], use_cache=False, **keep).logits
    return logits[:, -count:]


def pruned_step_logits(model: Any, ids: Tensor, prompt: int, config: PopConfig) -> tuple[Tensor, Session]:
    """:func:`step_logits` of a pruned model, and the session that it ran in, for its report."""
    session = Session(model, config)
    with session, session.split(prompt):
        return step_logits(model, ids, prompt), session


def compare(dense: Tensor, pruned: Tensor, targets: Tensor) -> Score:
    """Score pruned logits ``[n, V]`` against dense ones; ``targets`` ``[n]`` are the text's next tokens."""
    if dense.device.type == "mps":  # has no float64
        dense, pruned, targets = dense.cpu(), pruned.cpu(), targets.cpu()
    p, q = dense.double().log_softmax(-1), pruned.double().log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1).mean()
    agreement = (dense.argmax(-1) == pruned.argmax(-1)).double().mean()
    loss = -q.gather(-1, targets.unsqueeze(-1)).mean()
    return Score(float(loss), float(kl), float(agreement))


def score_texts(
    model: Any, ids: Tensor, prompt: int, config: PopConfig | None, dense_logits: Tensor | None = None
) -> list[Score]:
    """Scores of a batch of texts.

    Parameters
    ----------
    ids : Tensor
        ``[B, prompt + n + 1]``, without padding.
    prompt : int
        Tokens of each text that are its prompt.
    config : PopConfig or None
        None scores the dense model.
    dense_logits : Tensor, optional
        ``[B, n, V]``: :func:`step_logits` of the dense model, if they are known.
    """
    dense = step_logits(model, ids, prompt) if dense_logits is None else dense_logits
    pruned = dense if config is None else pruned_step_logits(model, ids, prompt, config)[0]
    return compare_rows(dense, pruned, ids, prompt)


def compare_rows(dense: Tensor, pruned: Tensor, ids: Tensor, prompt: int) -> list[Score]:
    """:func:`compare` for each row."""
    targets = ids[:, prompt + 1 :].to(dense.device)
    return [compare(*row) for row in zip(dense, pruned, targets, strict=True)]


@torch.inference_mode()
def greedy(model: Any, ids: Tensor, prompt: int, tokens: int) -> Tensor:
    """``[B, tokens]``: what the model makes of each prompt, greedily and without an end. In a session it is pruned."""
    found: Tensor = model.generate(
        input_ids=ids[:, :prompt],
        attention_mask=torch.ones_like(ids[:, :prompt]),
        do_sample=False,
        num_beams=1,
        min_new_tokens=tokens,
        max_new_tokens=tokens,
    )
    return found[:, prompt:]


def first_differences(
    model: Any, ids: Tensor, prompt: int, config: PopConfig | None, tokens: int, dense: Tensor | None = None
) -> list[int]:
    """How many leading tokens of the greedy outputs are the same, dense and pruned, for each row; at most ``tokens``.

    Parameters
    ----------
    dense : Tensor, optional
        ``[B, tokens]``: :func:`greedy` of the dense model, if it is known.
    """
    expected = greedy(model, ids, prompt, tokens) if dense is None else dense
    if config is None:
        return [tokens] * len(ids)
    with Session(model, config):
        return same_tokens(greedy(model, ids, prompt, tokens), expected)


def same_tokens(found: Tensor, expected: Tensor) -> list[int]:
    """How many leading tokens are the same in each row of ``[B, tokens]``."""
    counts: list[int] = (found == expected).long().cumprod(-1).sum(-1).tolist()
    return counts


__all__ = ["Score", "compare", "first_differences", "greedy", "same_tokens", "score_texts", "step_logits"]
