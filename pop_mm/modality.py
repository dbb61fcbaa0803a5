"""Which modality each position of a prompt is. Statistics are kept for each, so that one can see and choose what counts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

MODALITIES = ("text", "image", "video")  # in the order of transformers' mm_token_type_ids
TEXT = 0


@dataclass(frozen=True)
class Positions:
    """The modality of every position of one forward.

    Attributes
    ----------
    modality : Tensor
        ``[B, q]``, uint8: index into :data:`MODALITIES`.
    present : tuple of int
        Those that occur.
    """

    modality: Tensor
    present: tuple[int, ...]


def positions_of(inputs: Mapping[str, Any], token_ids: Mapping[str, int], past: int) -> Positions | None:
    """Read the modalities from the inputs of a forward.

    Processors of several families mark every position (``mm_token_type_ids``); elsewhere the ids of the placeholders tell,
    and where there are no ids, ``token_type_ids``. Embeddings without such marks cannot be told apart and count as text.

    Parameters
    ----------
    inputs : mapping
        Arguments of the model's forward.
    token_ids : mapping of str to int
        Modality -> token id of its positions, as the adapter names them.
    past : int
        Tokens that the cache holds: marks may be those of the whole prompt.

    Returns
    -------
    Positions or None
        None if all is text.
    """
    if not token_ids:
        return None
    ids = inputs.get("input_ids")
    source = ids if ids is not None else inputs["inputs_embeds"]
    rows, length = source.shape[:2]
    modality = _from_marks(inputs.get("mm_token_type_ids"), rows, length, past)
    if modality is None and ids is not None:
        modality = torch.zeros(rows, length, dtype=torch.uint8, device=ids.device)
        for name, token in token_ids.items():
            modality.masked_fill_(ids == token, MODALITIES.index(name))
    if modality is None:  # not before the ids: PaliGemma marks prefix and suffix by them, not images
        modality = _from_marks(inputs.get("token_type_ids"), rows, length, past)
    if modality is None:
        return None
    present = tuple(modality.unique().tolist())  # one look for all FFNs
    return None if present == (TEXT,) else Positions(modality, present)


def _from_marks(marks: Any, rows: int, length: int, past: int) -> Tensor | None:
    if not isinstance(marks, Tensor) or marks.dim() != 2 or marks.shape[0] != rows:
        return None
    if marks.shape[1] != length:
        if marks.shape[1] < past + length:
            return None
        marks = marks[:, past : past + length]
    return marks.where(marks < len(MODALITIES), TEXT).to(torch.uint8)  # sounds count as text


def added(by_modality: Mapping[int, Tensor], modality: int, value: Tensor) -> dict[int, Tensor]:
    """The sums of each modality with ``value`` added to one of them, where that is."""
    before = by_modality.get(modality)
    return {**by_modality, modality: value if before is None else before + value.to(before.device)}


def by_name(tokens_of: Mapping[int, Tensor]) -> dict[str, int]:
    """Name of each modality that a prompt has -> its tokens, over all sequences."""
    return {MODALITIES[m]: count for m, tokens in tokens_of.items() if (count := int(tokens.sum()))}


def weighted_sum(by_modality: Mapping[int, Tensor], weights: Mapping[str, float]) -> Tensor | None:
    """Sum over modalities, each times its weight (1 if it has none); None if there is nothing."""
    total = None
    for modality, value in by_modality.items():
        weight = weights.get(MODALITIES[modality], 1.0)
        part = value if weight == 1 else value * weight
        total = part if total is None else total + part.to(total.device)
    return total
