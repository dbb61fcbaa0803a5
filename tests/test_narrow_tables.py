"""Tables of the commands at 80 columns: four columns, whole words, and everything with --wide."""

import pytest
import torch

from helpers.tiny_folder import save
from helpers.tiny_models import VOCAB


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return save(tmp_path_factory.mktemp("m") / "mixtral", "mixtral")


@pytest.fixture
def commands(folder, tmp_path, monkeypatch):
    """Every command that prints a table of figures, and the words of the table's head."""
    ids = torch.randint(3, VOCAB, (60,), generator=torch.Generator().manual_seed(5)).tolist()
    (tmp_path / "prose.txt").write_text(" ".join(f"w{i}" for i in ids))
    monkeypatch.chdir(tmp_path)
    model = ("--model", folder)
    scored = ("--prompt", 12, "--continuation", 5, "--generate", 2, "--scope", "ffn")
    asked = ("--method", "pop", "--method", "thresholds", "--ratio", 0.4, "--budget", 0.7)
    run = ("--prompt", 8, "--new-tokens", 4, "--rounds", 1, "--kernels", "stock", "--ratio", 0.2)
    return {
        "eval": (
            ("eval", *model, "--text", "prose.txt", *scored, *asked),
            "setting bytes read KL to dense same top token",
        ),
        "bench": (("bench", *model, *run), "setting tokens/s speed-up same kernels"),
        "inspect": (("inspect", *model, "--ratio", 0.2), "layer channels active per step backend"),
        "inspect thresholds": (("inspect", *model, "--budget", 0.7), "matrix inputs kept"),
    }


@pytest.mark.parametrize("command", ["eval", "bench", "inspect", "inspect thresholds"])
def test_four_columns_of_whole_words(commands, call, monkeypatch, command):
    arguments, head = commands[command]
    monkeypatch.setenv("COLUMNS", "80")
    code, out, err = call(*arguments)
    assert (code, err) == (0, "")
    lines = [line for line in out.splitlines() if arguments[2] not in line]  # a folder may be longer than a line
    assert max(map(len, lines)) <= 80
    assert "\u2026" not in out
    assert head in [" ".join(line.split()) for line in lines]


@pytest.mark.parametrize(("command", "more"), [("eval", "perplexity"), ("bench", "Amdahl"), ("inspect", "retained")])
def test_wide_shows_the_rest(commands, call, monkeypatch, command, more):
    monkeypatch.setenv("COLUMNS", "200")
    arguments, _ = commands[command]
    lines = call(*arguments)[1].splitlines()
    assert not any(more in line.split() for line in lines)
    assert any(more in line.split() for line in call(*arguments, "--wide")[1].splitlines())
