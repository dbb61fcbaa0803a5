"""The library's evaluation against :mod:`naive_evaluation`, which shares nothing with it, to the last digits.

The last part shows that a mistake would be noticed: it breaks one definition at a time.
"""

import math

import pytest
import torch

from helpers import naive_evaluation as naive
from helpers.covering import covers
from helpers.modes import config_of
from helpers.observe import InDouble
from helpers.observe import prompt as random_ids
from pop_mm import PopConfig, prune
from pop_mm.evaluation import METHODS, calibrate, config_for, first_differences, score_texts
from pop_mm.methods.fixed import RandomScorer
from pop_mm.session.session import plan_ffns

PROMPT, STEPS = 6, 4
RATIO, GAMMA = 0.3, 0.2
CLOSE = 1e-9
EXPERTS_ROUND_TO = 2  # experts in float64: |R| + |C| is even
DENSE = naive.Method("dense", 0.0)
ONLINE = ("static", "pop", "full", "griffin")  # by the prompt
MODELS = ("llama", "gpt2", "mixtral")  # gated, not gated and transposed, experts
PREFILLS, BATCHES = ("dense", "partition"), ("per_sequence", "shared")
models = pytest.mark.parametrize("model_type", MODELS)
methods = pytest.mark.parametrize("method", naive.METHODS)
online = pytest.mark.parametrize("method", ONLINE)
prefills = pytest.mark.parametrize("prefill", PREFILLS)
batches = pytest.mark.parametrize("batch", BATCHES)


def texts(rows=2, length=PROMPT + STEPS + 1, seed=4):
    """With this seed each of the two prompts reaches all experts."""
    return random_ids(rows, length, seed)


def calibration_texts():
    return [random_ids(1, 11, seed) for seed in (7, 8)]


_ONCE = {}


def once(what, model, *args):
    """What the naive evaluation finds about the dense model takes long and is always the same."""
    key = what, model, *(tuple(map(tuple, a.tolist())) if isinstance(a, torch.Tensor) else a for a in args)
    if key not in _ONCE:
        _ONCE[key] = getattr(naive, what)(model, *args)
    return _ONCE[key]


def both(model, method, ratio=RATIO, gamma=GAMMA, seed=0, **settings):
    """The same method for the library and for the naive evaluation."""
    known = calibration = None
    if method == "wanda_sp":
        calibration = calibrate(model, calibration_texts())
        known = naive.calibration_scores(model, calibration_texts())
    elif method == "random":  # the library's own numbers
        ffns = [plan.ffn for plan in plan_ffns(model, PopConfig(RATIO))]
        known = {ffn.name: RandomScorer(seed).channel_weight(ffn).tolist() for ffn in ffns}
    config = config_for(method, ratio, gamma, scope="ffn", seed=seed, calibration=calibration, **settings)
    return config, naive.Method(method, ratio, gamma, round_to=EXPERTS_ROUND_TO, known=known, **settings)


def scored(model, ids, config, definition, context=PROMPT):
    """By the library and by the definition: (loss, kl, agreement) of each text."""
    with InDouble():
        found = score_texts(model, ids, context, config)
        dense = once("step_logits", model, ids, context, DENSE)
        expected = naive.score_texts(model, ids, context, definition, dense)
    return [(score.loss, score.kl, score.agreement) for score in found], [tuple(score) for score in expected]


def scored_by(model, method, ids=None, context=PROMPT, **settings):
    """The same from a method's name."""
    with InDouble():
        definitions = both(model, method, **settings)
    return scored(model, texts() if ids is None else ids, *definitions, context)


def close(found, expected):
    """Whether all numbers are the same but for rounding."""
    assert len(found) == len(expected)
    return torch.allclose(*(torch.tensor(x, dtype=torch.float64) for x in (found, expected)), rtol=0, atol=CLOSE)


@torch.no_grad()
def test_logits_of_the_dense_model_may_be_given(model):
    config, _ = both(model, "pop")
    logits = model(texts()[:, :-1]).logits[:, PROMPT:]
    assert score_texts(model, texts(), PROMPT, config, logits) == score_texts(model, texts(), PROMPT, config)


def test_the_methods_are_those_of_the_library():
    assert set(METHODS) - {"thresholds"} == set(naive.METHODS)  # reference_thresholds.py has those


@covers(model_type=MODELS, method=naive.METHODS, prefill=PREFILLS, batch=BATCHES)
def test_scores(load, model_type, method, prefill, batch):
    found, expected = scored_by(load(model_type), method, prefill=prefill, batch=batch)
    assert close(found, expected)
    assert len(found) == 2
    assert all((kl > 1e-6) == (method != "dense") for _, kl, _ in found)


@methods
def test_scores_with_gate_and_up_in_one_weight(load, method):
    assert close(*scored_by(load("phi3"), method, prefill="partition", batch="shared"))


@online
@batches
def test_scores_with_shared_experts_and_dense_layers(load, method, batch):
    assert close(*scored_by(load("qwen2_moe"), method, prefill="partition", batch=batch))


@pytest.mark.parametrize(
    ("ratio", "gamma"), [(0.0, 0.2), (0.05, 0.5), (0.5, 0.0), (0.5, 1.0), (0.9, 0.3), (0.25, 0.03), (0.45, 0.07)]
)
@pytest.mark.parametrize("model_type", ["llama", "mixtral"])
def test_scores_at_other_sizes(load, model_type, ratio, gamma):
    for method in ("static", "pop", "full"):
        found, expected = scored_by(
            load(model_type), method, texts(1, PROMPT + 3), ratio=ratio, gamma=gamma, prefill="partition"
        )
        assert close(found, expected)
        assert ratio or found[0][1] < CLOSE


@online
@prefills
@batches
def test_an_expert_that_the_prompt_misses_is_dense_for_its_first_step(load, method, prefill, batch):
    assert close(*scored_by(load("mixtral"), method, texts(2, 7), context=1, prefill=prefill, batch=batch))


@pytest.mark.parametrize("method", naive.KNOWN_BEFOREHAND)
@batches
def test_an_expert_that_the_prompt_misses_is_pruned_where_its_channels_are_known(load, method, batch):
    assert close(*scored_by(load("mixtral"), method, texts(2, 7), context=1, batch=batch))


def test_such_a_prompt_does_miss_experts_that_steps_use(load):
    model, seen = load("mixtral"), []

    class Unit(naive.Unit):
        def step(self, tokens):
            seen.append(self.retained is not None)
            return super().step(tokens)

    def new_unit(weights, *_):
        return Unit(weights, "static", RATIO, 0.0, "dense", 1, None)

    with naive.Watch(model, new_unit) as watch, torch.no_grad():
        cache = naive.DynamicCache(config=model.config)
        for column, token in enumerate(texts(2, 7).split(1, 1)):
            watch.run("step" if column else "prompt", token, cache)
    assert True in seen and False in seen


@models
def test_the_overall_ratio(load, model_type):
    model = load(model_type)
    for method in ("pop", "static"):
        config = config_for(method, 0.2, GAMMA, prefill="partition")
        ratio = naive.ffn_ratio(model, 0.2)
        definition = naive.Method(method, ratio, GAMMA, "partition", round_to=EXPERTS_ROUND_TO)
        assert close(*scored(model, texts(), config, definition))


@covers(model_type=["llama", "mixtral"], method=naive.METHODS, prefill=PREFILLS, batch=BATCHES)
def test_greedy_continuations(load, model_type, method, prefill, batch):
    model, ids, tokens = load(model_type), texts(), 4
    with InDouble():
        config, definition = both(model, method, prefill=prefill, batch=batch)
        found = first_differences(model, ids, PROMPT, config, tokens)
        dense = once("greedy", model, ids, PROMPT, DENSE, tokens)
        assert found == naive.first_differences(model, ids, PROMPT, definition, tokens, dense)
    assert method != "dense" or found == [tokens] * 2


def test_greedy_continuations_part_somewhere(model):
    """So that the test above compares more than zeros and full lengths."""
    found = {
        n
        for seed in range(4)
        for n in first_differences(model, texts(3, PROMPT, seed), PROMPT, both(model, "pop")[0], 5)
    }
    assert found - {0, 5}


@models
def test_calibration_energies(load, model_type):
    model = load(model_type)
    with InDouble():
        found = calibrate(model, calibration_texts()).energies
        with naive.Watch(model, lambda weights, *_: naive.Counter(weights)) as watch, torch.no_grad():
            for ids in calibration_texts():
                model(input_ids=ids, use_cache=False)
    assert found.keys() == watch.units.keys()
    for name, units in watch.units.items():
        sums = [unit.sums for unit in units] if isinstance(units, list) else units.sums
        torch.testing.assert_close(found[name], torch.tensor(sums, dtype=torch.float64), rtol=1e-12, atol=0)


WAYS = {
    "dense": ("dense", "per_sequence", "masked"),
    "partition": ("partition", "per_sequence", "masked"),
    "shared": ("partition", "shared", "masked"),
    "in place": ("partition", "shared", "inplace"),
}


@covers(model_type=MODELS, method=["static", "pop", "full"], way=WAYS)
@torch.no_grad()
def test_one_forward_and_single_steps_give_the_logits_of_the_definition(load, model_type, method, way):
    model, ids, (prefill, batch, backend) = load(model_type), texts(), WAYS[way]
    settings = dict(ratio=RATIO, scope="ffn", gamma=GAMMA, method=method, prefill=prefill, batch=batch, backend=backend)
    with InDouble():
        with prune(model, config_of(**settings, kernels="stock")) as session, session.split(PROMPT):
            whole = model(ids[:, :-1], use_cache=False).logits[:, PROMPT:]
        with prune(model, config_of(**settings, kernels="stock")):
            cache = model(ids[:, :PROMPT], use_cache=True).past_key_values
            columns = ids[:, PROMPT:-1].split(1, 1)
            single = torch.cat([model(c, past_key_values=cache, use_cache=True).logits for c in columns], 1)
        definition = naive.Method(method, RATIO, GAMMA, prefill, batch, EXPERTS_ROUND_TO)
        expected = torch.tensor(naive.step_logits(model, ids, PROMPT, definition), dtype=torch.float64)
    torch.testing.assert_close(whole, expected, rtol=0, atol=CLOSE)
    torch.testing.assert_close(single, expected, rtol=0, atol=CLOSE)


@pytest.fixture
def twins(load):
    """A model whose channels come in pairs of equal scores and opposite effect: only their order decides which one stays."""
    model = load("llama", num_hidden_layers=1)
    mlp = model.model.layers[0].mlp
    saved = {name: value.clone() for name, value in mlp.state_dict().items()}
    with torch.no_grad():
        for parameter in (*mlp.gate_proj.parameters(), *mlp.up_proj.parameters()):
            parameter[1::2] = parameter[::2]
        mlp.down_proj.weight[:, 1::2] = -mlp.down_proj.weight[:, ::2]
    yield model
    mlp.load_state_dict(saved)


PAIRED = dict(ratio=0.27)  # 47 of 64 stay: one without its twin
fixed_by_ranking = pytest.mark.parametrize("method", ["static", "griffin", "magnitude"])


@fixed_by_ranking
def test_of_equal_scores_the_lower_channel_is_kept(twins, method):
    """Not within a step: torch.topk does not say which of equal candidates it takes."""
    assert close(*scored_by(twins, method, **PAIRED))


# would a mistake be noticed? ----------------------------------------------------------------------------------------


RIGHT = naive.sizes, naive.divergence, naive.loss, naive.Unit.step


def without_column_norms(weights, tokens, channel):
    return naive.l2(token[channel] for token in tokens)


def by_absolute_sum(weights, tokens, channel):
    return weights.norms[channel] * sum(abs(token[channel]) for token in tokens)


def by_down_alone(weights, channel):
    return naive.l2(weights.down[channel])


def without_gate(weights, channel):
    return naive.l2([*weights.inputs[-1][channel], *weights.down[channel]])


def higher_channels_first(scores, count):
    return sorted(scores, key=lambda channel: (-scores[channel], -channel))[:count]


def one_more(*args):
    retained, candidates, keep = RIGHT[0](*args)
    return (retained, candidates, keep + 1) if keep else (retained + 1, candidates, keep)


def one_candidate_less(*args):
    retained, candidates, keep = RIGHT[0](*args)
    return retained, candidates - 1, keep


def half_of_gamma(method, size, ratio, gamma, round_to):
    return RIGHT[0](method, size, ratio, gamma / 2, round_to)


def not_rounded(method, size, ratio, gamma, round_to):
    return RIGHT[0](method, size, ratio, gamma)


def the_other_way(dense, pruned):
    return RIGHT[1](pruned, dense)


def of_the_best_token(logits, target):
    return RIGHT[2](logits, naive.best_token(logits))


def median(values):
    return sorted(values)[len(values) // 2]


def step_by_the_prompt(unit, tokens):
    """The candidates that were best in the prompt."""
    return [*unit.retained, *unit.candidates[: unit.keep]] if unit.retained else unit.everything


def prompt_on_kept_channels(unit, tokens):
    """The prefill runs on what a step would keep."""
    unit.learn(tokens)
    return unit.step(tokens)


def prompt_in_full(unit, tokens):
    """The prefill is dense, whatever was asked."""
    unit.learn(tokens)
    return unit.everything


def never_partitioned_late(unit, tokens):
    """An expert that the prompt missed stays dense."""
    return RIGHT[3](unit, tokens) if unit.retained else unit.everything


def partitioned_at_once(unit, tokens):
    """An expert that the prompt missed is pruned in its first step already."""
    if not unit.retained:
        unit.learn(tokens)
    return RIGHT[3](unit, tokens)


def each_alone(method, ids):
    """Rows of a shared batch choose for themselves."""
    return list(ids.split(1))


def all_together(method, ids):
    """Rows share, whatever was asked."""
    return [ids]


PARTITION, SHARED, SHORT = dict(prefill="partition"), dict(batch="shared"), dict(context=1, rows=(2, 7))
MISTAKES = [
    ("activation_score", without_column_norms, "static", "llama", {}),
    ("activation_score", without_column_norms, "static", "mixtral", {}),
    ("activation_score", by_absolute_sum, "static", "llama", {}),
    ("step_score", without_column_norms, "pop", "llama", {}),
    ("step_score", without_column_norms, "full", "gpt2", {}),
    ("step_score", without_column_norms, "pop", "mixtral", {}),
    ("step_score", by_absolute_sum, "pop", "llama", SHARED),
    ("griffin_score", without_column_norms, "griffin", "llama", {}),
    ("griffin_score", without_column_norms, "griffin", "mixtral", {}),
    ("griffin_score", naive.activation_score, "griffin", "gpt2", {}),
    ("magnitude_score", by_down_alone, "magnitude", "gpt2", {}),
    ("magnitude_score", without_gate, "magnitude", "llama", {}),
    ("magnitude_score", without_gate, "magnitude", "mixtral", SHARED),
    ("sizes", one_more, "pop", "llama", {}),
    ("sizes", one_more, "static", "mixtral", {}),
    ("sizes", one_more, "full", "llama", {}),
    ("sizes", one_candidate_less, "pop", "llama", {}),
    ("sizes", half_of_gamma, "pop", "llama", {}),
    ("sizes", not_rounded, "pop", "mixtral", {}),
    ("divergence", the_other_way, "static", "llama", {}),
    ("loss", of_the_best_token, "static", "llama", {}),
    ("mean", median, "static", "llama", {}),
    ("Unit.step", step_by_the_prompt, "pop", "llama", {}),
    ("Unit.step", step_by_the_prompt, "pop", "mixtral", SHARED),
    ("Unit.step", never_partitioned_late, "static", "mixtral", SHORT),
    ("Unit.step", partitioned_at_once, "static", "mixtral", SHORT),
    ("Unit.prompt", prompt_on_kept_channels, "pop", "llama", PARTITION),
    ("Unit.prompt", prompt_in_full, "pop", "llama", PARTITION),
    ("Unit.prompt", prompt_in_full, "magnitude", "llama", PARTITION),
    ("Method.groups", each_alone, "static", "llama", SHARED),
    ("Method.groups", each_alone, "pop", "mixtral", SHARED),
    ("Method.groups", all_together, "griffin", "llama", {}),
]


@pytest.mark.parametrize(
    ("place", "wrong", "method", "model_type", "settings"), MISTAKES, ids=lambda x: getattr(x, "__name__", None)
)
def test_a_wrong_definition_is_noticed(load, monkeypatch, place, wrong, method, model_type, settings):
    model, settings = load(model_type), dict(settings)
    ids = texts(*settings.pop("rows", ()))
    monkeypatch.setattr(f"helpers.naive_evaluation.{place}", wrong)
    assert not close(*scored_by(model, method, ids, **settings))


@fixed_by_ranking
def test_another_order_of_equal_scores_is_noticed(twins, method, monkeypatch):
    monkeypatch.setattr(naive, "best", higher_channels_first)
    assert not close(*scored_by(twins, method, **PAIRED))


def test_other_calibration_text_and_other_random_numbers_are_noticed(model, monkeypatch):
    config, _ = both(model, "random", seed=1)
    _, definition = both(model, "random")
    assert not close(*scored(model, texts(), config, definition))
    own = naive.calibration_scores
    monkeypatch.setattr(naive, "calibration_scores", lambda model, ids: own(model, ids[:1]))
    assert not close(*scored_by(model, "wanda_sp"))


def test_perplexity_is_that_of_the_mean_loss_of_texts():
    assert naive.perplexity([1.0, 3.0]) == pytest.approx(math.e**2)
