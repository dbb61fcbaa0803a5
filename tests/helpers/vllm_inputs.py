"""Masked inputs of vLLM's plug-in without vLLM: forwards, small inputs of both methods, values."""

import numpy as np
import torch

from pop_mm.engines.vllm.masked import MaskedChannels, MaskedEntries
from pop_mm.engines.vllm.shard import Shard
from pop_mm.engines.vllm.tokens import tokens_of
from pop_mm.methods import get_method

WIDTH, BLOCK = 24, 4


def forward(*requests, block_size=BLOCK):
    """Tokens of a forward of requests ``(id, scheduled, computed, prompt, blocks)``."""
    ids, scheduled, computed, prompts, blocks = zip(*requests, strict=True)
    table = np.zeros((len(ids), 8), dtype=np.int32)
    for row, own in zip(table, blocks, strict=True):
        row[: len(own)] = own
    return tokens_of(ids, *(np.array(a, dtype=np.int32) for a in (scheduled, computed, prompts)), table, block_size)


def channels(method="pop", ratio=0.5, shard=None, weight=None, complaints=None):
    sizes = get_method(method).sizes(WIDTH, ratio, 0.3)
    shard = shard or Shard(0, WIDTH, WIDTH)
    weight = torch.ones(WIDTH) if weight is None else weight
    found = MaskedChannels(
        "down", shard, (complaints if complaints is not None else []).append, sizes, get_method(method), weight
    )
    found.reserve(8, torch.device("cpu"))
    return found


def entries(share=0.5, weight=None, shard=None, complaints=None):
    shard = shard or Shard(0, WIDTH, WIDTH)
    found = MaskedEntries("x", shard, (complaints if complaints is not None else []).append, share, weight)
    found.reserve(8, torch.device("cpu"))
    return found


def values(tokens, seed=0):
    return torch.randn(tokens, WIDTH, generator=torch.Generator().manual_seed(seed))
