"""Evaluation of pruning methods as it is defined, written for the tests: slow, in loops, nothing shared with pop_mm.

A text is a prompt and n + 1 more tokens. The prompt is prefill; then n single steps on a cache, fed the text's own tokens,
predict the next ones. ``score_texts`` and ``first_differences`` are what the library's numbers are compared with.

A *unit* is what has its channels chosen by itself: the FFN of a layer, or one expert of it. It is told what runs through it
(``prompt`` and ``step`` take the activations of some tokens, one list of channels for each) and says which channels are
active. Units know nothing of rows: with ``batch="per_sequence"`` every text runs alone, with ``"shared"`` all run together.
"""

import math
from typing import NamedTuple

import torch
from torch import nn
from transformers import DynamicCache

KNOWN_BEFOREHAND = ("magnitude", "random", "wanda_sp")  # methods that need no prompt
METHODS = ("dense", "static", "pop", "full", "griffin", *KNOWN_BEFOREHAND)


class Score(NamedTuple):
    """Means over the steps of one text."""

    loss: float
    kl: float
    agreement: float


# what is measured ---------------------------------------------------------------------------------------------------


def log_softmax(logits):
    """Of a list of numbers."""
    top = max(logits)
    total = top + math.log(sum(math.exp(x - top) for x in logits))
    return [x - total for x in logits]


def loss(logits, target):
    """Negative log likelihood of the text's next token, in nats."""
    return -log_softmax(logits)[target]


def divergence(dense, pruned):
    """KL(dense || pruned), in nats."""
    return sum(math.exp(p) * (p - q) for p, q in zip(log_softmax(dense), log_softmax(pruned), strict=True))


def best_token(logits):
    """The first of the largest logits."""
    return logits.index(max(logits))


def mean(values):
    """Of a list."""
    return sum(values) / len(values)


def perplexity(losses):
    """Over texts, of the mean loss of each."""
    return math.exp(mean(losses))


def same_at_the_start(one, other):
    """How many leading tokens are equal."""
    count = 0
    while count < len(one) and one[count] == other[count]:
        count += 1
    return count


# scores of channels -------------------------------------------------------------------------------------------------


def l2(values):
    """Norm of some numbers."""
    return math.sqrt(sum(value * value for value in values))


def activation_score(weights, tokens, channel):
    """Wanda: norm of the channel's column in down times the norm of its activations."""
    return weights.norms[channel] * l2(token[channel] for token in tokens)


def griffin_score(weights, tokens, channel):
    """Norm of the channel's activations, where those of every token are normalised to 1 first."""
    return l2(token[channel] / l2(token) for token in tokens)


def magnitude_score(weights, channel):
    """Norm of all weights of the channel."""
    return l2(weight for rows in (*weights.inputs, weights.down) for weight in rows[channel])


def prompt_score(method, weights, tokens, channel):
    """What a prompt says about a channel."""
    return (griffin_score if method == "griffin" else activation_score)(weights, tokens, channel)


def step_score(weights, tokens, channel):
    """What one decode step says about a channel; ``tokens`` are those of that step alone."""
    return activation_score(weights, tokens, channel)


# which channels are active ------------------------------------------------------------------------------------------


def best(scores, count):
    """The channels (keys) with the highest scores; of equal ones the lower."""
    return sorted(scores, key=lambda channel: (-scores[channel], channel))[:count]


def sizes(method, size, ratio, gamma, round_to=1):
    """|R|, |C|, and how many of C a step keeps; |R| + |C| is widened to a multiple of ``round_to``."""
    kept = size - math.floor(ratio * size + 1e-6)
    if method == "full":
        return 0, size, kept
    half = min(round(gamma * size / 2), kept, size - kept) if method == "pop" else 0
    width = kept + half
    while width % round_to and width < size:
        width += 1
    return kept - half, width - (kept - half), half


class Unit:
    """The channels of one FFN or expert under one method; forgets everything between prompts."""

    def __init__(self, weights, method, ratio, gamma, prefill, round_to, known):
        self.weights, self.method, self.partial = weights, method, prefill == "partition"
        self.everything = range(len(weights.down))
        self.retained_size, self.candidates_size, self.keep = sizes(
            method, len(self.everything), ratio, gamma, round_to
        )
        self.known = known
        self.forget()

    def forget(self):
        """Start over; methods that know their channels beforehand have them at once."""
        self.retained = None
        if self.known is not None:
            self.cut(dict(enumerate(self.known)))

    def cut(self, scores):
        """Rank the channels and cut the ranking into R, C and the rest."""
        ranking = best(scores, len(scores))
        self.retained = ranking[: self.retained_size]
        self.candidates = ranking[self.retained_size :][: self.candidates_size]

    def learn(self, tokens):
        """Make the partition from these tokens, unless it is known."""
        if self.known is None and self.method != "dense":
            self.cut({i: prompt_score(self.method, self.weights, tokens, i) for i in self.everything})

    def prompt(self, tokens):
        """Active channels of the whole prompt."""
        self.learn(tokens)
        if self.method == "dense" or not self.partial:
            return self.everything
        return [*self.retained, *self.candidates]

    def step(self, tokens):
        """Active channels of one decode step."""
        if self.method == "dense":
            return self.everything
        if self.retained is None:  # an expert that the prompt did not reach
            self.learn(tokens)
            return self.everything
        scores = {i: step_score(self.weights, tokens, i) for i in self.candidates}
        return [*self.retained, *best(scores, self.keep)]


class Counter:
    """Stands in for a unit in calibration: sums up squared activations, prunes nothing."""

    def __init__(self, weights):
        self.weights = weights
        self.sums = [0.0] * len(weights.down)

    def prompt(self, tokens):
        """All channels are active."""
        for token in tokens:
            for channel, value in enumerate(token):
                self.sums[channel] += value**2
        return range(len(self.sums))

    def scores(self):
        """Wanda over all that was seen."""
        return [norm * math.sqrt(total) for norm, total in zip(self.weights.norms, self.sums, strict=True)]


# where channels are in a model --------------------------------------------------------------------------------------


class Weights:
    """Weights by channel, as lists.

    Attributes
    ----------
    inputs : list of list of list of float
        Gate and up (or up alone): for each the weights that make channel i.
    down : list of list of float
        The weights that channel i is multiplied by.
    norms : list of float
        Of each of those.
    """

    def __init__(self, inputs, down):
        self.inputs = [matrix.tolist() for matrix in inputs]
        self.down = down.tolist()
        self.norms = [l2(column) for column in self.down]


def by_output(projection):
    """[out, in] of a Linear or a Conv1D."""
    weight = projection.weight.detach()
    return weight.t() if type(projection).__name__ == "Conv1D" else weight


def find_units(model):
    """For each FFN by its name: the module to watch, and the weights of the FFN or a list of those of its experts."""
    found = {}
    for name, module in model.named_modules():
        children, down = dict(module.named_children()), getattr(module, "down_proj", None)
        if isinstance(down, nn.Parameter):
            experts = zip(module.gate_up_proj.detach(), down.detach(), strict=True)
            found[name] = module, [Weights(gate_up.chunk(2), own.t()) for gate_up, own in experts]
        elif {"gate_proj", "up_proj", "down_proj"} <= children.keys():
            inputs = [by_output(module.gate_proj), by_output(module.up_proj)]
            found[name] = module.down_proj, Weights(inputs, by_output(module.down_proj).t())
        elif {"gate_up_proj", "down_proj"} <= children.keys():
            found[name] = (
                module.down_proj,
                Weights(by_output(module.gate_up_proj).chunk(2), by_output(module.down_proj).t()),
            )
        elif {"c_fc", "c_proj"} <= children.keys():
            found[name] = module.c_proj, Weights([by_output(module.c_fc)], by_output(module.c_proj).t())
    return found


def ffn_ratio(model, overall):
    """Ratio of each FFN that leaves out this share of the attention and FFN weights; of experts, a token's count."""
    attention = ffn = 0
    for name, module in model.named_modules():
        if name.split(".")[-1] in ("q_proj", "k_proj", "v_proj", "o_proj", "c_attn") or name.endswith("attn.c_proj"):
            attention += module.weight.numel()
    for _, weights in find_units(model).values():
        used = weights[: model.config.num_experts_per_tok] if isinstance(weights, list) else [weights]
        for one in used:
            ffn += (len(one.inputs) + 1) * len(one.down) * len(one.down[0])
    return overall * (attention + ffn) / ffn


class Watch:
    """Within: the inputs of all down projections go through the units, which say what is left of them."""

    def __init__(self, model, new_unit):
        self.model, self.phase, self.handles, self.replaced = model, "prompt", [], []
        self.units = {}
        for name, (module, weights) in find_units(model).items():
            if isinstance(weights, list):
                self.units[name] = [new_unit(w, name, number) for number, w in enumerate(weights)]
                module.forward = lambda *args, m=module, units=self.units[name]: self.experts(m, units, *args)
                self.replaced.append(module)
            else:
                self.units[name] = new_unit(weights, name, None)
                self.handles.append(
                    module.register_forward_pre_hook(
                        lambda _, args, unit=self.units[name]: self.before_down(unit, *args)
                    )
                )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for handle in self.handles:
            handle.remove()
        for module in self.replaced:
            del module.forward

    def all_units(self):
        """One after the other."""
        for unit in self.units.values():
            yield from unit if isinstance(unit, list) else [unit]

    def masked(self, unit, h):
        """[N, D]: zero but on the channels that are active for these tokens."""
        active = set((unit.prompt if self.phase == "prompt" else unit.step)(h.tolist()))
        return h * torch.tensor([float(channel in active) for channel in range(h.shape[-1])], dtype=h.dtype)

    def before_down(self, unit, h):
        """The input of a down projection."""
        return (self.masked(unit, h.reshape(-1, h.shape[-1])).view(h.shape),)

    def experts(self, module, units, hidden, chosen, router):
        """What the experts of one layer compute: [N, H] from [N, H], and [N, k] each of the router's choice and weights."""
        result = torch.zeros_like(hidden)
        for expert, unit in enumerate(units):
            mine = [(token, k) for token, row in enumerate(chosen.tolist()) for k, e in enumerate(row) if e == expert]
            if not mine:
                continue
            tokens = [token for token, _ in mine]
            gate, up = (hidden[tokens] @ module.gate_up_proj[expert].t()).chunk(2, -1)
            out = self.masked(unit, module.act_fn(gate) * up) @ module.down_proj[expert].t()
            for (token, k), row in zip(mine, out, strict=True):
                result[token] += router[token, k] * row
        return result

    def run(self, phase, ids, cache):
        """Logits of the last column, for each row."""
        self.phase = phase
        return self.model(input_ids=ids, past_key_values=cache, use_cache=True).logits[:, -1].tolist()


# the evaluation -----------------------------------------------------------------------------------------------------


class Method:
    """A method and its settings. ``ratio`` is that of each FFN, ``round_to`` is for experts.

    Parameters
    ----------
    known : mapping of str to list, optional
        For methods that need no prompt: scores of the channels by the FFN's name ([D], or [E][D] of experts).
    """

    def __init__(self, name, ratio, gamma=0.1, prefill="dense", batch="per_sequence", round_to=1, known=None):
        assert name in METHODS and prefill in ("dense", "partition") and batch in ("shared", "per_sequence")
        assert (known is not None) == (name in ("random", "wanda_sp")), "random and wanda_sp need scores"
        self.name, self.ratio, self.gamma, self.prefill, self.batch = name, ratio, gamma, prefill, batch
        self.round_to, self.known = round_to, known

    def new_unit(self, weights, name, expert):
        """A unit of this method."""
        known = None
        if self.name == "magnitude":
            known = [magnitude_score(weights, channel) for channel in range(len(weights.down))]
        elif self.known is not None:
            known = self.known[name] if expert is None else self.known[name][expert]
        round_to = 1 if expert is None else self.round_to
        return Unit(weights, self.name, self.ratio, self.gamma, self.prefill, round_to, known)

    def groups(self, texts):
        """The texts that run together."""
        return [texts] if self.batch == "shared" else list(texts.split(1))


@torch.no_grad()
def calibration_scores(model, texts):
    """Known scores of wanda_sp: each text in one plain forward of the dense model."""
    with Watch(model, lambda weights, *_: Counter(weights)) as watch:
        for ids in texts:
            model(input_ids=ids, use_cache=False)
    return {
        name: [unit.scores() for unit in units] if isinstance(units, list) else units.scores()
        for name, units in watch.units.items()
    }


@torch.no_grad()
def step_logits(model, texts, prompt, method):
    """For each text, for each of its n steps: a list of logits."""
    rows = []
    with Watch(model, method.new_unit) as watch:
        for group in method.groups(texts):
            for unit in watch.all_units():
                unit.forget()
            cache, steps = DynamicCache(config=model.config), []
            watch.run("prompt", group[:, :prompt], cache)
            for column in range(prompt, texts.shape[1] - 1):
                steps.append(watch.run("step", group[:, column : column + 1], cache))
            rows += [[step[row] for step in steps] for row in range(len(group))]
    return rows


@torch.no_grad()
def greedy(model, texts, prompt, method, tokens):
    """For each text: that many tokens after its prompt."""
    rows = []
    with Watch(model, method.new_unit) as watch:
        for group in method.groups(texts):
            for unit in watch.all_units():
                unit.forget()
            cache = DynamicCache(config=model.config)
            logits = watch.run("prompt", group[:, :prompt], cache)
            found = [[best_token(row)] for row in logits]
            while len(found[0]) < tokens:
                logits = watch.run("step", torch.tensor([[row[-1]] for row in found]), cache)
                for row, more in zip(found, logits, strict=True):
                    row.append(best_token(more))
            rows += found
    return rows


def score_texts(model, texts, prompt, method, dense=None):
    """A score for each of the texts ``[B, prompt + n + 1]``; ``dense``: the dense model's ``step_logits``, if known."""
    if dense is None:
        dense = step_logits(model, texts, prompt, Method("dense", 0.0))
    pruned = step_logits(model, texts, prompt, method)
    scores = []
    for text, p, q in zip(texts.tolist(), dense, pruned, strict=True):
        losses = [loss(logits, target) for logits, target in zip(q, text[prompt + 1 :], strict=True)]
        divergences = [divergence(a, b) for a, b in zip(p, q, strict=True)]
        same = [best_token(a) == best_token(b) for a, b in zip(p, q, strict=True)]
        scores.append(Score(mean(losses), mean(divergences), mean(same)))
    return scores


def first_differences(model, texts, prompt, method, tokens, dense=None):
    """For each text: how many leading tokens of the dense model's greedy continuation (if known) the pruned one shares."""
    if dense is None:
        dense = greedy(model, texts, prompt, Method("dense", 0.0), tokens)
    pruned = greedy(model, texts, prompt, method, tokens)
    return [same_at_the_start(a, b) for a, b in zip(dense, pruned, strict=True)]
