"""The page and the picture of benchmarks/frontier.py, from parts of known figures."""

import json
from pathlib import Path

import pytest
from PIL import Image

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
KL = {"thresholds": 0.05, "pop": 0.5, "static": 0.6}


@pytest.fixture
def module(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import frontier_page

    return frontier_page


def row(method, budget, kl):
    read = 1 if budget is None else budget
    cost = {"bytes": {"FFN": round(80 * read), "attention": round(20 * read), "lm_head": 50}}
    figures = {"kl": kl, "agreement": 1 - kl, "perplexity": 30 + kl}
    spans = {f"{name}_interval": [value, value] for name, value in figures.items()}
    return {"method": method, "budget": budget, "cost": cost, **figures, **spans}


def text(model):
    rows = [row(name, budget, kl / budget) for budget in (0.75, 0.65) for name, kl in KL.items()]
    setup = {
        "model": model,
        "texts": {"a": "", "b": ""},
        "prompt": 8,
        "continuation": 4,
        "dtype": "float32",
        "scope": "ffn",
    }
    return {"setup": setup, "rows": [row("dense", None, 0), *rows]}


def answers(method, budget, right):
    return {"method": method, "budget": budget, "right": [True] * right + [False] * (10 - right)}


def speeds(method, budget, speedup):
    return {"method": method, "budget": budget, "step_s": [0.1, 0.05], "speedup": [speedup] * 3}


PARTS = {
    "text": text("smollm2-135m"),
    "moe": text("smollm2-mixtral"),
    "vision": {
        "questions": 10,
        "types": ["colour"],
        "rows": [answers("dense", None, 9), answers("thresholds", 0.65, 8), answers("thresholds", 0.75, 9)],
    },
    "speed": {
        "machine": {"cpu": "a CPU", "threads": 2, "torch": "2"},
        "how": "4 steps",
        "rows": [speeds("dense", None, 1), speeds("thresholds", 0.65, 2), speeds("static", 0.65, 1.5)],
    },
}


@pytest.mark.parametrize("names", [["text"], ["speed"], ["vision"], list(PARTS)])
def test_page(module, tmp_path, names):
    for name in names:
        (tmp_path / f"{name}.json").write_text(json.dumps(PARTS[name]))
    module.write(tmp_path, tmp_path / "frontier.md")
    page = (tmp_path / "frontier.md").read_text()
    if names != ["speed"]:
        with Image.open(tmp_path / "frontier.png") as picture:
            assert min(picture.size) > 300
        assert (tmp_path / "frontier.png").stat().st_size < 200_000
    if "text" in names:
        assert "| 0.65 | thresholds | 65.0% | 0.077 [0.077, 0.077] | 0.100 |" in page
    if "vision" in names:
        assert "| 0.65 | thresholds | 80.0 %" in page and "-10.00 [" in page
    if len(names) > 1:
        lines = [line for line in page.splitlines() if line.startswith("| 0.65 |")]
        assert [line.rsplit("| ", 1)[1] for line in lines[:3]] == ["2.00x |", "- |", "1.50x |"]


def test_nothing_is_written_from_nothing(module, tmp_path):
    module.write(tmp_path, tmp_path / "frontier.md")
    assert not list(tmp_path.iterdir())
