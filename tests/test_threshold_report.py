"""The report of a session with thresholds: its JSON is what docs/json.md says, and its text names the same figures."""

import json
import re
from pathlib import Path

import pytest
import torch

from helpers.modes import LENGTH, generate, left_padded
from helpers.observe import prompt
from helpers.tiny_models import tiny
from pop_mm import prune

JSON_PAGE = (Path(__file__).parents[1] / "docs" / "json.md").read_text()


@pytest.fixture(params=["llama", "mixtral"])
def model(request, load):
    return load(request.param, torch.float64)


@pytest.fixture
def report(model):
    with prune(model, budget=0.6) as session:
        generate(model, prompt(1, LENGTH))
    return session.report


def documented(section):
    """Keys that a section of the page names, without what stands before and behind a dot."""
    rows = re.findall(r"^\| (`.+?) \|", JSON_PAGE.split(f"\n## {section}\n")[1].split("\n## ")[0], re.M)
    return {key.split(".")[0] for row in rows for key in re.findall(r"`([^`]+)`", row)}


def test_json_has_the_documented_keys(report):
    values = json.loads(report.to_json())
    assert values == report.to_dict()
    assert set(values) <= documented("`report`")
    assert values["prompt_tokens"] == LENGTH
    assert values["threshold_tokens"] == {"text": LENGTH - 1}
    page = JSON_PAGE.split("With `method` `")[1]
    for name in ("matrices", "inputs"):
        row = next(line for line in page.splitlines() if line.startswith(f"| `{name}`"))
        assert set(values[name][0]) == set(re.findall(r"`(\w+)`", row)) - {"matrices", "inputs"}
    for found in values["inputs"]:
        assert len(found["thresholds"]) == 1 and 0 < found["kept"] < 1
        assert abs(found["prompt_share"]["text"] - found["share"]) < 0.02


def test_kept_shares_add_up(report):
    values = report.to_dict()
    for matrix in values["matrices"]:
        mine = [found for found in values["inputs"] if found["matrix"] == matrix["matrix"]]
        weights = sum(found["weights"] for found in mine)
        assert matrix["kept"] == pytest.approx(sum(f["weights"] * f["kept"] for f in mine) / weights)
    per_token = values["bytes_per_token"]
    left_out = sum(found["weights"] * (1 - found["kept"]) for found in values["inputs"])
    assert per_token["dense"] - per_token["kept"] == pytest.approx(8 * left_out, abs=1)


def test_text(report):
    text = str(report)
    assert f"Prompt tokens: {LENGTH} text; of these set the thresholds: {LENGTH - 1} text" in " ".join(text.split())
    bounds = [found.thresholds[0] for found in report.inputs if found.matrix == "q, k, v"]
    (line,) = (line for line in text.splitlines() if line.strip().startswith("q, k, v"))
    assert f"{min(bounds):.2g} to {max(bounds):.2g}" in line


def test_short_prompts_set_no_thresholds():
    model = tiny("llama")
    ids, mask = left_padded(prompt(2, LENGTH), (LENGTH - 3, 0))
    with prune(model, budget=0.6) as session:
        assert session.report.threshold_tokens == {}
        generate(model, ids, attention_mask=mask)
        assert session.report.threshold_tokens == {"text": LENGTH - 1}
        assert session.report.prompt_tokens == LENGTH + 3
        generate(model, prompt(1, 3))
        assert session.report.threshold_tokens == {}
        assert "set the thresholds: none" in " ".join(str(session.report).split())
