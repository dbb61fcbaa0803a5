"""Which positions of a forward are tokens of the prompt, and which are decode steps."""

from __future__ import annotations

import torch
from torch import Tensor

from .modality import TEXT, ByModality
from .phase import Forward, Phase


def decode_positions(forward: Forward, device: torch.device) -> Tensor:
    """``[B, q]``: which positions of a MIXED forward are decode steps."""
    start = forward.decode_from
    columns = torch.arange(forward.length, device=device)
    if isinstance(start, int):
        return (columns >= start).expand(forward.rows, -1)
    return columns >= start.to(device).unsqueeze(-1)


def prompt_positions(forward: Forward, device: torch.device) -> Tensor | None:
    """``[B, q]``: which positions are tokens of the prompt; None if all are."""
    valid = forward.valid
    if forward.phase is not Phase.MIXED:
        return valid
    prompt = ~decode_positions(forward, device)
    return prompt if valid is None else prompt & valid.to(device)


def prompt_masks(forward: Forward, device: torch.device) -> list[ByModality]:
    """The prompt's tokens in this forward, by modality."""
    prompt = prompt_positions(forward, device)
    if prompt is not None:
        prompt = prompt.to(device)
    if forward.positions is None:
        return [(TEXT, prompt)]
    modality = forward.positions.modality.to(device)
    masks = [(m, modality == m) for m in forward.positions.present]
    return [(m, mask if prompt is None else mask & prompt) for m, mask in masks]
