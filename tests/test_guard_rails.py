"""What is said to those who are about to be disappointed, and what is refused when it is registered."""

import dataclasses
import gc
import typing
import warnings

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import pop_mm
import pop_mm.settings.advice
from helpers.tiny_models import tiny
from pop_mm import ConfigError, PopConfig, Scorer, register_scorer
from pop_mm.errors import PopWarning
from pop_mm.settings.advice import advice
from pop_mm.settings.keywords import Settings


def warned(action):
    """What was said while and after ``action`` ran."""
    gc.collect()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        action()
        gc.collect()
    return [str(found.message) for found in caught if issubclass(found.category, PopWarning)]


# sessions that are never attached -------------------------------------------------------------------------------------


def test_a_session_that_is_never_attached_says_so_once():
    model = tiny("llama")

    def forget():
        pop_mm.prune(model, ratio=0.4)

    (said,) = warned(forget)
    assert "never attached" in said and "with pop_mm.prune(model, ...) as session:" in said


def test_sessions_that_were_used_say_nothing():
    model = tiny("llama")

    def use():
        with pop_mm.prune(model, ratio=0.4):
            pass
        pop_mm.prune(model, budget=0.6).attach().detach()
        for settings in ({"ratio": 0.4}, {"budget": 0.6}):
            assert pop_mm.prune(model, **settings).report  # what would be done
        pop_mm.Session(model, PopConfig(0.4))

    assert warned(use) == []


def test_a_refused_session_says_nothing():
    def fail():
        with pytest.raises(ConfigError):
            pop_mm.prune(tiny("llama"), ratio=0.99)

    assert warned(fail) == []


# settings that are known to break a model -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parameters", "config", "known"),
    [
        (135e6, PopConfig(0.4), True),
        (135e6, PopConfig(0.3), True),
        (135e6, PopConfig(0.2), False),
        (135e6, PopConfig(0.3, scope="ffn"), False),
        (135e6, PopConfig(0.4, scope="ffn"), True),
        (135e6, PopConfig(0.4, method="static"), True),
        (135e6, PopConfig(0.4, method="full"), False),
        (135e6, PopConfig(budget=0.75, method="pop"), True),
        (135e6, PopConfig(budget=0.85, method="pop"), False),
        (135e6, PopConfig(budget=0.65), False),
        (135e6, PopConfig(budget=0.55), False),
        (135e6, PopConfig(budget=0.45), True),
        (135e6, PopConfig(budget=0.4, scope="ffn"), False),
        (135e6, PopConfig(budget=0.2, scope="ffn"), True),
        (7e9, PopConfig(budget=0.3), False),
        (7e9, PopConfig(0.4), False),
        (2e6, PopConfig(0.4), False),
    ],
)
def test_what_is_known(parameters, config, known):
    said = advice(int(parameters), config)
    assert (said is not None) == known
    if said:
        assert "135 million parameters" in said and "budget=0.65" in said
        assert ("method='thresholds'" in said) == (config.chosen_method != "thresholds")


def test_prune_says_it_once(monkeypatch):
    monkeypatch.setattr(pop_mm.settings.advice, "_said", set())
    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(LlamaConfig(num_hidden_layers=30, vocab_size=49152, **sizes)).eval()

    def twice():
        for _ in range(2):
            assert pop_mm.prune(model, ratio=0.4).report
        assert pop_mm.prune(model, budget=0.65).report

    (said,) = warned(twice)
    assert said.startswith("ratio=0.4 is known to break a model of ")


# typed keywords -------------------------------------------------------------------------------------------------------


def test_the_keywords_are_the_settings():
    wanted = {field.name: field.type for field in dataclasses.fields(PopConfig)}
    assert set(Settings.__annotations__) == set(wanted)
    hints, own = typing.get_type_hints(Settings), typing.get_type_hints(PopConfig)
    assert hints == {name: own[name] for name in wanted}


# scorers --------------------------------------------------------------------------------------------------------------


def scorer(weight, activations=lambda h: h):
    class Mine(Scorer):
        name = "tests_checked"

        def channel_weight(self, ffn):
            return weight(ffn)

        def prompt_activations(self, h):
            return activations(h)

    return Mine


BAD = {
    "of shape (7,)": scorer(lambda ffn: torch.ones(ffn.size - 1)),
    "of shape float": scorer(lambda ffn: 1.0),
    "NaN, infinite or negative": scorer(lambda ffn: torch.full((ffn.size,), torch.nan)),
    "are NaN, infinite or negative": scorer(lambda ffn: -torch.ones(ffn.size)),
    "made activations": scorer(lambda ffn: torch.ones(ffn.size), lambda h: h[..., :-1]),
}


@pytest.fixture
def registry(monkeypatch):
    monkeypatch.setattr(pop_mm.methods.scoring._SCORERS, "_classes", dict(pop_mm.methods.scoring._SCORERS))
    return pop_mm.methods.scoring


@pytest.mark.parametrize("said", BAD)
def test_a_scorer_is_checked_when_it_is_registered(registry, said):
    with pytest.raises(ConfigError) as caught:
        register_scorer(BAD[said])
    assert said in str(caught.value)
    assert "tests_checked" not in registry._SCORERS


@pytest.mark.parametrize("thing", [3, int, Scorer])
def test_only_named_scorers_are_registered(thing):
    with pytest.raises(ConfigError, match="takes a subclass"):
        register_scorer(thing)


def test_a_scorer_that_needs_arguments(registry):
    class Needs(scorer(lambda ffn: torch.ones(ffn.size))):
        def __init__(self, power):
            self.power = power

    with pytest.raises(ConfigError, match="cannot be made without arguments"):
        register_scorer(Needs)


def test_a_scorer_that_only_a_real_model_satisfies(registry):
    def weight(ffn):
        return ffn.holder.gate_proj.weight.detach().norm(dim=1)

    assert register_scorer(scorer(weight))
    with pop_mm.prune(tiny("llama"), ratio=0.4, method=pop_mm.Pop(scorer="tests_checked")):
        pass


def test_an_instance_is_checked_on_the_model():
    def weight(ffn):
        return torch.full((ffn.size,), torch.nan if ffn.layer else 1.0)

    session = pop_mm.prune(tiny("llama"), ratio=0.4, method=pop_mm.Pop(scorer=scorer(weight)()))
    with pytest.raises(ConfigError, match=r"gave model.layers.1.mlp weights that are NaN"):
        session.attach()
    assert not session.attached
