"""An auxiliary task that teaches the vision tower to see: each image token names what is in its cell of the scene.

A language model that is trained together with its vision tower from nothing answers at chance for long, since neither has
anything to learn from the other. Real VLMs start from a pre-trained vision tower; here a linear head on the image tokens
pre-trains it in a few minutes. The head is not saved.
"""

from __future__ import annotations

import numpy as np
import torch
from model import IMAGE_TOKENS, MERGE, PATCH
from scenes import COLOURS, SHAPES, SIDE, Scene
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

_GRID = SIDE // PATCH // MERGE
_CENTRES = ((np.arange(_GRID) + 0.5) / _GRID * 3).astype(int)  # the scene's row or column that a token's centre lies in
CELLS = (3 * _CENTRES[:, None] + _CENTRES).ravel()


def contents(scene: Scene) -> np.ndarray:
    """Kind and colour of the shape in the cell of every image token, ``[IMAGE_TOKENS, 2]``; 0 is none."""
    cells = np.zeros((9, 2), dtype=np.int64)
    for shape in scene.shapes:
        cells[shape.cell] = 1 + SHAPES.index(shape.kind), 1 + list(COLOURS).index(shape.colour)
    return cells[CELLS]


class Head(nn.Module):
    """Names kind and colour from an image token, for the loss only.

    Parameters
    ----------
    size : int
        Hidden size of the language model, which image tokens have.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(size)
        self.kind, self.colour = nn.Linear(size, 1 + len(SHAPES)), nn.Linear(size, 1 + len(COLOURS))

    def forward(self, tokens: torch.Tensor, truth: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the loss, and whether both names are right for each token that has a shape in its cell.

        Parameters
        ----------
        tokens : torch.Tensor
            ``[N * IMAGE_TOKENS, size]``.
        truth : torch.Tensor
            ``[N, IMAGE_TOKENS, 2]``, from ``contents``.
        """
        tokens, truth = self.norm(tokens), truth.view(-1, 2)
        kind, colour = self.kind(tokens), self.colour(tokens)
        right = (kind.argmax(-1) == truth[:, 0]) & (colour.argmax(-1) == truth[:, 1])
        return cross_entropy(kind, truth[:, 0]) + cross_entropy(colour, truth[:, 1]), right[truth[:, 0] > 0]


def see(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, object]:
    """Run the vision tower: image tokens ``[N * IMAGE_TOKENS, size]``, and its whole output, which the model takes."""
    seen = model.model.get_image_features(batch["pixel_values"], batch["image_grid_thw"], return_dict=True)
    tokens = torch.cat(tuple(seen.pooler_output))
    if len(tokens) != len(batch["image_grid_thw"]) * IMAGE_TOKENS:
        raise ValueError(f"Expected {IMAGE_TOKENS} tokens a picture; got {len(tokens)} tokens in all.")
    return tokens, seen
