"""Documents of the tasks in this folder, as lm_eval's ``custom_dataset`` wants them: without a network or a cache."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from datasets import Dataset

from pop_mm.samples import load_passages


def load(documents: str, **_: Any) -> dict[str, Dataset]:
    """Splits of ``documents``.jsonl: ``test`` and few-shot ``examples``."""
    text = Path(__file__).with_name(f"{documents}.jsonl").read_text(encoding="utf-8")
    splits: dict[str, list[dict[str, Any]]] = {}
    for line in text.splitlines():
        document = json.loads(line)
        splits.setdefault(document.pop("split"), []).append(document)
    return {split: Dataset.from_list(found) for split, found in splits.items()}


def reading(**_: Any) -> dict[str, Dataset]:
    """One document for each question of ``reading.json``; the right answer's place changes from one to the next."""
    passages = json.loads(Path(__file__).with_name("reading.json").read_text(encoding="utf-8"))
    found: list[dict[str, Any]] = []
    for passage in passages:
        for question, right, *wrong in passage["questions"]:
            label = len(found) * 3 % 4
            choices = [*wrong[:label], right, *wrong[label:]]
            found.append({"passage": passage["passage"], "question": question, "choices": choices, "label": label})
    return {"test": Dataset.from_list(found)}


def passages(**_: Any) -> dict[str, Dataset]:
    """The passages of :mod:`pop_mm.samples.passages`."""
    return {"test": Dataset.from_list([{"text": text} for text in load_passages().values()])}
