"""What an evaluation reads: passages that ship with pop_mm, text files, or a data set, as windows of token ids."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import PopError
from ..passages import load_passages


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
    """Texts of files by file name."""
    found: dict[str, str] = {}
    for path in paths:
        file = Path(path).expanduser()
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is no UTF-8 text"
            raise TextError(f"The text {path} cannot be read: {reason}.") from error
        if not text.strip():
            raise TextError(f"The text {path} is empty.")
        found[file.name if file.name not in found else str(file)] = text.strip()
    return found


def read_dataset(name: str, split: str, column: str, subset: str | None = None) -> dict[str, str]:
    """One text: all rows of a column of a ``datasets`` data set, joined by empty lines (as is usual for WikiText)."""
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise TextError('Data sets need the library datasets: pip install "pop_mm[eval]".') from error
    try:
        if Path(name).is_file():  # JSON lines, CSV, Parquet or plain text
            kind = {".jsonl": "json", ".txt": "text"}.get(Path(name).suffix, Path(name).suffix[1:])
            rows = load_dataset(kind, data_files={split: name}, split=split)
        else:
            rows = load_dataset(name, subset, split=split)
    except Exception as error:  # of the hub, the network, or a builder
        reason = " ".join((str(error) or type(error).__name__).split()).rstrip(".")
        raise TextError(f"The data set {name!r} (split {split!r}) cannot be loaded: {reason}.") from error
    if column not in rows.column_names:
        raise TextError(f"The data set {name!r} has no column {column!r}; it has {', '.join(rows.column_names)}.")
    text = "\n\n".join(row for row in rows[column] if isinstance(row, str) and row.strip())
    if not text:
        raise TextError(f"The column {column!r} of the data set {name!r} holds no text.")
    return {f"{name}:{split}": text}


def windows(texts: Mapping[str, str], tokenizer: Any, tokens: int, limit: int | None = None) -> list[Window]:
    """Cut texts into windows of ``tokens`` tokens; what is left at the end of a text is not used.

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
    for position, (name, ids) in enumerate(tokenized(texts, tokenizer).items()):
        longest = max(longest, len(ids))
        for number in range(len(ids) // tokens):
            title = name if number == 0 else f"{name} #{number + 1}"
            found.append((number, position, Window(title, ids[number * tokens : (number + 1) * tokens])))
    if not found:
        raise TextError(
            f"No text has the {tokens} tokens that prompt and continuation need (the longest has {longest}). Give longer "
            "texts, or make --prompt or --continuation smaller."
        )
    return [window for _, _, window in sorted(found, key=lambda item: item[:2])][:limit]


def rests(texts: Mapping[str, str], tokenizer: Any, tokens: int) -> list[Window]:
    """What follows the windows of each text, for calibration: text that is not scored."""
    found = tokenized(texts, tokenizer).items()
    return [Window(name, rest) for name, ids in found if len(rest := ids[len(ids) // tokens * tokens :]) > 1]


def tokenized(texts: Mapping[str, str], tokenizer: Any) -> dict[str, Tensor]:
    """Token ids of each text, ``[T]``."""
    return {
        name: torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.long)
        for name, text in texts.items()
    }


def passages() -> dict[str, str]:
    """The passages that ship with pop_mm."""
    return load_passages()


def digest(window: Window) -> str:
    """A short hash of a window's tokens."""
    return hashlib.sha256(window.ids.numpy().tobytes()).hexdigest()[:16]


__all__ = ["TextError", "Window", "digest", "passages", "read_dataset", "read_files", "rests", "windows"]
