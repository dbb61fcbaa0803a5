"""Old names of settings: they work, warn once where the user's code is, and are refused where they have no meaning."""

import dataclasses
import json
import warnings

import pytest

from helpers.tiny_models import tiny
from pop_mm import ConfigError, ExpertPolicy, Pop, PopConfig, Thresholds, prune
from pop_mm.methods import Griffin, Static

pytestmark = pytest.mark.filterwarnings("default:Old name:DeprecationWarning")
MOVED = [
    ({"ratio": 0.4, "gamma": 0.2}, {"method": Pop(gamma=0.2)}, "method=Pop(gamma=0.2)"),
    (
        {"ratio": 0.4, "prefill": "partition", "probe_tokens": 4},
        {"method": Pop(prefill="partition", probe_tokens=4)},
        "Pop(",
    ),
    ({"ratio": 0.4, "scorer": "activation", "gamma": 0.3}, {"method": Pop(scorer="activation", gamma=0.3)}, "Pop("),
    ({"ratio": 0.4, "tp_partition": "global"}, {"method": Pop(tp_partition="global")}, "Pop(tp_partition='global')"),
    ({"ratio": 0.4, "method": "static", "gamma": 0.2}, {"method": Static(gamma=0.2)}, "method=Static(gamma=0.2)"),
    ({"ratio": 0.4, "variant": "full"}, {"method": "full"}, "method='full'"),
    ({"ratio": 0.4, "variant": "static", "prefill": "partition"}, {"method": Static(prefill="partition")}, "Static("),
    ({"budget": 0.6, "method": "pop", "gamma": 0.2}, {"method": Pop(gamma=0.2)}, "method=Pop(gamma=0.2)"),
    ({"budget": 0.6, "head_budget": 0.5}, {"method": Thresholds(head_budget=0.5)}, "Thresholds(head_budget=0.5)"),
    (
        {"ratio": 0.4, "min_tokens": 3, "unseen": "weights"},
        {"experts": ExpertPolicy(3, "weights")},
        "unseen='weights')",
    ),
    ({"ratio": 0.4, "expert_score": "routed"}, {"experts": ExpertPolicy(score="routed")}, "(score='routed')"),
    ({"budget": 0.6, "prune_shared": False}, {"experts": ExpertPolicy(prune_shared=False)}, "(prune_shared=False)"),
    ({"ratio": 0.4, "round_to": 16}, {}, "leave out what is the default or has no effect"),
    ({"ratio": 0.4, "gamma": 0.1}, {}, "leave out what is the default or has no effect"),
]
moved = pytest.mark.parametrize(("old", "new", "advice"), MOVED, ids=[str(old) for old, _, _ in MOVED])


def wanted(old, new):
    amount = {name: value for name, value in old.items() if name in ("ratio", "budget")}
    return PopConfig(**amount, **new)


def warned(make):
    """What a call gives, and what it says of old names, one sentence."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = make()
    said = [warning for warning in caught if issubclass(warning.category, DeprecationWarning)]
    assert len(said) == 1 and said[0].filename == __file__
    return found, str(said[0].message)


@moved
@pytest.mark.parametrize(
    "make", [lambda s: PopConfig(**s), PopConfig.from_dict, lambda s: PopConfig.from_json(json.dumps(s))]
)
def test_old_names_work_and_one_warning_says_what_to_write(old, new, advice, make):
    config, said = warned(lambda: make(old))
    assert config == wanted(old, new)
    assert advice in said and all(name in said for name in old if name not in ("ratio", "budget", "method"))


@moved
def test_old_names_work_as_keywords_of_prune(old, new, advice):
    session, said = warned(lambda: prune(tiny("llama"), **{"backend": "masked", **old}))
    assert session.config == dataclasses.replace(wanted(old, new), backend="masked") and advice in said
    session.attach().detach()


def test_an_old_settings_file_is_read(tmp_path):
    """All 21 settings stood in what ``to_json`` of 0.2.0 wrote, those that the method has no use for with their defaults."""
    for amount in ({"ratio": 0.4, "budget": None}, {"ratio": None, "budget": 0.6}):
        first = {**PopConfig(**amount).to_dict(), "method": "auto"}
        old = {name: value for name, value in first.items() if name not in ("method_settings", "experts")}
        assert len(old) == 21
        (tmp_path / "settings.json").write_text(json.dumps(old))
        config, said = warned(lambda: PopConfig.load(tmp_path / "settings.json"))
        assert config == PopConfig(**amount) and "leave out" in said


def test_what_is_written_now_has_both_names_and_is_read_without_a_warning(tmp_path):
    config = PopConfig(0.4, method=Griffin(gamma=0.2), experts=ExpertPolicy(min_tokens=3, score="routed"))
    values = config.to_dict()
    assert (values["gamma"], values["min_tokens"], values["expert_score"]) == (0.2, 3, "routed")
    assert (values["variant"], values["round_to"], values["head_budget"]) == ("pop", 1, None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert PopConfig.from_dict(values) == PopConfig.load(config.save(tmp_path / "settings.json")) == config
    with pytest.raises(
        ConfigError, match=r"gamma=0.3 contradicts 0.2 in method_settings or experts. 'gamma' is the old name"
    ):
        PopConfig.from_dict({**values, "gamma": 0.3})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"budget": 0.6, "gamma": 0.2}, "gamma=0.2 is a setting of POP, and has no meaning for method='thresholds'"),
        ({"budget": 0.6, "prefill": "partition"}, "prefill='partition' is a setting of POP"),
        ({"budget": 0.6, "min_tokens": 2}, "min_tokens=2 is a setting of POP"),
        ({"ratio": 0.4, "head_budget": 0.5}, "head_budget=0.5 is a setting of method='thresholds'"),
        ({"ratio": 0.4, "method": "griffin", "scorer": "activation"}, "scorer='activation' is a setting of POP"),
        ({"ratio": 0.4, "variant": "static", "method": "full"}, "variant='static' contradicts method='full'"),
        ({"ratio": 0.4, "variant": "best"}, "variant must be one of 'pop', 'static', 'full'; got 'best'"),
        ({"ratio": 0.4, "gamma": 1.01}, r"gamma must lie in \[0, 1\]; got 1.01"),
        ({"ratio": 0.4, "expert_score": "router"}, "score must be one of 'plain', 'routed'"),
        ({"ratio": 0.4, "round_to": 0}, "round_to must be a positive integer; got 0"),
    ],
)
@pytest.mark.parametrize("make", [lambda s: PopConfig(**s), PopConfig.from_dict])
def test_an_old_name_that_does_not_fit_is_refused_by_name(settings, message, make):
    with pytest.raises(ConfigError, match=message):
        make(settings)


def test_old_names_beside_positional_settings_and_in_replace():
    config, _ = warned(lambda: PopConfig(0.4, "ffn", gamma=0.2))
    assert config == PopConfig(0.4, "ffn", method=Pop(gamma=0.2))
    again, _ = warned(lambda: dataclasses.replace(config, gamma=0.3))
    assert again == PopConfig(0.4, "ffn", method=Pop(gamma=0.3))


def test_old_names_are_read():
    config = PopConfig(0.4, method=Static(gamma=0.2), experts=ExpertPolicy(score="routed"))
    for name, value, advice in (
        ("gamma", 0.2, "config.chosen.gamma"),
        ("expert_score", "routed", "config.experts.score"),
        ("variant", "static", "config.chosen_method"),
        ("round_to", 1, "no effect"),
    ):
        found, said = warned(lambda name=name: getattr(config, name))
        assert found == value and advice in said
