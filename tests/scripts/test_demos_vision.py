"""The demos about images run from the command line, on a tiny random model, without a network."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from helpers.tiny_vlm_folder import save_vlm
from pop_mm.samples.upcycle import upcycle

DEMOS = Path(__file__).parents[2] / "demos"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_vlm(tmp_path_factory.mktemp("model") / "vlm")


def run(demo, where, *arguments):
    settings = {
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "POP_MM_CACHE": str(where.parent / "cache"),
        "COLUMNS": "100",
    }
    settings["PYTHONWARNINGS"] = "ignore:Glyph"  # a random model writes what no font has
    command = [sys.executable, DEMOS / demo, *map(str, arguments)]
    done = subprocess.run(
        command, cwd=where, env={**os.environ, **settings}, capture_output=True, text=True, check=False
    )
    noise = ("Failed to load ", "W1")  # torchao's, where it is installed, while transformers imports it
    done.stderr = "".join(
        line for line in done.stderr.splitlines(True) if not (line.startswith(noise) and "torch" in line)
    )
    return done


def test_image_question(folder, tmp_path):
    done = run("image_question.py", tmp_path, "--model", folder, "--ratio", 0.3, "--question", "Why?")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("pruned 30%") == 2 + 1  # each answer, and the speed
    assert done.stdout.count("drawn: ") == 2
    assert done.stdout.count("Why?") == 2
    assert "FFNs: 2 inplace" in done.stdout
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "image_question_1.png",
        "image_question_2.png",
    ]


def test_modality_partition_of_experts_and_an_own_image(folder, tmp_path):
    moe = upcycle(folder, "qwen3_vl_moe", tmp_path / "moe", progress=False).path
    Image.linear_gradient("L").save(tmp_path / "grey.png")
    done = run("modality_partition.py", tmp_path, "--model", moe, "--image", "grey.png")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count(" text, ") == 4
    assert "What is in the picture?  (" in done.stdout
    rows = {cells[0]: cells[1:] for line in done.stdout.splitlines() if len(cells := line.strip("│ ").split("│")) == 8}
    shares = {
        name.strip(): [float(cell.strip(" %")) / 100 for cell in cells]
        for name, cells in rows.items()
        if "%" in cells[0]
    }
    assert list(shares) == ["0 expert", "1 expert", "mean"]
    for chance, *found in shares.values():
        assert 0.5 < chance < 0.8
        assert all(0 < share <= 1 for share in found)
        assert found[-1] == 1  # the image comes first, so its own choice does not depend on the question
    assert (tmp_path / "out" / "modality_partition.png").stat().st_size > 10_000
