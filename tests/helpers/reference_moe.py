"""POP for routed experts as in pop-method.md, written for the tests: loops over tokens and experts, nothing shared with pop_mm.

``MoEPop(model, ratio)`` replaces the forward of every set of experts, and hooks the down projections of everything else
as :class:`reference.Pop` does. A *unit* is what has a partition of its own: (0, expert), or (row, expert) per sequence.
"""

import math

import torch

from helpers.reference import Pop


def experts_of(model):
    """The modules that hold routed experts in 3-D tensors, in the order of execution."""
    return [module for module in model.modules() if hasattr(module, "is_concatenated")]


def split_sizes(size, ratio, gamma, method="pop", round_to=1):
    """|R|, |C|, and how many of C a step keeps."""
    kept = size - math.floor(ratio * size + 1e-6)
    if method == "full":
        return 0, size, kept
    half = min(round(gamma * size / 2), kept, size - kept) if method == "pop" else 0
    width = min(size, math.ceil((kept + half) / round_to) * round_to)
    return kept - half, width - (kept - half), half


def cut(scores, sizes):
    """Sets R, C and P; of equal scores the lower channel counts as better."""
    retained, candidates, _ = sizes
    ranking = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    return (
        set(ranking[:retained]),
        set(ranking[retained : retained + candidates]),
        set(ranking[retained + candidates :]),
    )


class Weights:
    """The weights of one expert, channel by channel, in float64 for the scores; the model's own dtype for the activations."""

    def __init__(self, module, expert):
        self.module = module
        name = "gate_up_proj" if module.has_gate else "up_proj"
        inputs, down = getattr(module, name)[expert].detach(), module.down_proj[expert].detach()
        self.inputs = inputs.t() if module.is_transposed else inputs  # [D or 2 D, H]
        self.down = down if module.is_transposed else down.t()  # [D, H]
        self.size = len(self.down)
        self.input_bias = getattr(module, f"{name}_bias")[expert].detach() if module.has_bias else None
        self.down_bias = module.down_proj_bias[expert].detach() if module.has_bias else None
        self.norms = [float(row.double().norm()) for row in self.down]

    def channels(self, token):
        """[H] to [D]: the input of the down projection."""
        out = self.inputs @ token
        if self.input_bias is not None:
            out = out + self.input_bias
        own = type(self.module)
        return (own._apply_gate(self.module, out[None]) if self.module.has_gate else self.module.act_fn(out[None]))[0]

    def output(self, h):
        """[D] to [H]."""
        out = h @ self.down
        return out if self.down_bias is None else out + self.down_bias

    def input_norm(self, channel):
        """Norm of a channel's weights in gate and up."""
        rows = [channel]
        if self.module.has_gate:
            interleaved = not self.module.is_concatenated
            rows = [2 * channel, 2 * channel + 1] if interleaved else [channel, self.size + channel]
        return math.sqrt(sum(float(self.inputs[row].double().norm()) ** 2 for row in rows))


class MoEPop(Pop):
    """One prompt on one model with routed experts; ``ratio`` is that of each FFN and expert.

    Attributes
    ----------
    units : list of dict
        For each set of experts, by unit: (R, C, P). A unit without a partition is missing.
    prompt_tokens, decode_tokens, dense_tokens : list of list of int
        For each set of experts, by expert.
    expert_active : list of list of dict
        Of every forward, of each set of experts, by expert: sorted lists of active channels, one for each token.
    logits : list of Tensor
        Last column of every forward, [B, V].
    """

    def __init__(
        self,
        model,
        ratio,
        gamma=0.1,
        batch="shared",
        prefill="dense",
        method="pop",
        min_tokens=1,
        unseen="dense",
        expert_score="plain",
    ):
        self.handles = []
        super().__init__(model, ratio, gamma, batch, prefill)
        self.method, self.min_tokens, self.unseen = method, min_tokens, unseen
        self.routed_score = expert_score == "routed"
        self.modules = experts_of(model)
        assert self.modules
        self.weights = [[Weights(m, e) for e in range(len(m.down_proj))] for m in self.modules]
        self.units = [{} for _ in self.modules]
        self.sums = [{} for _ in self.modules]  # of squared activations, by unit
        self.seen = [{} for _ in self.modules]
        self.late = [set() for _ in self.modules]
        self.prompt_tokens, self.decode_tokens, self.dense_tokens = (
            [[0] * len(w) for w in self.weights] for _ in range(3)
        )
        self.expert_active, self.logits = [], []
        for index, module in enumerate(self.modules):
            module.forward = lambda hidden, ids, weights, i=index: self._experts(i, hidden, ids, weights)

    def __exit__(self, *args):
        super().__exit__(*args)
        for module in self.modules:
            del module.forward

    def _forward(self, phase, ids, mask, live):
        self.expert_active.append([{} for _ in self.modules])
        logits = super()._forward(phase, ids, mask, live)
        self.logits.append(logits[:, -1].double())
        return logits

    # dense FFNs and shared experts: the variants -------------------------------------------------------------------

    def _cut(self, index):
        sizes = split_sizes(len(self.norms[index]), self.ratio, self.gamma, self.method)
        self.parts[index] = [
            cut([norm * math.sqrt(e) for norm, e in zip(self.norms[index], energy, strict=True)], sizes)
            for energy in self.energy[index]
        ]

    def _choose(self, index, group, column, h):
        retained, candidates, _ = self.parts[index][group[0] if self.per_row else 0]
        _, _, keep = split_sizes(len(self.norms[index]), self.ratio, self.gamma, self.method)
        scores = {}
        tokens = [h[row, column].tolist() for row in group if self.valid[row][column]]
        for channel in candidates:
            squares = [token[channel] ** 2 for token in tokens]
            scores[channel] = self.norms[index][channel] * math.sqrt(sum(squares))
        return retained | set(sorted(candidates, key=lambda i: (-scores[i], i))[:keep])

    # routed experts -------------------------------------------------------------------------------------------------

    def _sizes(self, index):
        down = self.modules[index].down_proj
        return split_sizes(self.weights[index][0].size, self.ratio, self.gamma, self.method, 16 // down.element_size())

    def _unit(self, row, expert):
        return (row if self.per_row else 0, expert)

    def _experts(self, index, hidden, ids, weights):
        result = torch.zeros_like(hidden)
        slots = []
        for token in range(len(hidden)):
            row, column = divmod(token, self.length)
            for expert, weight in zip(ids[token].tolist(), weights[token], strict=True):
                if expert == len(self.weights[index]):
                    continue  # it is on another device
                slots.append((row, column, token, expert, weight, self.weights[index][expert].channels(hidden[token])))
        if self.phase == "prefill":
            active = self._prefill(index, slots)
        else:
            active = {}
            for column in range(self.length):
                active.update(self._step(index, [slot for slot in slots if slot[1] == column]))
        for _, _, token, expert, weight, h in slots:
            h = h * torch.tensor([channel in active[token, expert] for channel in range(len(h))])
            found = self.expert_active[-1][index].setdefault(expert, [])
            found.append(h.nonzero().flatten().tolist())
            result[token] += (self.weights[index][expert].output(h) * weight).to(result.dtype)
        for found in self.expert_active[-1][index].values():
            found.sort()
        return result

    def _prefill(self, index, slots):
        self.units[index].clear()
        self.late[index].clear()
        for row, column, _, expert, weight, h in slots:
            if self.valid[row][column]:
                self.prompt_tokens[index][expert] += 1
                self._learn(index, self._unit(row, expert), h, weight)
        for row in range(self.rows if self.per_row else 1):
            for expert in range(len(self.weights[index])):
                unit = (row, expert)
                if self.seen[index].get(unit, 0) >= self.min_tokens:
                    self._cut_unit(index, unit)
                elif self.unseen == "weights":
                    own = self.weights[index][expert]
                    scores = [own.norms[i] * own.input_norm(i) for i in range(own.size)]
                    self.units[index][unit] = cut(scores, self._sizes(index))
        active = {}
        for row, _, token, expert, _, h in slots:
            active[token, expert] = set(range(len(h)))
            part = self.units[index].get(self._unit(row, expert))
            if self.partial and part is not None:
                active[token, expert] = part[0] | part[1]
        return active

    def _step(self, index, slots):
        active = {}
        _, _, keep = self._sizes(index)
        for unit in {self._unit(row, expert) for row, _, _, expert, _, _ in slots}:
            mine = [s for s in slots if self._unit(s[0], s[3]) == unit]
            valid = [s for s in mine if self.valid[s[0]][s[1]]]
            self.decode_tokens[index][unit[1]] += len(valid)
            if unit not in self.units[index]:
                self.dense_tokens[index][unit[1]] += len(valid)
                chosen = set(range(self.weights[index][unit[1]].size))
                for _, _, _, _, weight, h in valid:
                    self._learn(index, unit, h, weight)
                if self.seen[index].get(unit, 0) >= self.min_tokens:
                    self._cut_unit(index, unit)
                    self.late[index].add(unit)
            else:
                retained, candidates, _ = self.units[index][unit]
                scores = {}
                tokens = [(h.double() * w.double() if self.routed_score else h).tolist() for *_, w, h in valid]
                for channel in candidates:
                    values = [token[channel] for token in tokens]
                    scores[channel] = self.weights[index][unit[1]].norms[channel] * math.sqrt(sum(v**2 for v in values))
                chosen = retained | set(sorted(candidates, key=lambda i: (-scores[i], i))[:keep])
            for _, _, token, expert, _, _ in mine:
                active[token, expert] = chosen
        return active

    def _learn(self, index, unit, h, weight):
        values = h.double() * weight.double() if self.routed_score else h.double()
        self.sums[index][unit] = self.sums[index].get(unit, 0) + values**2
        self.seen[index][unit] = self.seen[index].get(unit, 0) + 1

    def _cut_unit(self, index, unit):
        norms = self.weights[index][unit[1]].norms
        scores = [norm * math.sqrt(e) for norm, e in zip(norms, self.sums[index][unit].tolist(), strict=True)]
        self.units[index][unit] = cut(scores, self._sizes(index))
