"""Tables of the commands at 80 columns: four columns, whole words, and everything with --wide."""

import pytest
import torch

from helpers.tiny_folder import save
from helpers.tiny_models import VOCAB
from pop_mm.adapters import support_table


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
        "tune": (
            (
                "tune",
                *model,
                "--text",
                "prose.txt",
                "--max-kl",
                0.05,
                "--prompt",
                12,
                "--continuation",
                5,
                "--rounds",
                0,
            ),
            "setting bytes read KL to dense",
        ),
        "adapters": (("adapters",), "model types kind projections adapter"),
        "models list": (("models", "list"), "name what it is licence"),
        "inspect": (("inspect", *model, "--ratio", 0.2), "layer channels active per step backend"),
        "inspect thresholds": (("inspect", *model, "--budget", 0.7), "matrix inputs kept"),
    }


@pytest.mark.parametrize(
    "command", ["eval", "bench", "tune", "adapters", "models list", "inspect", "inspect thresholds"]
)
def test_four_columns_of_whole_words(commands, call, folder, monkeypatch, command):
    arguments, head = commands[command]
    monkeypatch.setenv("COLUMNS", "80")
    code, out, err = call(*arguments)
    assert (code, err) == (0, "")
    lines = [line for line in out.splitlines() if folder not in line and "POP_MM_CACHE" not in line]  # long paths
    assert max(map(len, lines)) <= 80
    assert "\u2026" not in out
    assert head in [" ".join(line.split()) for line in lines]


def test_names_of_model_types_and_adapters_are_whole(call, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    words = {word.strip(",;") for word in call("adapters")[1].split()}
    rows = support_table()
    assert {row["model_type"] for row in rows} <= words
    assert {row["adapter"] for row in rows} <= words
    assert {word.strip(",;") for row in rows for word in row["layout"].split()} <= words


@pytest.mark.parametrize(
    ("command", "more"), [("eval", "perplexity"), ("bench", "Amdahl"), ("tune", "speed-up"), ("inspect", "retained")]
)
def test_wide_shows_the_rest(commands, call, monkeypatch, command, more):
    monkeypatch.setenv("COLUMNS", "200")
    arguments, _ = commands[command]
    lines = call(*arguments)[1].splitlines()
    assert not any(more in line.split() for line in lines)
    assert any(more in line.split() for line in call(*arguments, "--wide")[1].splitlines())
