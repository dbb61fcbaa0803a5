"""Settings files: what is written, what is read, and how a command's options stand to them."""

import json

import pytest

from helpers.tiny_folder import save
from pop_mm import ConfigError, Pop, PopConfig, Scorer

PROMPT = "w5 w9 w31 w7 w44"
CONFIGS = [
    PopConfig(),
    PopConfig(budget=0.5, scope="ffn"),
    PopConfig(0.4, method=Pop(gamma=0.2), layer_ratios={1: 0.1}, modality_weights={"image": 0.5}),
    PopConfig(budget=0.7, method="pop", kernels="stock"),
    PopConfig(0.3, method="static"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save(tmp_path_factory.mktemp("model"), intermediate_size=64)


@pytest.mark.parametrize("config", CONFIGS, ids=[config.label for config in CONFIGS])
def test_a_saved_config_loads_as_it_was(config, tmp_path):
    path = config.save(tmp_path / "settings.json")
    found = PopConfig.load(path)
    assert {**found.to_dict(), "method": ""} == {**config.to_dict(), "method": ""}
    assert found.chosen_method == config.chosen_method
    assert "variant" not in json.loads(path.read_text())


def test_a_file_has_only_what_was_chosen(tmp_path):
    path = PopConfig(budget=0.5).save(str(tmp_path / "settings.json"))
    assert json.loads(path.read_text()) == {"budget": 0.5, "method": "thresholds"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"budgte": 0.5}', r"settings\.json: Unknown setting 'budgte'.* Did you mean 'budget'"),
        ("0.5", r"settings\.json: A JSON config is an object"),
        ('{"budget": 2}', r"settings\.json: budget must be a number in \(0, 1\]"),
        (None, r"settings\.json cannot be read: No such file"),
    ],
)
def test_a_file_that_is_wrong_is_named(text, message, tmp_path):
    path = tmp_path / "settings.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        PopConfig.load(path)


def test_what_no_file_can_name_is_not_saved(tmp_path):
    class Mine(Scorer):
        name = "not_registered"

        def channel_weight(self, ffn):
            raise NotImplementedError

    with pytest.raises(ConfigError, match="not_registered"):
        PopConfig(0.4, method=Pop(scorer=Mine())).save(tmp_path / "settings.json")
    assert not (tmp_path / "settings.json").exists()
    with pytest.raises(ConfigError, match="cannot be written"):
        PopConfig().save(tmp_path)


@pytest.mark.parametrize(
    ("stored", "options", "wanted"),
    [
        (PopConfig(budget=0.5), (), PopConfig(budget=0.5)),
        (PopConfig(budget=0.5, scope="ffn"), ("--budget", 0.8), PopConfig(budget=0.8, scope="ffn")),
        (PopConfig(budget=0.5), ("--ratio", 0.2), PopConfig(0.2)),
        (PopConfig(0.2, method=Pop(gamma=0.3)), ("--gamma", 0.1), PopConfig(0.2)),
        (PopConfig(0.2, scope="ffn"), ("--scope", "overall"), PopConfig(0.2)),
        (PopConfig(0.2, method="static"), ("--budget", 0.7), PopConfig(budget=0.7, method="static")),
    ],
)
def test_options_that_are_given_win(call, folder, tmp_path, stored, options, wanted):
    file = stored.save(tmp_path / "settings.json")
    asked = ("--model", folder, "--prompt", PROMPT, "--max-new-tokens", 2, "--json", "-", "--settings", file)
    code, out, err = call("generate", *asked, *options)
    assert code == 0, err
    found = PopConfig.from_dict(json.loads(out)["config"])
    assert {**found.to_dict(), "method": ""} == {**wanted.to_dict(), "method": ""}
    assert found.chosen_method == wanted.chosen_method


def test_two_amounts_are_an_error(call, folder):
    for command in (("generate", "--prompt", PROMPT), ("inspect",), ("app",)):
        code, _, err = call(*command, "--model", folder, "--ratio", 0.2, "--budget", 0.5)
        assert code == 2 and "Give one" in err


def test_inspect_eval_and_bench_take_a_file(call, folder, tmp_path):
    file = PopConfig(budget=0.5, scope="ffn").save(tmp_path / "settings.json")
    code, out, _ = call("inspect", "--model", folder, "--settings", file, "--json")
    assert code == 0 and {row["kind"] for row in json.loads(out)} == {"ffn"}
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{n}" for n in range(3, 60)))
    asked = ("--text", text, "--prompt", 12, "--continuation", 4, "--generate", 0, "--json", "-", "--settings", file)
    code, out, err = call("eval", "--model", folder, *asked)
    assert code == 0, err
    found = json.loads(out)
    assert [(row["method"], row["budget"]) for row in found["rows"]] == [("dense", None), ("thresholds", 0.5)]
    assert found["setup"]["scope"] == "ffn"
    asked = ("--prompt", 8, "--new-tokens", 4, "--rounds", 1, "--json", "-", "--settings", file)
    code, out, err = call("bench", "--model", folder, *asked, "--budget", 0.6, "--budget", 0.8)
    assert code == 0, err
    rows = [row for row in json.loads(out)["rows"] if row["method"] != "dense"]
    assert [(row["method"], row["budget"]) for row in rows] == [("thresholds", 0.6), ("thresholds", 0.8)]


def test_an_unknown_key_of_a_file_ends_a_command(call, folder, tmp_path):
    file = tmp_path / "settings.json"
    file.write_text('{"budget": 0.5, "scoop": "ffn"}')
    code, _, err = call("bench", "--model", folder, "--settings", file)
    assert code == 2 and "Unknown setting 'scoop'" in err and "Did you mean 'scope'" in err
