"""Token ids to prompt with: real passages where there is a tokenizer, random ids otherwise."""

from __future__ import annotations

from itertools import chain, cycle, islice
from typing import Any

import torch
from torch import Tensor

from ..inputs import check_tokens
from ..samples import load_passages


class Prompts:
    """Prompts of any size, another one for each number, and the same ones for the same seed.

    Parameters
    ----------
    model : PreTrainedModel
    tokenizer : PreTrainedTokenizerBase or None
    seed : int

    Raises
    ------
    TokenError
        The tokenizer has a token that the model's embedding has no row for.
    """

    def __init__(self, model: Any, tokenizer: Any, seed: int = 0) -> None:
        self._device, self._seed = model.device, seed
        self._passages: list[list[int]] = []
        if tokenizer is not None:
            texts = load_passages().values()
            self._passages = [tokenizer(text, add_special_tokens=False).input_ids for text in texts]
            every = torch.tensor([token for passage in self._passages for token in passage])
            check_tokens(model, every, tokenizer)
        configs = (model.config, model.config.get_text_config())
        special = [value for config in configs for key, value in config.to_dict().items() if key.endswith("token_id")]
        ids = torch.ones(configs[1].vocab_size, dtype=torch.bool)
        for value in special:  # one that stands for an image would ask for the image
            for token in value if isinstance(value, list) else [value]:
                if token is not None and 0 <= token < len(ids):
                    ids[token] = False
        self._ordinary = ids.nonzero().flatten()

    def ids(self, number: int, batch: int, tokens: int) -> Tensor:
        """``[batch, tokens]``: a row begins at a passage of its own and goes on with those after it, as often as needed."""
        if not self._passages:
            random = torch.Generator().manual_seed((self._seed * 1_000_003 + number) % 2**63)
            return self._ordinary[torch.randint(len(self._ordinary), (batch, tokens), generator=random)].to(
                self._device
            )
        count = len(self._passages)
        rows = []
        for row in range(batch):
            first = (self._seed + number * batch + row) % count
            after = chain(self._passages[first:], self._passages[:first])
            rows.append(list(islice(chain.from_iterable(cycle(after)), tokens)))
        return torch.tensor(rows, device=self._device)


__all__ = ["Prompts"]
