"""What an evaluation reads: passages that ship with pop_mm, text files, or a data set, as windows of token ids."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import PopError, one_line


class TextError(PopError):
    """A text that cannot be read, or is too short."""


@dataclass(frozen=True)
class Window:
    """Some successive tokens of a text.

    Attributes
    ----------
    name : str
        Of the text, with the number of the window from the second one on.
    ids : Tensor
        ``[tokens]``.
    """

    name: str
    ids: Tensor


def read_files(paths: Sequence[str]) -> dict[str, str]:
    """Texts of files by file name; with a number where another file has that name."""
    found: dict[str, str] = {}
    seen = set()
    for path in paths:
        file = Path(path).expanduser()
        try:
            text = file.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is no UTF-8 text"
            raise TextError(f"The text {path} cannot be read: {reason}.") from error
        if not text.strip():
            raise TextError(f"The text {path} is empty.")
        if file.resolve() not in seen:
            seen.add(file.resolve())
            names = (file.name if number == 1 else f"{file.name} ({number})" for number in count(1))
            found[next(name for name in names if name not in found)] = text.strip()
    return found


def read_dataset(name: str, split: str, column: str, subset: str | None = None) -> dict[str, str]:
    """One text: all rows of a column of a ``datasets`` data set, joined by empty lines (as is usual for WikiText)."""
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise TextError('Data sets need the library datasets: pip install "pop_mm[eval]".') from error
    try:
        if Path(name).is_file():  # JSON lines, CSV, Parquet or plain text
            suffix = Path(name).suffix.lower()
            kind = {".jsonl": "json", ".txt": "text"}.get(suffix, suffix[1:])
            rows = load_dataset(kind, data_files={split: name}, split=split)
        else:
            rows = load_dataset(name, subset, split=split)
    except Exception as error:  # of the hub, the network, or a builder
        raise TextError(f"The data set {name!r} (split {split!r}) cannot be loaded: {one_line(error)}.") from error
    if column not in rows.column_names:
        raise TextError(f"The data set {name!r} has no column {column!r}; it has {', '.join(rows.column_names)}.")
    text = "\n\n".join(row for row in rows[column] if isinstance(row, str) and row.strip())
    if not text:
        raise TextError(f"The column {column!r} of the data set {name!r} holds no text.")
    return {f"{name}:{split}": text}


def windows(texts: Mapping[str, str], tokenizer: Any, tokens: int, limit: int | None = None) -> list[Window]:
    """Cut texts into windows of ``tokens`` tokens; what is left at the end of a text is not used.

    Every window begins as the tokenizer begins a text (with ``<s>``, say); nothing is put at its end.

    Parameters
    ----------
    limit : int, optional
        Most windows, taken in turn from all texts: first the first of each.

    Raises
    ------
    TextError
        No text is long enough.
    """
    found = []
    longest = 0
    for position, (name, text) in enumerate(texts.items()):
        pieces = _pieces(name, text, tokenizer, tokens)
        longest = max([longest, *(len(piece.ids) for piece in pieces)])
        whole = [piece for piece in pieces if len(piece.ids) == tokens]
        found += [(number, position, piece) for number, piece in enumerate(whole)]
    if not found:
        raise TextError(
            f"No text has the {tokens} tokens that prompt and continuation need (the longest has {longest}). Give longer "
            "texts, or make --prompt or --continuation smaller."
        )
    return [window for _, _, window in sorted(found, key=lambda item: item[:2])][:limit]


def pieces(texts: Mapping[str, str], tokenizer: Any, tokens: int) -> list[Window]:
    """All of the texts, in pieces of at most ``tokens`` tokens, for calibration."""
    return [piece for name, text in texts.items() for piece in _pieces(name, text, tokenizer, tokens)]


def _pieces(name: str, text: str, tokenizer: Any, tokens: int) -> list[Window]:
    start, ids = _split_start(text, tokenizer)
    room = tokens - len(start)
    if room < 1:
        raise TextError(
            f"Pieces of {tokens} tokens have no room for text: the tokenizer begins each with {len(start)}."
        )
    cut = [[*start, *ids[at : at + room]] for at in range(0, len(ids), room)]
    return [
        Window(name if number == 0 else f"{name} #{number + 1}", torch.tensor(piece, dtype=torch.long))
        for number, piece in enumerate(cut)
        if len(piece) > len(start) + 1
    ]


def _split_start(text: str, tokenizer: Any) -> tuple[list[int], list[int]]:
    """What the tokenizer puts before every text, and the text's own tokens."""
    own = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    whole = list(tokenizer(text, verbose=False)["input_ids"])
    places = range(len(whole) - len(own) + 1)
    at = next((at for at in places if whole[at : at + len(own)] == own), 0)
    return whole[:at], own


def digest(window: Window) -> str:
    """A short hash of a window's tokens."""
    return hashlib.sha256(window.ids.numpy().tobytes()).hexdigest()[:16]


__all__ = ["TextError", "Window", "digest", "pieces", "read_dataset", "read_files", "windows"]
