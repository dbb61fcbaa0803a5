"""What an evaluation reads: passages that ship with pop_mm, text files, or a data set, as windows of token ids."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import inputs
from ..errors import PopError, one_line
from ..settings.config import unique_keys


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
        text = _read(f"The text {path}", path)
        if not text.strip():
            raise TextError(f"The text {path} is empty.")
        file = Path(path).expanduser()
        if file.resolve() not in seen:
            seen.add(file.resolve())
            names = (file.name if number == 1 else f"{file.name} ({number})" for number in count(1))
            found[next(name for name in names if name not in found)] = text.strip()
    return found


def _read(what: str, path: str) -> str:
    try:
        return Path(path).expanduser().read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise TextError(f"{what} cannot be read: it is no UTF-8 text.") from error
    except (OSError, ValueError, RuntimeError) as error:  # a null byte, an unknown ~user
        raise TextError(f"{what} cannot be read: {getattr(error, 'strerror', None) or one_line(error)}.") from error


@dataclass(frozen=True)
class Chats:
    """A data set's column of chats, which become text with a tokenizer's chat template.

    Attributes
    ----------
    name : str
        Of the column and the data set, for messages.
    rows : sequence
        Lists of messages; a row that is empty or None is left out.
    """

    name: str
    rows: Sequence[Any]

    def render(self, tokenizer: Any) -> str:
        """All chats as text, joined by empty lines, without the start token that the tokenizer puts before a text.

        Raises
        ------
        TextError
            No chat template, a row that is no list of messages, parts of a message that are no text, or a template that
            refuses a chat.
        """
        if not getattr(tokenizer, "chat_template", None):
            raise TextError(
                f"{self.name} holds chats, and the model's tokenizer has no chat template to make text of them. Take a model "
                "with a template (an instruct model), or a column of text."
            )
        texts = [self._render(number, row, tokenizer) for number, row in enumerate(self.rows, start=1) if row]
        return "\n\n".join(texts).removeprefix(getattr(tokenizer, "bos_token", None) or "").strip()

    def _render(self, number: int, row: Any, tokenizer: Any) -> str:
        where = f"Row {number} of {self.name[0].lower()}{self.name[1:]}"
        messages = [_message(where, message) for message in row]
        try:
            return tokenizer.apply_chat_template(messages, tokenize=False)
        except Exception as error:  # a template raises whatever it stumbles over
            raise TextError(f"{where} does not fit the tokenizer's chat template: {one_line(error)}.") from error


def _message(where: str, message: Any) -> dict[str, Any]:
    """A message with its content as one string, without the empty fields that a table of messages has."""
    if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
        found = ", ".join(map(str, message)) if isinstance(message, Mapping) else type(message).__name__
        raise TextError(f"{where} is no chat: a message has a role and content; found {found}. Rename or convert them.")
    content = message["content"]
    texts: list[str] = []
    for part in content if isinstance(content, list) else [] if content is None else [content]:
        text = part.get("text") if isinstance(part, Mapping) else part
        if not isinstance(text, str):
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise TextError(
                f"{where} has a part of type {kind!r} in a message, and text alone is scored. Leave such rows out."
            )
        texts.append(text)
    return {**{key: value for key, value in message.items() if value is not None}, "content": "\n".join(texts)}


def read_dataset(name: str, split: str, column: str, subset: str | None = None) -> dict[str, str | Chats]:
    """One text: all rows of a data set's column, joined by empty lines (as is usual for WikiText).

    Parameters
    ----------
    name : str
        A data set of the library ``datasets``, a folder for it, or a .jsonl, .json, .csv, .parquet or .txt file.
    split, column : str
    subset : str, optional
        The data set's configuration.

    Returns
    -------
    dict
        The data set's name to its text, or to its :class:`Chats` if the rows are lists of messages.

    Raises
    ------
    TextError
        It cannot be read (of JSON, the line is named), or the column is missing or holds neither text nor chats.
    """
    try:
        path = Path(name).expanduser()
        is_file = path.is_file()
    except (OSError, ValueError, RuntimeError) as error:  # too long, an unknown ~user
        raise TextError(
            f"The data set {name!r} is neither a file nor the name of a data set: {one_line(error)}."
        ) from error
    if not name.strip():
        raise TextError("The data set's name is empty: give a file, a folder or a name (--dataset).")
    if is_file and path.suffix.lower() in (".jsonl", ".json"):
        objects = _read_json(name)
        columns = list(dict.fromkeys(key for row in objects for key in row))
        rows = [row.get(column) for row in objects]
    else:
        columns, rows = _load_dataset(name, path, split, column, subset)
    if column not in columns:
        raise TextError(
            f"The data set {name!r} has no column {column!r}; it has {', '.join(columns) or 'none'}. Choose with --column."
        )
    text = "\n\n".join(row for row in rows if isinstance(row, str) and row.strip())
    if text:
        return {f"{name}:{split}": text}
    what = f"The column {column!r} of the data set {name!r}"
    if any(isinstance(row, list) and row and isinstance(row[0], Mapping) for row in rows):
        return {f"{name}:{split}": Chats(what, rows)}
    kinds = ", ".join(dict.fromkeys(type(row).__name__ for row in rows if row is not None and not isinstance(row, str)))
    found = f" but {kinds}" if kinds else ""
    raise TextError(f"{what} holds no text{found}; its columns are {', '.join(columns)}. Choose another with --column.")


def _load_dataset(name: str, path: Path, split: str, column: str, subset: str | None) -> tuple[list[str], list[Any]]:
    """Column names, and the column's rows (none if there is no such column)."""
    kind = {".csv": "csv", ".parquet": "parquet", ".txt": "text", ".jsonl": "json", ".json": "json"}.get(
        path.suffix.lower()
    )
    if kind and not path.exists() and name.count("/") != 1:  # else it may be a hub id
        raise TextError(f"The data set {name!r} cannot be loaded: there is no such file (looked from {Path.cwd()}).")
    if path.is_file() and kind is None:
        raise TextError(
            f"The data set {name!r} is a file of an unknown kind: give .jsonl, .json, .csv, .parquet or .txt."
        )
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise TextError('Data sets need the library datasets: pip install "pop_mm[eval]".') from error
    try:
        if path.is_file():
            found = load_dataset(kind, data_files={split: str(path)}, split=split)
        else:
            found = load_dataset(name, subset, split=split)
        return list(found.column_names), list(found[column]) if column in found.column_names else []
    except Exception as error:  # of the hub, the network, or a builder, which hides the cause
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        reason = "it is empty" if isinstance(cause, StopIteration) else one_line(cause)
        raise TextError(f"The data set {name!r} (split {split!r}) cannot be loaded: {reason}.") from error


def _read_json(name: str) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines; one that ends in .json may hold one list or object over several lines."""
    text = _read(f"The data set {name!r}", name)
    lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if not lines:
        raise TextError(f"The data set {name!r} is empty.")
    if not name.lower().endswith("l") and not _is_json(lines[0][1]):
        lines = [(1, text)]
    found = []
    for number, line in lines:
        try:
            value = json.loads(line, object_pairs_hook=unique_keys)
        except json.JSONDecodeError as error:
            cause = error.msg[:1].lower() + error.msg[1:].removesuffix(" starting at")  # the column says where
            cut = "; as it is the last line, the file may be cut off" if number == lines[-1][0] else ""
            where = f"line {number + error.lineno - 1}, column {error.colno}"
            raise TextError(f"The data set {name!r} is damaged in {where}: {cause}{cut}.") from error
        except (ValueError, RecursionError) as error:
            raise TextError(f"The data set {name!r} is damaged in line {number}: {one_line(error)}.") from error
        for row in value if isinstance(value, list) else [value]:
            if not isinstance(row, dict):
                raise TextError(
                    f"The data set {name!r} holds a {type(row).__name__} in line {number}; every line must be an object such "
                    'as {"text": "..."}.'
                )
            found.append(row)
    return found


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def check_tokens(model: Any, windows: Sequence[Window], tokenizer: Any = None) -> None:
    """Raise ``TokenError`` if a window has a token id that the model's embedding has no row for."""
    for window in windows:
        inputs.check_tokens(model, window.ids, tokenizer, f"The text {window.name!r} cannot be scored.")


def windows(texts: Mapping[str, str | Chats], tokenizer: Any, tokens: int, limit: int | None = None) -> list[Window]:
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


def pieces(texts: Mapping[str, str | Chats], tokenizer: Any, tokens: int) -> list[Window]:
    """All of the texts, in pieces of at most ``tokens`` tokens, for calibration."""
    return [piece for name, text in texts.items() for piece in _pieces(name, text, tokenizer, tokens)]


def _pieces(name: str, text: str | Chats, tokenizer: Any, tokens: int) -> list[Window]:
    start, ids = _split_start(text if isinstance(text, str) else text.render(tokenizer), tokenizer)
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


__all__ = ["Chats", "TextError", "Window", "check_tokens", "digest", "pieces", "read_dataset", "read_files", "windows"]
