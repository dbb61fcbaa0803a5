"""Writes the generated documents of this folder: ``python make.py``. The same seed gives the same files."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SEED = 2602
COUNT = 60
EXAMPLES = 4  # further documents, for few-shot prompts
WORDS = """
    apple anchor basket bridge button candle castle cherry clock cloud copper cotton desk dragon drum eagle engine feather
    fence flute forest garden glass hammer harbor helmet honey island jacket kettle kitchen ladder lemon letter lion
    marble market meadow mirror mountain needle ocean orange paper pencil pepper piano pillow planet pocket rabbit ribbon
    river rocket saddle salmon shadow silver soldier spider stone sugar summer table tiger tower train tunnel turtle
    valley velvet village violin wagon water window winter wolf yellow
"""
ADJECTIVES = "silver wooden broken yellow heavy tiny golden dusty striped painted rusty purple ancient folded round"
THINGS = "violin lantern umbrella basket mirror trumpet kettle ladder compass telescope carpet drum clock wagon kite"
ROOMS = "attic garage kitchen cellar garden office bedroom barn hallway library bathroom workshop stable tower"


def copies(draw: random.Random) -> Iterator[dict[str, Any]]:
    """Lists of words to be repeated."""
    while True:
        yield {"words": ", ".join(draw.sample(WORDS.split(), 6))}


def rooms(draw: random.Random) -> Iterator[dict[str, Any]]:
    """What is in four rooms, and which of the four things is in one of them."""
    while True:
        pairs = zip(draw.sample(ADJECTIVES.split(), 4), draw.sample(THINGS.split(), 4), strict=True)
        things = [_with_article(" ".join(pair)) for pair in pairs]
        places = draw.sample(ROOMS.split(), 4)
        label = draw.randrange(4)
        told = [f"In the {place} there is {thing}." for place, thing in zip(places, things, strict=True)]
        choices = [f"In the {places[label]} there is {thing}." for thing in things]
        yield {"facts": " ".join(told), "room": places[label], "choices": choices, "label": label}


def sums(draw: random.Random) -> Iterator[dict[str, Any]]:
    """Sums of two numbers from 2 to 20, with four answers to choose from."""
    while True:
        first, second = draw.randint(2, 20), draw.randint(2, 20)
        right = first + second
        wrong = draw.sample([right - 10, right - 2, right - 1, right + 1, right + 2, right + 10], 3)
        choices = [right, *(number if number > 0 else right + 3 for number in wrong)]
        draw.shuffle(choices)
        yield {"sum": f"{first} + {second}", "choices": list(map(str, choices)), "label": choices.index(right)}


def _with_article(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def files() -> dict[str, str]:
    """File name -> text."""
    found = {}
    for name, documents in (("copy", copies), ("recall", rooms), ("arithmetic", sums)):
        source = documents(random.Random(SEED))
        splits = ["examples"] * EXAMPLES + ["test"] * COUNT
        found[f"{name}.jsonl"] = "".join(json.dumps({"split": split, **next(source)}) + "\n" for split in splits)
    return found


if __name__ == "__main__":
    for name, text in files().items():
        Path(__file__).with_name(name).write_text(text, encoding="utf-8")
