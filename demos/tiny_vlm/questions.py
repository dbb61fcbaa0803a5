"""Questions about a scene, each with its one right answer.

Answers are sentences whose telling word is never the first one, so that it is decode steps that decide whether they are right.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from scenes import COLOURS, POSITIONS, SHAPES, Scene, sample_scene

TYPES = ("colour", "shape", "position", "count", "presence", "description")
NUMBERS = ("no", "one", "two", "three", "four")

COLOUR = (
    "What colour is the {thing}?",
    "Which colour does the {thing} have?",
    "Tell me the colour of the {thing}.",
    "What is the colour of the {thing}?",
)
SHAPE = (
    "What shape is the {colour} thing?",
    "Which shape does the {colour} thing have?",
    "Tell me the shape of the {colour} thing.",
    "What is the shape of the {colour} thing?",
)
SHAPE_AT = (
    "What shape is at the {position}?",
    "Which shape is at the {position}?",
    "Tell me the shape at the {position}.",
)
POSITION = (
    "Where is the {thing}?",
    "In which part of the picture is the {thing}?",
    "Tell me where the {thing} is.",
    "Where can you see the {thing}?",
)
COUNT = (
    "How many {things} are there?",
    "How many {things} do you see?",
    "Count the {things}.",
    "How many {things} are in the picture?",
)
PRESENCE = (
    "Is there {a_thing}?",
    "Do you see {a_thing}?",
    "Can you see {a_thing} in the picture?",
    "Does the picture show {a_thing}?",
)
DESCRIPTION = ("Describe the picture.", "What do you see?", "What is in the picture?", "What does the picture show?")


@dataclass(frozen=True)
class Question:
    """A question of one of ``TYPES``, and its answer."""

    kind: str
    text: str
    answer: str


def ask(scene: Scene, kind: str, rng: np.random.Generator) -> Question | None:
    """Ask a question of the given type, or None where the scene has no unambiguous one."""
    text, answer = _ASK[kind](scene, rng) or ("", "")
    return Question(kind, text, answer) if text else None


def templates() -> Iterator[str]:
    """Every wording of every question and answer, filled in with every word: what the tokenizer is made from."""
    rng = np.random.default_rng(0)
    things = [f"{colour} {kind}" for colour in COLOURS for kind in SHAPES] + list(SHAPES)
    for thing in things:
        yield from (text.format(thing=thing) for text in (*COLOUR, *POSITION))
        yield from (text.format(things=_plural(thing)) for text in COUNT)
        yield from (text.format(a_thing=_a(thing)) for text in PRESENCE)
        yield from (f"There is {_a(thing)} in the picture.", f"There is no {thing} in the picture.")
        yield from (f"The {thing} is at the {position}." for position in POSITIONS)
    for colour in COLOURS:
        yield from (text.format(colour=colour) for text in SHAPE)
        yield from (text.format(things=f"{colour} shapes") for text in COUNT)
        yield from (f"The {kind} is {colour}." for kind in (*SHAPES, "shape"))
        yield from (f"The {colour} thing is a {kind}." for kind in SHAPES)
        yield from (f"The shape at the {position} is {colour}." for position in POSITIONS)
        yield from (_there_are(count, f"{colour} shape") for count in range(5))
    for position in POSITIONS:
        yield from (text.format(position=position) for text in SHAPE_AT)
        yield from (text.format(thing=f"shape at the {position}") for text in COLOUR)
        yield from (f"The shape at the {position} is a {kind}." for kind in SHAPES)
    for thing in (*SHAPES, "shape"):
        yield from (text.format(things=_plural(thing)) for text in COUNT)
        yield from (_there_are(count, thing) for count in range(5))
    yield from DESCRIPTION
    yield from (_description(sample_scene(rng, "train"), rng)[1] for _ in range(500))


def _pick(options: tuple[str, ...] | list[str], rng: np.random.Generator) -> str:
    return options[int(rng.integers(len(options)))]


def _once(values: list[str]) -> list[str]:
    return sorted(value for value in set(values) if values.count(value) == 1)


def _a(thing: str) -> str:
    return f"an {thing}" if thing[0] in "aeiou" else f"a {thing}"


def _plural(thing: str) -> str:
    return f"{thing}es" if thing.endswith("s") else f"{thing}s"


def _there_are(count: int, thing: str) -> str:
    return f"There is one {thing}." if count == 1 else f"There are {NUMBERS[count]} {_plural(thing)}."


def _colour(scene: Scene, rng: np.random.Generator) -> tuple[str, str] | None:
    if rng.random() < 0.7:
        if not (kinds := _once([shape.kind for shape in scene.shapes])):
            return None
        thing = _pick(kinds, rng)
        found = next(shape for shape in scene.shapes if shape.kind == thing)
        if len(scene.shapes) == 1 and rng.random() < 0.3:
            thing = "shape"
    else:
        found = scene.shapes[int(rng.integers(len(scene.shapes)))]
        thing = f"shape at the {found.position}"
    return _pick(COLOUR, rng).format(thing=thing), f"The {thing} is {found.colour}."


def _shape(scene: Scene, rng: np.random.Generator) -> tuple[str, str] | None:
    if rng.random() < 0.7:
        if not (colours := _once([shape.colour for shape in scene.shapes])):
            return None
        colour = _pick(colours, rng)
        found = next(shape for shape in scene.shapes if shape.colour == colour)
        return _pick(SHAPE, rng).format(colour=colour), f"The {colour} thing is a {found.kind}."
    found = scene.shapes[int(rng.integers(len(scene.shapes)))]
    text = _pick(SHAPE_AT, rng).format(position=found.position)
    return text, f"The shape at the {found.position} is a {found.kind}."


def _position(scene: Scene, rng: np.random.Generator) -> tuple[str, str] | None:
    names = [f"{shape.colour} {shape.kind}" for shape in scene.shapes]
    if rng.random() < 0.3:
        names = [shape.kind for shape in scene.shapes]
    if not (things := _once(names)):
        return None
    thing = _pick(things, rng)
    return _pick(POSITION, rng).format(
        thing=thing
    ), f"The {thing} is at the {scene.shapes[names.index(thing)].position}."


def _count(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    what = int(rng.integers(3))
    if what == 0:
        thing, count = "shape", len(scene.shapes)
    else:
        values = [shape.colour if what == 1 else shape.kind for shape in scene.shapes]
        everything = list(COLOURS) if what == 1 else list(SHAPES)
        absent = [value for value in everything if value not in values]
        value = _pick(absent if rng.random() < 0.2 else sorted(set(values)), rng)
        thing, count = (f"{value} shape" if what == 1 else value), values.count(value)
    return _pick(COUNT, rng).format(things=_plural(thing)), _there_are(count, thing)


def _presence(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    there = {f"{shape.colour} {shape.kind}" for shape in scene.shapes}
    if rng.random() < 0.5:
        thing = _pick(sorted(there), rng)
    else:  # half of the absent ones differ from a shape that is there in one word only
        shape = scene.shapes[int(rng.integers(len(scene.shapes)))]
        colour = shape.colour if rng.random() < 0.25 else _pick(list(COLOURS), rng)
        kind = shape.kind if rng.random() < 0.35 else _pick(SHAPES, rng)
        thing = f"{colour} {kind}"
    answer = f"There is {_a(thing)} in the picture." if thing in there else f"There is no {thing} in the picture."
    return _pick(PRESENCE, rng).format(a_thing=_a(thing)), answer


def _description(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    parts = [f"{_a(f'{shape.colour} {shape.kind}')} at the {shape.position}" for shape in scene.shapes]
    listed = " and ".join(filter(None, (", ".join(parts[:-1]), parts[-1])))
    return _pick(DESCRIPTION, rng), f"{_there_are(len(parts), 'shape')[:-1]}: {listed}."


_ASK = {
    "colour": _colour,
    "shape": _shape,
    "position": _position,
    "count": _count,
    "presence": _presence,
    "description": _description,
}
