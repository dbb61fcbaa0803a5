"""Tuning: the search against a known curve, and what it finds on tiny models against single evaluations."""

import json

import pytest
import torch

import pop_mm
from helpers.tiny_folder import WORDS, save
from pop_mm import PopConfig
from pop_mm.evaluation.fidelity import score_texts
from pop_mm.tuning import TuneError, TunePoint, TuneResult, run
from pop_mm.tuning.quality import Quality
from pop_mm.tuning.search import first_that_holds, most_questions
from pop_mm.tuning.speed import Speed

TEXTS = [" ".join(f"w{3 + (start + 7 * n * n) % 90}" for n in range(60)) for start in (0, 5, 11)]
SIZES = {"prompt": 12, "continuation": 6, "limit": 3, "rounds": 0}


class Words:
    """A tokenizer of whole words."""

    def __call__(self, text, **_):
        return {"input_ids": [WORDS.index(word) for word in text.split()]}


@pytest.fixture
def tiny(load):
    return load("llama", torch.float32)


# the search ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, 2, 7, 8, 79])
def test_bisection_finds_the_first_with_few_questions(count):
    for first in range(count + 1):
        asked = []

        def holds(n, first=first, asked=asked):
            asked.append(n)
            return n >= first

        assert first_that_holds(range(count), holds) == (first if first < count else None)
        assert len(asked) <= most_questions(count) and len(set(asked)) == len(asked)


def scripted(monkeypatch, model, kl=None, speed=None):
    """The search on a curve that is known: KL or speed-up by scope and share of the layers' bytes."""

    layers = [p.numel() for name, p in model.named_parameters() if ".layers." in name and p.dim() > 1]
    own = sum(p.numel() for name, p in model.named_parameters() if "self_attn" in name and p.dim() > 1)
    attention = own / sum(layers)

    def measure(self, config):
        share = config.budget if config.scope == "overall" else attention + config.budget * (1 - attention)
        self._tick()
        found = kl(config.scope, share)
        return Quality([found * factor for factor in (0.9, 1.0, 1.1)], 0.5)

    def by_speed(model, config, *_):
        return Speed(100.0, 100 * speed(config.budget), [speed(config.budget)] * 3)

    if kl is not None:
        monkeypatch.setattr(run.QualityMeter, "measure", measure)
    if speed is not None:
        monkeypatch.setattr(run, "measure_speed", by_speed)


def test_the_smallest_budget_that_keeps_the_kl(tiny, monkeypatch):
    scripted(monkeypatch, tiny, kl=lambda scope, share: (1 - share) ** 2 * (1 if scope == "overall" else 2))
    found = pop_mm.tune(tiny, Words(), max_kl=0.1, text=TEXTS, **SIZES)
    assert found.met and found.config == PopConfig(budget=0.69, method="thresholds")  # 0.31 ** 2 < 0.1 < 0.32 ** 2
    assert found.chosen.kl == pytest.approx(0.31**2) and found.chosen.kl_interval[0] < found.chosen.kl
    assert len(found.curve) <= most_questions(80) + 1
    assert [point.holds for point in found.curve] == [point.kl <= 0.1 for point in found.curve]
    assert sum(point.scope == "ffn" for point in found.curve) == 1, "the other split was worse, so it was measured once"


def test_a_better_split_is_followed(tiny, monkeypatch):
    scripted(monkeypatch, tiny, kl=lambda scope, share: (1 - share) ** 2 * (2 if scope == "overall" else 1))
    found = pop_mm.tune(tiny, Words(), max_kl=0.1, text=TEXTS, **SIZES)
    assert found.chosen.scope == "ffn" and found.config.scope == "ffn"
    assert found.chosen.bytes_read < min(p.bytes_read for p in found.curve if p.scope == "overall" and p.holds)
    assert found.config.budget < found.chosen.bytes_read, "a budget of FFNs alone, beside whole attention"


def test_the_largest_budget_that_is_fast_enough(tiny, monkeypatch):
    scripted(monkeypatch, tiny, speed=lambda budget: 1 / budget)
    monkeypatch.setattr(run, "_why_masked", lambda plans: None)
    found = pop_mm.tune(tiny, Words(), min_speedup=1.5, text=TEXTS, **{**SIZES, "rounds": 3})
    assert found.config.budget == 0.65 and found.chosen.speedup == pytest.approx(1 / 0.65)
    assert found.chosen.kl is not None, "what it costs is measured too"


# what is measured ----------------------------------------------------------------------------------------------------


def test_the_kl_is_that_of_an_evaluation(tiny):
    found = pop_mm.tune(tiny, Words(), max_kl=1e-3, text=TEXTS, **SIZES)
    ids = torch.stack([torch.tensor(Words()(text)["input_ids"][:19]) for text in TEXTS])
    for point in found.curve:
        config = PopConfig(budget=point.budget, scope=point.scope, backend="masked")
        scores = score_texts(tiny, ids, 12, config)
        assert point.kl == pytest.approx(sum(score.kl for score in scores) / 3)
        assert point.holds == (point.kl <= 1e-3)


def test_speed_and_progress(tiny):
    steps = []
    sizes = {**SIZES, "limit": 1, "rounds": 2, "new_tokens": 4}
    found = pop_mm.tune(tiny, Words(), max_kl=1.0, text=TEXTS, progress=lambda *step: steps.append(step), **sizes)
    low, high = found.chosen.speedup_range
    assert 0 < low <= found.chosen.speedup <= high
    assert [done for done, _ in steps] == list(range(1, len(steps) + 1))
    assert all(done <= total for done, total in steps)
    assert found.chosen.kl_interval is None, "one text says nothing about others"


# results -------------------------------------------------------------------------------------------------------------


def result(met=True):
    points = [TunePoint(n / 100, "overall", n / 100, n > 60, 1 / n, (0.9 / n, 1.1 / n), 0.8) for n in range(20, 99, 2)]
    return TuneResult(0.05, None, points, points[21] if met else None, points[21], 12, 256, 128, ["a <note>"])


def test_a_result_is_short_and_has_json_and_html(tmp_path):
    found = result()
    assert len(repr(found)) < 400 and "budget=0.62" in repr(found)
    values = json.loads(found.to_json())
    assert values["met"] and values["config"] == {"budget": 0.62, "method": "thresholds"}
    assert len(values["curve"]) == len(found.curve)
    html = found._repr_html_()
    assert html.count("<tr") == len(found.curve) + 1 and "a &lt;note&gt;" in html
    assert PopConfig.load(found.save(tmp_path / "settings.json")) == found.config


def test_a_target_that_is_not_met_saves_nothing(tmp_path):
    found = result(met=False)
    assert not found.met and found.config is None and "not met" in repr(found)
    with pytest.raises(TuneError, match=r"KL at most 0\.05, cannot be met .* at a budget of 0\.62"):
        found.save(tmp_path / "settings.json")
    assert not (tmp_path / "settings.json").exists()


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ({}, "Give one target"),
        ({"max_kl": 0.1, "min_speedup": 2}, "Give one target"),
        ({"max_kl": 0}, "max_kl must be a number above 0"),
        ({"max_kl": float("nan")}, "max_kl must be a number above 0"),
        ({"min_speedup": 1}, "min_speedup must be a number above 1"),
        ({"min_speedup": 2, "rounds": 0}, "rounds must be 1 or more"),
        ({"max_kl": 0.1, "new_tokens": 3}, "new_tokens must be 4 or more"),
    ],
)
def test_bad_targets(target, message):
    with pytest.raises(TuneError, match=message):
        pop_mm.tune(None, None, **target)


# the command ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save(tmp_path_factory.mktemp("model"), intermediate_size=64)


@pytest.fixture
def text(tmp_path):
    (tmp_path / "text.txt").write_text(TEXTS[0])
    return tmp_path / "text.txt"


def test_the_command_writes_settings_that_generate_takes(call, folder, text, tmp_path):
    file, options = tmp_path / "settings.json", ("--prompt", 12, "--continuation", 6, "--rounds", 0)
    code, out, err = call("tune", "--model", folder, "--text", text, "--max-kl", 0.01, "--save", file, *options)
    assert code == 0, err
    assert "chosen" in out and "--settings" in out.replace("\n", "")
    config = PopConfig.load(file)
    assert config.chosen_method == "thresholds"
    asked = ("--prompt", "w5 w9 w31 w7 w44", "--max-new-tokens", 2, "--json", "-", "--settings", file)
    code, out, _ = call("generate", "--model", folder, *asked)
    assert code == 0 and json.loads(out)["config"]["budget"] == config.budget


def test_the_command_says_what_was_reached(call, folder, text, tmp_path):
    file = tmp_path / "settings.json"
    options = ("--prompt", 12, "--continuation", 6, "--rounds", 0, "--json", tmp_path / "tune.json", "--save", file)
    code, out, err = call("tune", "--model", folder, "--text", text, "--max-kl", 1e-12, *options)
    assert code == 1
    assert "cannot be met" in err and "the best is a KL of" in err and "budget" in out
    assert not file.exists() and not json.loads((tmp_path / "tune.json").read_text())["met"]
    code, _, err = call("tune", "--model", folder)
    assert code == 2 and "Give one target" in err
