"""Scenes of one to four coloured shapes: what is in them, how they are drawn, which are kept for evaluation.

A scene lies on a grid of 3 x 3 cells with at most one shape in each. Configurations (which shapes of which colours in which
cells) are split by a hash: a tenth of them is never trained on, and only those are evaluated on.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw

SIDE = 64  # pixels
SHAPES = ("circle", "square", "triangle", "star", "cross")
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (218, 40, 40),
    "green": (36, 160, 60),
    "blue": (40, 80, 222),
    "yellow": (240, 222, 48),
    "purple": (150, 48, 190),
    "orange": (246, 140, 28),
    "white": (244, 244, 244),
    "black": (18, 18, 18),
}
POSITIONS = ("top left", "top", "top right", "left", "centre", "right", "bottom left", "bottom", "bottom right")
MOST = 4  # shapes in a scene
_CELL = SIDE / 3
_STYLES = {"train": 0, "eval": 2**31}  # the styles' seeds do not overlap either
_FINE = 4  # shapes are drawn this much larger, then reduced

Split = Literal["train", "eval"]


@dataclass(frozen=True)
class Shape:
    """One shape; ``cell`` counts in reading order, 0 to 8, as ``POSITIONS`` does."""

    kind: str
    colour: str
    cell: int

    @property
    def position(self) -> str:
        """Its cell in words."""
        return POSITIONS[self.cell]


@dataclass(frozen=True)
class Scene:
    """Shapes in reading order, and the seed of everything that no question asks about (sizes, tilts, background)."""

    shapes: tuple[Shape, ...]
    style: int

    @property
    def split(self) -> Split:
        """The split that this configuration belongs to, whatever its style."""
        key = ";".join(f"{shape.kind},{shape.colour},{shape.cell}" for shape in self.shapes)
        return "eval" if zlib.crc32(key.encode()) % 10 == 0 else "train"


def sample_scene(rng: np.random.Generator, split: Split, most: int = MOST, least: int = 1) -> Scene:
    """Draw a scene of the given split with ``least`` to ``most`` shapes, each number as likely.

    Half of the scenes choose from two colours and two kinds only, so that equal ones are frequent and counts are not all one.
    """
    count = int(rng.integers(least, most + 1))
    while True:
        colours, kinds = list(COLOURS), list(SHAPES)
        if rng.random() < 0.5:
            colours = [colours[i] for i in rng.choice(len(colours), 2, replace=False)]
            kinds = [kinds[i] for i in rng.choice(len(kinds), 2, replace=False)]
        cells = sorted(int(cell) for cell in rng.choice(len(POSITIONS), count, replace=False))
        shapes = tuple(
            Shape(kinds[int(rng.integers(len(kinds)))], colours[int(rng.integers(len(colours)))], cell)
            for cell in cells
        )
        scene = Scene(shapes, _STYLES[split] + int(rng.integers(2**31)))
        if scene.split == split:
            return scene


def render(scene: Scene) -> Image.Image:
    """Draw a scene: an RGB picture of ``SIDE`` x ``SIDE`` pixels, the same one for the same scene."""
    rng = np.random.default_rng(scene.style)
    image = Image.fromarray(_background(rng))
    for shape in scene.shapes:
        radius = rng.uniform(7.5, 10)
        reach = _CELL / 2 - radius - 0.5
        x = (shape.cell % 3 + 0.5) * _CELL + rng.uniform(-reach, reach)
        y = (shape.cell // 3 + 0.5) * _CELL + rng.uniform(-reach, reach)
        left, top = int(x - radius) - 2, int(y - radius) - 2
        size = 24
        mask = Image.new("L", (size * _FINE, size * _FINE))
        _draw(ImageDraw.Draw(mask), shape.kind, (x - left) * _FINE, (y - top) * _FINE, radius * _FINE, rng)
        colour = np.clip(np.array(COLOURS[shape.colour]) + rng.integers(-12, 13, 3), 0, 255)
        image.paste(tuple(int(value) for value in colour), (left, top), mask.reduce(_FINE))
    return image


def _draw(draw: ImageDraw.ImageDraw, kind: str, x: float, y: float, radius: float, rng: np.random.Generator) -> None:
    tilt = math.radians(rng.uniform(-8, 8))
    if kind == "circle":
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)
        return
    if kind == "cross":
        wide, thin = 0.95, 0.3
        corners = [(thin, wide), (thin, thin), (wide, thin)]
        angles = [(math.atan2(b, a), math.hypot(a, b)) for a, b in corners]
        points = [(angle + quarter * math.pi / 2, r) for quarter in (0, -1, -2, -3) for angle, r in angles]
    elif kind == "square":
        points = [(math.pi / 4 + i * math.pi / 2, 1.12) for i in range(4)]
    elif kind == "triangle":
        points = [(-math.pi / 2 + i * 2 * math.pi / 3, 1.1) for i in range(3)]
    else:
        points = [(-math.pi / 2 + i * math.pi / 5, 1.1 if i % 2 == 0 else 0.45) for i in range(10)]
    draw.polygon(
        [(x + radius * r * math.cos(a + tilt), y + radius * r * math.sin(a + tilt)) for a, r in points], fill=255
    )


def _background(rng: np.random.Generator) -> np.ndarray:
    """Muted colours of middle brightness: plain, a gradient, noise or stripes; uint8 ``[SIDE, SIDE, 3]``."""

    def muted() -> np.ndarray:
        return rng.uniform(85, 185) + rng.uniform(-22, 22, 3)

    style = rng.integers(4)
    one = np.broadcast_to(muted(), (SIDE, SIDE, 3))
    ramp = np.linspace(0, 1, SIDE)
    if style == 1:
        angle = rng.uniform(0, 2 * math.pi)
        blend = 0.5 + 0.5 * (math.cos(angle) * (2 * ramp - 1) + math.sin(angle) * (2 * ramp[:, None] - 1)) / math.sqrt(
            2
        )
        one = one + blend[..., None] * (muted() - one)
    elif style == 2:
        one = one + rng.normal(0, rng.uniform(4, 14), (SIDE, SIDE, 1))
    elif style == 3:
        wave = np.sin(ramp * rng.uniform(10, 40) + rng.uniform(0, 6)) * rng.uniform(5, 14)
        one = one + (wave if rng.random() < 0.5 else wave[:, None])[..., None]
    return np.clip(one, 0, 255).astype(np.uint8)
