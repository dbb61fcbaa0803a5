"""Example questions of the page: about four small scenes, or for a model that takes text alone."""

from __future__ import annotations

from pathlib import Path

SCENES = Path(__file__).parent / "scenes"

# Drawn by demos/tiny_vlm/scenes.py, of configurations that tiny-vlm was not trained on.
_QUESTIONS = {
    "triangle-star-circles.png": "What do you see?",
    "square-triangle-cross.png": "Where is the purple cross?",
    "two-blue.png": "How many blue shapes are there?",
    "four-shapes.png": "What colour is the shape at the left?",
}
_CAPTIONS = ("Triangle, star, circles", "Triangle, square, cross", "Square, triangle, circle", "Four shapes")
_TEXTS = (
    "Why is the sky blue?",
    "Write three sentences about a lighthouse keeper.",
    "Explain what a prime number is.",
)


def examples(images: bool) -> list[tuple[Path | None, str]]:
    """Pictures, or None for models without, and questions."""
    if not images:
        return [(None, text) for text in _TEXTS]
    return [(SCENES / name, question) for name, question in _QUESTIONS.items()]


def captions(images: bool) -> list[str]:
    """Names of the examples' buttons: what the picture shows, and the question."""
    if not images:
        return list(_TEXTS)
    return [f"{name}: {text}" for name, text in zip(_CAPTIONS, _QUESTIONS.values(), strict=True)]
