"""Thresholds from the prompt as defined, for the tests: loops over tokens and entries, nothing shared with pop_mm.

``Thresholds(model, rho, kappa)`` hooks every matrix by itself, q, k and v too; ``prefill`` and ``step`` are told what they
are, so there is nothing to guess. It zeroes entries of inputs, and nothing else.
"""

import inspect
import math

import numpy as np
import torch
from transformers import DynamicCache

from helpers.reference import columns, down_projections
from helpers.reference_moe import Weights, experts_of

ATTENTION_IN = (
    "q_proj",
    "k_proj",
    "v_proj",
    "qkv_proj",
    "query_key_value",
    "c_attn",
    "Wqkv",
    "q_a_proj",
    "kv_a_proj_with_mqa",
)
ATTENTION_OUT = ("o_proj", "out_proj", "dense", "c_proj")
FFN_IN = ("gate_proj", "up_proj", "gate_up_proj", "w1", "w3", "c_fc", "dense_h_to_4h", "fc1", "fc_in", "input_linear")
FEWEST = 4  # tokens of a prompt


def matrices(model, attention=True):
    """Name -> (module, is it a down projection), of every matrix that thresholds serve."""
    downs = [*down_projections(model), *(m for n, m in model.named_modules() if n.endswith("output_linear"))]
    found = {}
    for name, module in model.named_modules():
        *path, last = name.split(".")
        if getattr(module, "weight", None) is None or module.weight.dim() != 2:
            continue
        inside = any(part in ("attn", "self_attn", "attention", "self_attention", "mixer") for part in path)
        if any(module is down for down in downs):
            found[name] = module, True
        elif inside and last in (*ATTENTION_IN, *ATTENTION_OUT):
            if attention:
                found[name] = module, False
        elif last in FFN_IN and "conv" not in path and not (inside and "mixer" not in path):
            found[name] = module, False
    return found


def bin_of(magnitude):
    """The upper 12 bits of a float32 that is not negative, from its exponent and mantissa."""
    if magnitude == 0:
        return 0
    mantissa, exponent = math.frexp(magnitude)  # in [0.5, 1)
    if exponent < -125:  # a subnormal number
        return int(magnitude / 2.0**-130)
    return (exponent + 126) * 16 + int((2 * mantissa - 1) * 16)


def edge(number):
    """Where a bin begins."""
    exponent, mantissa = divmod(number, 16)
    return (1 + mantissa / 16) * 2.0 ** (exponent - 127) if exponent else mantissa * 2.0**-130


def quantile(entries, share):
    """The threshold that ``share`` of the entries is above, spread evenly in each bin."""
    counts = {}
    for magnitude in entries:
        counts[bin_of(magnitude)] = counts.get(bin_of(magnitude), 0) + 1
    target, below = (1 - share) * len(entries), 0
    for number in sorted(counts):
        if below + counts[number] >= target:
            part = (target - below) / counts[number]
            return float(np.float32(edge(number) + part * (edge(number + 1) - edge(number))))
        below += counts[number]
    raise AssertionError


class Thresholds:
    """One prompt on one model.

    Attributes
    ----------
    thresholds : dict
        Name of a matrix (of experts: name and "x" or "h"), row -> its threshold; -1 lets everything pass.
    left_out : dict
        Name -> for every decode step and row, the entries that are left out.
    """

    def __init__(self, model, rho, kappa, attention=True):
        self.model, self.rho, self.kappa = model, rho, kappa
        self.entries, self.thresholds, self.left_out, self.logits = {}, {}, {}, []
        self.cache, self.mask = DynamicCache(config=model.config), None
        self.tokens = []  # by row: modality of each token of the prompt
        self.handles = []
        self.experts = experts_of(model)
        inner = {id(module) for experts in self.experts for module in experts.modules()}
        for name, (module, down) in matrices(model, attention).items():
            if id(module) not in inner:
                norms = columns(module).norm(dim=1).float().numpy() if down else None
                self.handles.append(module.register_forward_pre_hook(self._hook(name, norms)))
        names = {module: name for name, module in model.named_modules()}
        for experts in self.experts:
            own = [Weights(experts, e) for e in range(len(experts.down_proj))]
            experts.forward = self._experts(names[experts], own)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for handle in self.handles:
            handle.remove()
        for experts in self.experts:
            del experts.forward

    def prefill(self, ids, mask=None, modality=None, **inputs):
        """Run (more of) a prompt; [B, q, V] logits. ``modality`` [B, q] is 0 for text."""
        self.thresholds.clear()
        kinds = torch.zeros_like(ids) if modality is None else modality
        new = torch.ones_like(ids) if mask is None else mask
        if not self.tokens:
            self.tokens = [[] for _ in ids]
        for row, (row_kinds, row_mask) in enumerate(zip(kinds.tolist(), new.tolist(), strict=True)):
            self.tokens[row] += [kind for kind, valid in zip(row_kinds, row_mask, strict=True) if valid]
        self.kinds = kinds.tolist()
        self.firsts = {
            row: valid.index(1)
            for row, valid in enumerate(new.tolist())
            if 1 in valid and len(self.tokens[row]) == sum(valid)
        }
        return self._forward("prefill", ids, new, inputs)

    def step(self, ids):
        """Run one decode step a column."""
        return self._forward("decode", ids, torch.ones_like(ids), {})

    def greedy(self, ids, steps, mask=None, **inputs):
        """Generated tokens, [B, steps]."""
        logits, found = self.prefill(ids, mask, **inputs), []
        for number in range(steps):
            self.logits.append(logits[:, -1].double())
            found.append(logits[:, -1:].argmax(-1))
            if number < steps - 1:
                logits = self.step(found[-1])
        return torch.cat(found, 1)

    @torch.no_grad()
    def _forward(self, phase, ids, mask, inputs):
        self.phase, self.rows, self.length, self.valid = phase, *ids.shape, mask.tolist()
        self.mask = mask if self.mask is None else torch.cat([self.mask, mask], 1)
        own = {
            "input_ids": ids,
            "past_key_values": self.cache,
            "attention_mask": self.mask,
            "use_cache": True,
            **inputs,
        }
        takes = "position_ids" in inspect.signature(self.model.forward).parameters
        if takes and "pixel_values" not in inputs and not getattr(self, "own_positions", False):
            own["position_ids"] = (self.mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        return self.model(**own).logits

    def _hook(self, name, norms):
        share = self.rho if norms is None else self.kappa

        def before(_, args):
            x = args[0].reshape(self.rows, self.length, -1).clone()
            for row in range(self.rows):
                for column in range(self.length):
                    x[row, column] = self._token(name, share, row, column, x[row, column], norms)
            return (x.view(args[0].shape), *args[1:])

        return before

    def _token(self, name, share, row, column, values, norms):
        """One token's input, with what is left out zeroed; of a prompt, all of it."""
        scores = np.abs(values.detach().float().numpy())
        scores = (scores if norms is None else scores * norms).tolist()
        if self.phase == "prefill":
            if self.valid[row][column] and self.firsts.get(row) != column:
                self.entries.setdefault((name, row), []).append((self.kinds[row][column], scores))
            return values
        bound = self._threshold(name, row, share)
        out = [number for number, score in enumerate(scores) if not score > bound]
        self.left_out.setdefault(name, []).append((row, out))
        values = values.clone()
        for number in out:
            values[number] = 0
        return values

    def _threshold(self, name, row, share):
        if (name, row) not in self.thresholds:
            tokens = self.entries.get((name, row), [])
            texts = [scores for kind, scores in tokens if kind == 0]
            enough = sum(kind == 0 for kind in self.tokens[row]) >= FEWEST
            chosen = texts if enough else [scores for _, scores in tokens]
            flat = [score for scores in chosen for score in scores]
            dense = len(self.tokens[row]) < FEWEST or not flat
            self.thresholds[name, row] = -1.0 if dense else quantile(flat, share)
        return self.thresholds[name, row]

    def _experts(self, name, own):
        def forward(hidden, ids, weights):
            result = torch.zeros_like(hidden)
            for token in range(len(hidden)):
                row, column = divmod(token, self.length)
                x = self._token(f"{name}.x", self.rho, row, column, hidden[token], None)
                for expert, weight in zip(ids[token].tolist(), weights[token], strict=True):
                    norms = np.array(own[expert].norms, dtype=np.float32)
                    h = self._token(f"{name}.h", self.kappa, row, column, own[expert].channels(x), norms)
                    result[token] += (own[expert].output(h) * weight).to(result.dtype)
            return result

        return forward
