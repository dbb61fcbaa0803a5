"""Random images as the processor of each kind of vision-language model would hand them over.

An encoder takes the model's config and, for each row of a batch, the sizes of its images: 0 is a small one, 1 a larger one
where the architecture takes several sizes. It returns what stands for each image in ``input_ids``, and the other inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

IMAGE, VIDEO, MARKS = 100, 101, [102, 103, 104, 105, 106]  # ids of placeholders, and of what may stand around them

Rows = Sequence[Sequence[int]]
Blocks = list[list[list[int]]]
Encode = Callable[[Any, Rows, torch.Generator], tuple[Blocks, dict[str, Any]]]


def _pixels(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator)


def _blocks(rows: Rows, *tokens: int) -> Blocks:
    """As many placeholders as an image of each size has, between two marks."""
    return [[[MARKS[0], *[IMAGE] * tokens[size], MARKS[1]] for size in row] for row in rows]


def _flat(rows: Rows) -> list[int]:
    return [size for row in rows for size in row]


def fixed(
    tokens: int, shape: tuple[int, ...] = (3, 16, 16), name: str = "pixel_values", **more: tuple[int, ...]
) -> Encode:
    """All of one size, ``[N, *shape]``; ``more`` gives shapes of other inputs for one image."""

    def encode(config: Any, rows: Rows, generator: torch.Generator) -> tuple[Blocks, dict[str, Any]]:
        count, shapes = len(_flat(rows)), {name: shape, **more}
        return _blocks(rows, tokens, tokens), {key: _pixels(generator, count, *one) for key, one in shapes.items()}

    return encode


def grid(merge: int = 2, temporal: int = 2, flat: bool = True) -> Encode:
    """Flat patches ``[P, 3 * temporal * 4 * 4]`` of all images, and a grid ``[t, h, w]`` of each."""

    def encode(config: Any, rows: Rows, generator: torch.Generator) -> tuple[Blocks, dict[str, Any]]:
        grids = torch.tensor([[1, 4, (4, 6)[size]] for size in _flat(rows)])
        shape = (3 * temporal * 16,) if flat else (3 * temporal, 4, 4)
        pixels = _pixels(generator, int(grids.prod(-1).sum()), *shape)
        return _blocks(rows, 16 // merge**2, 24 // merge**2), {"pixel_values": pixels, "image_grid_thw": grids}

    return encode


def merged_grid(config: Any, rows: Rows, generator: torch.Generator) -> tuple[Blocks, dict[str, Any]]:
    """As :func:`grid`, with the sides of what is merged for each image (Video-LLaMA 3)."""
    blocks, inputs = grid(temporal=1)(config, rows, generator)
    return blocks, {**inputs, "image_merge_sizes": torch.full((len(_flat(rows)),), 2)}


def tiles(full: bool = False) -> Encode:
    """Tiles of 16 x 16 pixels behind an overview ``[N, tiles, 3, 16, 16]``, and the size of each image (LLaVA-NeXT).

    ``full``: rows with several images have their overviews only (LLaVA-OneVision).
    """

    def encode(config: Any, rows: Rows, generator: torch.Generator) -> tuple[Blocks, dict[str, Any]]:
        sizes = torch.tensor([((16, 32), (32, 32))[size] for size in _flat(rows)])
        inputs = {"pixel_values": _pixels(generator, len(sizes), 5, 3, 16, 16), "image_sizes": sizes}
        blocks = _blocks(rows, 4 + 2 * (4 + 1), 4 + 4 * (4 + 1))  # a new line costs a token
        if full:
            inputs["batch_num_images"] = torch.tensor([len(row) for row in rows])
            blocks = [_blocks([row], 5, 5)[0] if len(row) > 1 else own for row, own in zip(rows, blocks, strict=True)]
        return blocks, inputs

    return encode


def sized(*tokens: int) -> Encode:
    """Padded to the largest, with the size of each: ``[N, 3, 16, 24]`` (Pixtral)."""

    def encode(config: Any, rows: Rows, generator: torch.Generator) -> tuple[Blocks, dict[str, Any]]:
        sizes = torch.tensor([(16, (16, 24)[size]) for size in _flat(rows)])
        pixels = _pixels(generator, len(sizes), 3, 16, int(sizes[:, 1].max()))
        return _blocks(rows, *tokens), {"pixel_values": pixels, "image_sizes": sizes}

    return encode


def by_row(tokens: int) -> Encode:
    """``[B, images, 3, 16, 16]``: rows with fewer images are filled with zeros (Idefics)."""

    def encode(config: Any, rows: Rows, generator: torch.Generator) -> tuple[Blocks, dict[str, Any]]:
        pixels = torch.zeros(len(rows), max(map(len, rows)), 3, 16, 16)
        mask = torch.zeros((*pixels.shape[:2], 16, 16), dtype=torch.long)
        for index, row in enumerate(rows):
            pixels[index, : len(row)] = _pixels(generator, len(row), 3, 16, 16)
            mask[index, : len(row)] = 1
        return _blocks(rows, tokens, tokens), {"pixel_values": pixels, "pixel_attention_mask": mask}

    return encode


def packed(config: Any, rows: Rows, generator: torch.Generator) -> tuple[Blocks, dict[str, Any]]:
    """Flat patches of each image, padded: ``[N, 24, 48]`` with mask and height and width (LFM2-VL)."""
    shapes = torch.tensor([(4, (4, 6)[size]) for size in _flat(rows)])
    mask = (torch.arange(24) < shapes.prod(-1, keepdim=True)).long()
    pixels = _pixels(generator, len(shapes), 24, 48)
    return _blocks(rows, 4, 6), {"pixel_values": pixels, "spatial_shapes": shapes, "pixel_attention_mask": mask}


def positioned(config: Any, rows: Rows, generator: torch.Generator) -> tuple[Blocks, dict[str, Any]]:
    """Flat patches of each image, padded: ``[N, 24, 48]`` with the place (x, y) of each, -1 for padding (Gemma 4)."""
    places = []
    for size in _flat(rows):
        own = [(x, y) for y in range(4) for x in range((4, 6)[size])]
        places.append(own + [(-1, -1)] * (24 - len(own)))
    pixels = _pixels(generator, len(places), 24, 48).sigmoid()
    return _blocks(rows, 4, 6), {"pixel_values": pixels, "image_position_ids": torch.tensor(places)}


def crops(config: Any, rows: Rows, generator: torch.Generator) -> tuple[Blocks, dict[str, Any]]:
    """An overview and a crop or two of 16 x 16 pixels: ``[N, 3, 3, 16, 16]`` (Phi-4)."""
    sizes = torch.tensor([((16, 16), (16, 32))[size] for size in _flat(rows)])
    inputs = {
        "image_pixel_values": _pixels(generator, len(sizes), 3, 3, 16, 16),
        "image_sizes": sizes,
        "image_attention_mask": torch.ones(len(sizes), 3, 4, 4),
    }
    return _blocks(rows, 6 + 1 + 6, 6 + 1 + 2 * 4 + 2), inputs


def crossed(config: Any, rows: Rows, generator: torch.Generator) -> tuple[Blocks, dict[str, Any]]:
    """What cross-attention layers look at: ``[B, images, tiles, 3, 16, 16]``; one mark in the prompt (Mllama)."""
    images, count = max(map(len, rows)), config.vision_config.max_num_tiles
    ids, mask = (
        torch.zeros(len(rows), images, dtype=torch.long),
        torch.zeros(len(rows), images, count, dtype=torch.long),
    )
    for index, row in enumerate(rows):
        for image, size in enumerate(row):
            ids[index, image], mask[index, image, : size + 1] = size + 1, 1
    mask[:, :, 0] = 1  # every image has a tile, also those that fill up a row
    pixels = _pixels(generator, len(rows), images, count, 3, 16, 16)
    blocks = [[[config.image_token_index] for _ in row] for row in rows]
    return blocks, {"pixel_values": pixels, "aspect_ratio_ids": ids, "aspect_ratio_mask": mask}


def assemble(
    config: Any, encode: Encode, counts: Sequence[int], lengths: Sequence[int], seed: int
) -> dict[str, Tensor]:
    """Prompts padded on the left: words before, between and behind the images of each row."""
    generator = torch.Generator().manual_seed(seed)
    number = iter(range(sum(counts)))
    sizes = [[next(number) % 2 for _ in range(count)] for count in counts]
    blocks, inputs = encode(config, sizes, generator) if any(counts) else ([[] for _ in counts], {})
    rows = []
    for row, length in zip(blocks, lengths, strict=True):
        words = torch.randint(3, 90, (length,), generator=generator).tolist()
        for index in reversed(range(len(row))):
            cut = length * (index + 1) // (len(row) + 1)
            words[cut:cut] = row[index]
        rows.append(words)
    pads = [max(map(len, rows)) - len(row) for row in rows]
    ids = torch.tensor([[0] * pad + row for pad, row in zip(pads, rows, strict=True)])
    mask = torch.tensor([[0] * pad + [1] * len(row) for pad, row in zip(pads, rows, strict=True)])
    if "aspect_ratio_mask" in inputs:
        inputs["cross_attention_mask"] = _cross_attention(ids, config.image_token_index, inputs["aspect_ratio_mask"])
    return {"input_ids": ids, "attention_mask": mask, **inputs}


def _cross_attention(ids: Tensor, image: int, tiles: Tensor) -> Tensor:
    """``[B, S, images, tiles]``: a position sees the last image in front of it."""
    seen = (ids == image).cumsum(-1)
    number = torch.arange(1, tiles.shape[1] + 1)
    return ((seen[..., None] == number)[..., None] & tiles.bool()[:, None]).long()
