"""Training batches: several questions about each picture, packed behind one copy of its tokens.

Every turn may look at the picture and at itself, but not at the other turns, so each is a question asked first; in a part of
the rows the turns form one chat in which later turns see earlier ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import torch
from model import IMAGE_TOKENS, MERGE, PATCH
from perception import contents
from questions import TYPES, ask
from scenes import MOST, SIDE, Scene, render, sample_scene
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

CHATS = 0.25  # of the rows
# A description has as much to learn as several other answers; counts are what is learnt last.
_SHARE = {"colour": 0.7, "shape": 0.7, "position": 1.0, "count": 1.7, "presence": 0.6, "description": 0.7}


def patchify(images: np.ndarray) -> torch.Tensor:
    """Do what the image processor does to pictures that need no resizing, for a whole batch.

    Parameters
    ----------
    images : numpy.ndarray
        uint8 ``[N, SIDE, SIDE, 3]``.

    Returns
    -------
    torch.Tensor
        float32 ``[N * patches, 3 * 2 * PATCH * PATCH]``, the processor's ``pixel_values``.
    """
    grid = SIDE // PATCH // MERGE
    values = torch.from_numpy(images).float().mul_(1 / 255).sub_(0.5).div_(0.5)
    values = values.view(len(images), grid, MERGE, PATCH, grid, MERGE, PATCH, 3).permute(0, 1, 4, 2, 5, 7, 3, 6)
    values = values.unsqueeze(6).expand(-1, -1, -1, -1, -1, -1, 2, -1, -1)  # the frame twice
    return values.reshape(len(images) * (SIDE // PATCH) ** 2, -1)


class Batches:
    """Makes batch number ``step`` from the seed and that number alone, so that a resumed run sees what it would have seen.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerBase
    size : int
        Pictures in a batch.
    length : int
        Tokens in a row; turns are added until the next one does not fit.
    seed : int
    part : tuple of int
        ``(i, n)``: make every n-th picture of the batch only, from the i-th, where n processes share the work.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, size: int, length: int, seed: int, part: tuple[int, int] = (0, 1)
    ) -> None:
        self.length, self.seed = length, seed
        self.rows = range(part[0], size, part[1])
        self.pad = int(tokenizer.pad_token_id)
        self.encode = lru_cache(maxsize=200_000)(lambda text: tuple(tokenizer(text).input_ids))
        image = tokenizer.convert_tokens_to_ids("<|image_pad|>")
        start = self.encode("<|im_start|>user\n<|vision_start|>")
        self.prefix = [*start, *[image] * IMAGE_TOKENS, *self.encode("<|vision_end|>")]
        first, side = len(start), SIDE // PATCH // MERGE
        rows, columns = np.divmod(np.arange(IMAGE_TOKENS), side)
        planes = [np.full(IMAGE_TOKENS, first), first + rows, first + columns]
        self.prefix_positions = np.stack(
            [np.concatenate([np.arange(first), plane, [first + side]]) for plane in planes]
        )
        self.after = first + side + 1  # the position of the token after the prefix

    def __call__(self, step: int, most: int = MOST) -> dict[str, torch.Tensor]:
        """Make a batch.

        Returns
        -------
        dict
            ``input_ids``, ``labels`` (-100 where nothing is learnt) ``[N, length]``; ``attention_mask`` (bool, True where
            a query may look) ``[N, 1, length, length]``; ``position_ids`` ``[3, N, length]``; ``pixel_values`` and
            ``image_grid_thw``; ``cells`` ``[N, IMAGE_TOKENS, 2]`` (``perception.contents``); ``kinds`` and ``turns``
            ``[N, length]``: the type and the number of a token's question.
        """
        n, start = len(self.rows), len(self.prefix)
        ids = np.full((n, self.length), self.pad)
        labels = np.full((n, self.length), -100)
        turns = np.full((n, self.length), -1)
        kinds, numbers = np.zeros_like(ids), np.zeros_like(ids)
        positions = np.zeros((3, n, self.length), dtype=np.int64)
        images, cells = np.empty((n, SIDE, SIDE, 3), dtype=np.uint8), np.empty((n, IMAGE_TOKENS, 2), dtype=np.int64)
        for row, number in enumerate(self.rows):
            rng = np.random.default_rng((self.seed, step, number))
            scene = sample_scene(rng, "train", most, least=1 if most == 1 or rng.random() < 0.5 else 2)
            images[row], cells[row] = np.asarray(render(scene)), contents(scene)
            ids[row, :start], turns[row, :start], positions[:, row, :start] = self.prefix, 0, self.prefix_positions
            at, position, chat = start, self.after, rng.random() < CHATS
            for turn, (text, known, kind) in enumerate(self._turns(scene, rng, chat), 1):
                end = at + len(text)
                if end > self.length:
                    break
                ids[row, at:end] = text
                labels[row, at:end] = np.where(known, text, -100)
                turns[row, at:end] = 0 if chat else turn
                kinds[row, at:end], numbers[row, at:end] = kind, turn
                positions[:, row, at:end] = np.arange(position, position + len(text))
                at, position = end, (position + len(text) if chat else position)
        who = torch.from_numpy(turns)
        causal = torch.ones(self.length, self.length, dtype=torch.bool).tril()
        seen = causal & ((who[:, None, :] == 0) | (who[:, None, :] == who[:, :, None]))
        side = SIDE // PATCH
        return {
            "input_ids": torch.from_numpy(ids),
            "labels": torch.from_numpy(labels),
            "kinds": torch.from_numpy(kinds),
            "turns": torch.from_numpy(numbers),
            "cells": torch.from_numpy(cells),
            "attention_mask": seen[:, None],
            "position_ids": torch.from_numpy(positions),
            "pixel_values": patchify(images),
            "image_grid_thw": torch.tensor([[1, side, side]]).expand(n, 3),
        }

    def pictures(self, step: int) -> dict[str, torch.Tensor]:
        """Make a batch without text: ``pixel_values``, ``image_grid_thw`` and ``cells`` of twice as many pictures.

        They are crowded, with 5 to 9 shapes, so that there is more to learn from each.
        """
        scenes = []
        for number in self.rows:
            rng = np.random.default_rng((self.seed, step, number))
            scenes += [sample_scene(rng, "train", most=9, least=5) for _ in range(2)]
        side = SIDE // PATCH
        return {
            "pixel_values": patchify(np.stack([np.asarray(render(scene)) for scene in scenes])),
            "image_grid_thw": torch.tensor([[1, side, side]]).expand(len(scenes), 3),
            "cells": torch.from_numpy(np.stack([contents(scene) for scene in scenes])),
        }

    def _turns(
        self, scene: Scene, rng: np.random.Generator, chat: bool
    ) -> Iterator[tuple[tuple[int, ...], np.ndarray, int]]:
        """Tokens of a turn, which of them are learnt, and the index of its type."""
        weights = np.array([_SHARE[kind] for kind in TYPES])
        order = rng.choice(len(TYPES), 12, p=weights / weights.sum())
        for turn, kind in enumerate(order):
            if (question := ask(scene, TYPES[kind], rng)) is None:
                continue
            opening = self.encode("<|im_start|>user\n") if chat and turn else ()
            asked = (*opening, *self.encode(question.text), *self.encode("<|im_end|>\n<|im_start|>assistant\n"))
            answer = (*self.encode(question.answer), *self.encode("<|im_end|>"))
            text = (*asked, *answer, *self.encode("\n"))
            places = np.arange(len(text))
            yield text, (places >= len(asked)) & (places < len(asked) + len(answer)), kind
