"""What a model can be given: token ids that its embedding has, and positions within its context."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .errors import PopError

if TYPE_CHECKING:
    from torch import Tensor

# Ids that may lie beyond the embedding, since the model replaces them before it looks them up.
_MEDIA = ("image", "video", "audio", "vision")


class TokenError(PopError, ValueError):
    """Model and tokenizer do not fit: a token id that the embedding has no row for."""


@dataclass(frozen=True)
class Context:
    """The longest sequence that a model is made for.

    Attributes
    ----------
    tokens : int
    fixed : bool
        Whether the model holds a table of positions, so that a longer sequence cannot run. Otherwise (rotary positions, or
        none) it runs, and quality is lost.
    """

    tokens: int
    fixed: bool


def context_of(model: Any) -> Context | None:
    """The context of a model, rope scaling included; None if its config names none. Weights are not needed."""
    config = model.config.get_text_config()
    tokens = getattr(config, "max_position_embeddings", None)
    if not isinstance(tokens, int) or tokens < 1:
        return None
    rope = getattr(config, "rope_parameters", None)
    if isinstance(rope, Mapping) and rope:
        return Context(max(tokens, *_scaled(rope, tokens)), fixed=False)
    tables = (rows for rows in _table_rows(model) if tokens <= rows <= tokens + 2)  # OPT has two rows more
    return Context(tokens, fixed=any(True for _ in tables))


def _scaled(rope: Mapping[str, Any], tokens: int) -> Iterator[int]:
    """Contexts that the rope parameters (of the model, or of each of its layer types) say by themselves."""
    yield 0
    by_layer = [value for value in rope.values() if isinstance(value, Mapping)]
    for parameters in by_layer or [rope]:
        original, factor = parameters.get("original_max_position_embeddings"), parameters.get("factor")
        if original is None and not by_layer and parameters.get("rope_type") in ("linear", "dynamic"):
            original = tokens
        if original and factor:
            yield int(original * factor)


def _table_rows(model: Any) -> Iterator[int]:
    """Rows of the decoder's embeddings besides that of the tokens, and of its matrices that are no parameters."""
    from torch import nn

    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    words = model.get_input_embeddings()
    for module in (decoder or model).modules():
        if isinstance(module, nn.Embedding) and module is not words:
            yield module.num_embeddings
        yield from (len(buffer) for buffer in module.buffers(recurse=False) if buffer.dim() == 2)


def check_tokens(model: Any, ids: Tensor, tokenizer: Any = None, where: str = "") -> None:
    """Refuse token ids that the model's embedding has no row for.

    Parameters
    ----------
    model : PreTrainedModel
    ids : Tensor
        Of any shape. Ids that stand for images, video or audio are the model's own affair.
    tokenizer : PreTrainedTokenizerBase, optional
        Names the token in the message.
    where : str
        A sentence that the message begins with: what cannot be done because of it.

    Raises
    ------
    TokenError
    """
    rows = _embedding_rows(model)
    if rows is None:
        return
    wrong = ids[(ids < 0) | (ids >= rows)].tolist()
    media = _media_ids(model.config) if wrong else set()
    first = next((token for token in wrong if token not in media), None)
    if first is None:
        return
    name = "" if tokenizer is None or first < 0 else f" ({tokenizer.convert_ids_to_tokens(first)!r})"
    raise TokenError(
        f"{where}{' ' if where else ''}The tokenizer gives token id {first}{name}, but the model's embedding has {rows} rows "
        f"(ids 0 to {rows - 1}). Take the tokenizer that belongs to the model, or give the model more rows "
        "(model.resize_token_embeddings(len(tokenizer)), train them, save both)."
    )


def _embedding_rows(model: Any) -> int | None:
    try:
        embedding = model.get_input_embeddings()
    except NotImplementedError:
        return None
    rows = getattr(embedding, "num_embeddings", None)
    return rows if isinstance(rows, int) else None


def _media_ids(config: Any) -> set[int]:
    found: set[int] = set()
    for key, value in config.to_dict().items():
        if key.endswith(("token_id", "token_ids", "token_index")) and any(kind in key for kind in _MEDIA):
            found.update(value if isinstance(value, list) else [value])
    return found


__all__ = ["Context", "TokenError", "check_tokens", "context_of"]
