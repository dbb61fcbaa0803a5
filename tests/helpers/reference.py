"""POP as in pop-method.md, written for the tests: loops over rows, tokens and channels, nothing shared with pop_mm.

``Pop(model, ratio)`` hooks the down projections of a model; ``prefill`` and ``step`` are told what they are, so there is
nothing to guess. Masks only ever zero the input of a down projection.
"""

import inspect
import math

import torch
from transformers import DynamicCache

DOWN_NAMES = ("down_proj", "dense_4h_to_h", "c_proj", "fc2", "w2", "fc_out")


def down_projections(model):
    """Down projections in the order of execution, found by name."""
    return [
        module
        for name, module in model.named_modules()
        if name.split(".")[-1] in DOWN_NAMES and not any(part in name for part in ("attn", "attention"))
    ]


def columns(down):
    """The down projection's weight as [D, H]: row i belongs to channel i."""
    weight = down.weight.detach().double()
    return weight if type(down).__name__ == "Conv1D" else weight.t()


def counts(size, ratio, gamma):
    """|R|, |C| and the channels that are active in decode."""
    kept = size - math.floor(ratio * size + 1e-6)
    half = min(round(gamma * size / 2), kept, size - kept)
    return kept - half, 2 * half, kept


class Pop:
    """One prompt on one model; ``ratio`` is that of each FFN.

    Attributes
    ----------
    parts : list of list of (R, C, P)
        Sets of channels, for each FFN, for each row (shared: one).
    active : list of list of list of list of set
        Active channels whose activation is not zero by itself: of every forward, of each FFN, of each row, of each column.
    """

    def __init__(self, model, ratio, gamma=0.1, batch="shared", prefill="dense", probe_tokens=None, norms=None):
        self.model, self.ratio, self.gamma = model, ratio, gamma
        self.per_row, self.partial = batch == "per_sequence", prefill == "partition"
        self.probe_tokens = probe_tokens
        self.downs = down_projections(model)
        self.norms = norms or [columns(down).norm(dim=1).tolist() for down in self.downs]
        self.energy = [None] * len(self.downs)
        self.parts = [None] * len(self.downs)
        self.active = []
        self.cache = DynamicCache(config=model.config)
        self.mask = None
        self.handles = [
            down.register_forward_pre_hook(lambda _, args, i=i: self._before_down(i, args))
            for i, down in enumerate(self.downs)
        ]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for handle in self.handles:
            handle.remove()

    def prefill(self, ids, mask=None):
        """Run (more of) a prompt; [B, q, V] logits."""
        return self._forward("prefill", ids, mask, None)

    def step(self, ids, live=None, mask=None):
        """Run one decode step a column; rows that are not live do not count in a shared choice."""
        return self._forward("decode", ids, mask, live)

    def greedy(self, ids, steps, mask=None, eos=None, pad=0):
        """Prompt and generated tokens, [B, S + steps], as ``generate`` returns them."""
        logits = self.prefill(ids, mask)
        done = [False] * len(ids)
        for number in range(steps):
            token = logits[:, -1].argmax(-1)
            token = torch.tensor([pad if d else int(t) for t, d in zip(token, done, strict=True)])
            done = [d or int(t) == eos for t, d in zip(token, done, strict=True)]
            ids = torch.cat([ids, token[:, None]], 1)
            if all(done) or number == steps - 1:
                break
            logits = self.step(token[:, None], live=[not d for d in done])
        return ids

    @torch.no_grad()
    def _forward(self, phase, ids, mask, live):
        self.phase, self.rows, self.length = phase, *ids.shape
        new = torch.ones_like(ids) if mask is None else mask
        self.mask = new if self.mask is None else torch.cat([self.mask, new], 1)
        self.valid = new.tolist() if live is None else [[int(alive)] * ids.shape[1] for alive in live]
        self.active.append([])
        inputs = {"input_ids": ids, "past_key_values": self.cache, "attention_mask": self.mask, "use_cache": True}
        if "position_ids" in inspect.signature(self.model.forward).parameters:
            inputs["position_ids"] = (self.mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        return self.model(**inputs).logits

    def _before_down(self, index, args):
        h = args[0].clone().view(self.rows, self.length, -1)
        if self.phase == "prefill":
            self._count(index, h)
            self._cut(index)
            active = [[self._prompt_channels(index, row, h) for _ in range(self.length)] for row in range(self.rows)]
        else:
            groups = [[row] for row in range(self.rows)] if self.per_row else [list(range(self.rows))]
            active = [[None] * self.length for _ in range(self.rows)]
            for group in groups:
                for column in range(self.length):
                    chosen = self._choose(index, group, column, h)
                    for row in group:
                        active[row][column] = chosen
        for row in range(self.rows):
            for column in range(self.length):
                for channel in set(range(h.shape[-1])) - active[row][column]:
                    h[row, column, channel] = 0
                active[row][column] = set(h[row, column].nonzero().flatten().tolist())
        self.active[-1].append(active)
        return (h.view(args[0].shape), *args[1:])

    def _prompt_channels(self, index, row, h):
        retained, candidates, _ = self.parts[index][row if self.per_row else 0]
        return retained | candidates if self.partial else set(range(h.shape[-1]))

    def _count(self, index, h):
        groups = self.rows if self.per_row else 1
        if self.energy[index] is None:
            self.energy[index] = [torch.zeros(h.shape[-1], dtype=torch.float64) for _ in range(groups)]
        for row in range(self.rows):
            columns = [column for column in range(self.length) if self.valid[row][column]]
            if self.probe_tokens is not None and len(columns) > self.probe_tokens:
                ends = [-(-part * len(columns) // self.probe_tokens) for part in range(1, self.probe_tokens + 1)]
                columns = [columns[end - 1] for end in ends]  # the last column of each of N equal parts
            for column in columns:
                self.energy[index][row if self.per_row else 0] += h[row, column].double() ** 2

    def _cut(self, index):
        self.parts[index] = []
        for energy in self.energy[index]:
            size = len(energy)
            scores = [self.norms[index][i] * math.sqrt(energy[i]) for i in range(size)]
            ranking = sorted(range(size), key=lambda i: (-scores[i], i))
            retained, candidates, _ = counts(size, self.ratio, self.gamma)
            self.parts[index].append(
                (
                    set(ranking[:retained]),
                    set(ranking[retained : retained + candidates]),
                    set(ranking[retained + candidates :]),
                )
            )

    def _choose(self, index, group, column, h):
        retained, candidates, _ = self.parts[index][group[0] if self.per_row else 0]
        scores = {}
        for channel in candidates:
            squares = [float(h[row, column, channel]) ** 2 for row in group if self.valid[row][column]]
            scores[channel] = self.norms[index][channel] * math.sqrt(sum(squares))
        kept = sorted(candidates, key=lambda i: (-scores[i], i))[: len(candidates) // 2]
        return retained | set(kept)
