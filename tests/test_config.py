import dataclasses
import json
import math

import pytest
import torch

from pop_mm import ConfigError, ExpertPolicy, Pop, PopConfig, Scorer, Thresholds
from pop_mm.methods import METHODS, Random, Static, get_method
from pop_mm.settings.config import as_config
from pop_mm.settings.deprecated import OLD_NAMES

INVALID = [
    ({"ratio": 1.0}, r"ratio must lie in \[0, 1\); got 1.0"),
    ({"ratio": -0.1}, r"ratio must lie in \[0, 1\)"),
    ({"ratio": 20}, r"ratio must lie in \[0, 1\); got 20"),
    ({"ratio": "0.4"}, r"ratio must be a number in \[0, 1\); got '0.4'"),
    ({"ratio": True}, "ratio must be a number"),
    ({"ratio": math.nan}, "ratio must be a number"),
    ({"ratio": math.inf}, "ratio must be a number"),
    ({"scope": "block"}, "scope must be one of 'overall', 'ffn'; got 'block'"),
    ({"batch": 4}, "batch must be one of 'shared', 'per_sequence'; got 4"),
    ({"backend": "in-place"}, "backend must be one of 'auto', 'masked', 'inplace'; got 'in-place'"),
    ({"experts": 3}, "experts must be a pop_mm.ExpertPolicy; got 3"),
    ({"layer_ratios": [0.1, 0.2]}, "layer_ratios must map layer numbers to FFN ratios"),
    ({"layer_ratios": None}, "layer_ratios must map layer numbers to FFN ratios"),
    ({"layer_ratios": {-1: 0.1}}, "a layer is an integer from 0; got -1"),
    ({"layer_ratios": {1.5: 0.1}}, "a layer is an integer from 0; got 1.5"),
    ({"layer_ratios": {True: 0.1}}, "a layer is an integer from 0; got True"),
    ({"layer_ratios": {0: 1.0}}, r"layer_ratios\[0\] must lie in \[0, 1\); got 1.0"),
    ({"layer_ratios": {0: "all"}}, r"layer_ratios\[0\] must be a number"),
    (
        {"backend": "inplace", "batch": "per_sequence"},
        "backend='inplace' .* cannot serve batch='per_sequence'.*backend='auto' or 'masked'",
    ),
]


@pytest.mark.parametrize(("settings", "message"), INVALID, ids=[str(settings) for settings, _ in INVALID])
@pytest.mark.parametrize("make", [lambda s: PopConfig(**s), PopConfig.from_dict, lambda s: as_config(None, s)])
def test_invalid_value_says_what_is_allowed(settings, message, make):
    with pytest.raises(ConfigError, match=message):
        make({"ratio": 0.4, **settings})


OF_POP = [
    ({"gamma": 1.01}, r"gamma must lie in \[0, 1\]; got 1.01"),
    ({"gamma": -1e-9}, r"gamma must lie in \[0, 1\]"),
    ({"gamma": [0.1]}, "gamma must be a number"),
    ({"prefill": "sparse"}, "prefill must be one of 'dense', 'partition'; got 'sparse'"),
    ({"scorer": "wnda"}, "Unknown scorer 'wnda'; known: .*wanda.* Did you mean 'wanda'"),
    ({"scorer": 3}, "Unknown scorer 3"),
    ({"tp_partition": "all"}, "tp_partition must be one of 'shard', 'global'; got 'all'"),
    ({"prefill": "partition", "probe_tokens": -1}, "probe_tokens must be an integer from 0; got -1"),
    ({"prefill": "partition", "probe_tokens": True}, "probe_tokens must be an integer from 0; got True"),
    ({"prefill": "partition", "probe_tokens": 64.0}, "probe_tokens must be an integer from 0; got 64.0"),
    ({"probe_tokens": 64}, "probe_tokens=64 is for prefill='partition'.*got prefill='dense'"),
]


@pytest.mark.parametrize(("settings", "message"), OF_POP, ids=[str(settings) for settings, _ in OF_POP])
@pytest.mark.parametrize(
    "make",
    [
        lambda s: Pop(**s),
        lambda s: Pop().replace(**s),
        lambda s: PopConfig.from_dict({"ratio": 0.4, "method_settings": s}),
        lambda s: PopConfig(0.4, method=type("Own", (Pop,), s)()),
    ],
    ids=["made", "replaced", "plain", "of a class"],
)
def test_invalid_setting_of_a_method_says_what_is_allowed(settings, message, make):
    with pytest.raises(ConfigError, match=message):
        make(settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"min_tokens": 0}, "min_tokens must be a positive integer; got 0"),
        ({"min_tokens": 8.0}, "min_tokens must be a positive integer"),
        ({"min_tokens": True}, "min_tokens must be a positive integer"),
        ({"unseen": "masked"}, "unseen must be one of 'dense', 'weights'; got 'masked'"),
        ({"score": "router"}, "score must be one of 'plain', 'routed'; got 'router'"),
        ({"prune_shared": 1}, "prune_shared must be true or false; got 1"),
    ],
)
@pytest.mark.parametrize("make", [lambda s: ExpertPolicy(**s), lambda s: PopConfig.from_dict({"experts": s})])
def test_invalid_setting_of_experts_says_what_is_allowed(settings, message, make):
    with pytest.raises(ConfigError, match=message):
        make(settings)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"ratio": 0.4, "method_settings": {"gama": 0.1}}, "Unknown setting 'gama' of method='pop'; .*mean 'gamma'"),
        (
            {"method_settings": {"gamma": 0.2}},
            "gamma=0.2 is a setting of POP, and has no meaning for method='thresholds'",
        ),
        (
            {"ratio": 0.4, "method_settings": {"head_budget": 0.5}},
            "head_budget=0.5 is a setting of method='thresholds'",
        ),
        ({"ratio": 0.4, "method": "griffin", "method_settings": {"scorer": "wanda"}}, "scorer='wanda' is .*'griffin'"),
        ({"ratio": 0.4, "method_settings": 3}, "method_settings must map"),
        ({"experts": {"expert_score": "plain"}}, "Unknown setting 'expert_score' of experts; known: min_tokens, "),
    ],
)
def test_a_setting_that_is_not_the_methods_is_refused_by_name(values, message):
    with pytest.raises(ConfigError, match=message):
        PopConfig.from_dict(values)


def test_config_error_is_a_value_error():
    with pytest.raises(ValueError, match="ratio"):
        PopConfig(2.0)


@pytest.mark.parametrize("ratio", [0, 0.0, 0.4, 0.999])
@pytest.mark.parametrize("gamma", [0, 0.1, 1, 1.0])
def test_the_whole_range_is_valid(ratio, gamma):
    config = PopConfig(ratio, method=Pop(gamma=gamma))
    assert (config.ratio, config.chosen.gamma) == (ratio, gamma)


FULL = {
    "ratio": 0.3,
    "scope": "ffn",
    "batch": "per_sequence",
    "backend": "masked",
    "layer_ratios": {0: 0.0, 11: 0.5},
    "method": Static(gamma=0.25, prefill="partition", probe_tokens=64, scorer="activation", tp_partition="global"),
    "experts": ExpertPolicy(min_tokens=3, unseen="weights", score="routed", prune_shared=False),
    "modality_weights": {"image": 0.5},
    "kernels": "stock",
}


OF_THRESHOLDS = {"budget": 0.7, "method": Thresholds(head_budget=0.9)}  # which have no meaning beside a ratio


@pytest.mark.parametrize(
    "settings", [{"ratio": 0.4}, FULL, OF_THRESHOLDS], ids=["defaults", "everything", "thresholds"]
)
def test_json_round_trip(settings):
    config = PopConfig(**settings)
    assert PopConfig.from_json(config.to_json()) == config
    assert PopConfig.from_dict(config.to_dict()) == config
    assert PopConfig.from_dict(config.changes()).chosen == config.chosen
    names = {f.name for f in dataclasses.fields(PopConfig)}
    assert set(json.loads(config.to_json())) == {*names, "method_settings", *OLD_NAMES}


def test_the_round_trip_of_everything_leaves_no_default():
    assert set(FULL) == {f.name for f in dataclasses.fields(PopConfig)} - {"budget"}
    assert set(FULL["method"].changes()) == set(Pop.settings)
    assert set(FULL["experts"].changes()) == {f.name for f in dataclasses.fields(ExpertPolicy)}
    default = PopConfig(0.4)
    assert all(getattr(default, name) != value for name, value in FULL.items())


def test_an_own_scorer_is_written_by_its_name():
    class Mine(Scorer):
        name = "mine"

        def channel_weight(self, ffn):
            return torch.ones(ffn.size)

    assert PopConfig(0.4, method=Pop(scorer=Mine())).to_dict()["method_settings"]["scorer"] == "mine"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "Not a JSON config"),
        ("[0.4]", "A JSON config is an object; got list"),
        ('{"ratio": 0.4, "gama": 0.1}', "Unknown setting 'gama'; known: .*method.* Did you mean 'gamma'"),
        ('{"ratio": 0.4, "zzz": 0.1}', r"Unknown setting 'zzz'; known: ratio, [^?]*$"),
        ('{"ratio": 0.4, "layer_ratios": {"first": 0.1}}', "a layer is an integer from 0; got {'first': 0.1}"),
        ('{"ratio": NaN}', "ratio must be a number"),
        ('{"ratio": 0.4, "scope": "ffn", "ratio": 0.5}', "the key 'ratio' is given more than once"),
        ('{"ratio": 0.4, "layer_ratios": {"1": 0.1, "1": 0.2}}', "the key '1' is given more than once"),
        ('{"ratio": 0.4, "layer_ratios": {"1": 0.1, "01": 0.2}}', "names layer 1 more than once"),
        ("[" * 100_000, "Not a JSON config"),
    ],
)
def test_bad_json(text, message):
    with pytest.raises(ConfigError, match=message):
        PopConfig.from_json(text)


def test_a_layer_that_is_named_twice():
    with pytest.raises(ConfigError, match="names layer 1 more than once"):
        PopConfig.from_dict({"ratio": 0.4, "layer_ratios": {1: 0.1, "1": 0.2}})


def test_frozen_and_apart_from_what_it_was_made_from():
    layers = {0: 0.1}
    config = PopConfig(0.4, layer_ratios=layers)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.ratio = 0.5
    layers[0] = 2.0
    assert config.layer_ratios == {0: 0.1}


def test_as_config():
    config = PopConfig(0.4, method=Pop(gamma=0.2))
    assert as_config(config, {}) is config
    assert as_config(0.4, {"method": Pop(gamma=0.2)}) == config
    assert as_config(None, {"ratio": 0.4, "method": Pop(gamma=0.2)}) == config
    with pytest.raises(ConfigError, match=r"not both \(got scope\)"):
        as_config(config, {"scope": "ffn"})
    with pytest.raises(ConfigError, match="given twice"):
        as_config(0.4, {"ratio": 0.3})
    assert as_config(None, {}) == PopConfig(budget=0.65)
    with pytest.raises(ConfigError, match="Did you mean 'gamma'"):
        as_config(0.4, {"gama": 0.3})


def test_methods_with_the_same_settings_are_equal_and_say_what_differs():
    assert Pop() == Pop(gamma=0.1) == get_method("pop") and hash(Pop()) == hash(Pop(gamma=0.1))
    assert Pop() != Pop(gamma=0.2) and Pop() != Static() and Random(1) != Random(2) and Random(1) == Random(1)
    assert repr(Pop(prefill="partition", gamma=0.1)) == "Pop(prefill='partition')"
    assert repr(Random(3, gamma=0.2)) == "Random(gamma=0.2, seed=3)" and repr(Thresholds()) == "Thresholds()"
    config = PopConfig(0.4, method="pop")
    assert config == PopConfig(0.4, method=Pop()) and config.chosen == PopConfig(0.4).chosen == Pop()
    assert PopConfig().chosen == Thresholds()
    assert all(
        PopConfig.from_dict(PopConfig(budget=0.9, method=name).to_dict()).chosen_method == name for name in METHODS
    )


def test_a_replaced_setting_leaves_the_method_as_it_was():
    before = Random(3)
    assert before.replace(gamma=0.2, seed=4) == Random(4, gamma=0.2) and before == Random(3)
