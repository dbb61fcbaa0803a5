"""The benchmarks run, and their fidelity figures are right where the answer is known."""

import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from helpers.tiny_models import tiny
from pop_mm import kernels
from pop_mm.native import compiler, shipped

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
METHODS = ("static", "POP gamma 0.1", "POP gamma 0.2", "full")


@pytest.fixture
def fidelity(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import decode_fidelity

    return decode_fidelity


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory):
    """A tiny model with a tokenizer, as a folder that ``samples.load`` takes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("model")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    tiny("llama", vocab_size=len(alphabet)).save_pretrained(folder)
    return folder


def run(script, *arguments):
    command = [sys.executable, str(BENCHMARKS / script), "--quick", "--threads", "1", *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    )


def test_tensor_parallel_runs(tiny_folder, tmp_path):
    done = run("tensor_parallel.py", "--model", tiny_folder, "--json", tmp_path / "out.json")
    assert done.returncode == 0, done.stdout + done.stderr
    together, apart, _ = json.loads((tmp_path / "out.json").read_text())["settings"].values()
    assert together == apart and len(together) == 2  # there is one process


@pytest.mark.skipif(not (shipped.VARIANTS.get(platform.machine()) and compiler.command()), reason="nothing to compare")
def test_shipped_kernels_runs(tiny_folder, tmp_path):
    done = run("shipped_kernels.py", "--model", tiny_folder, "--json", tmp_path / "out.json")
    assert done.returncode == 0, done.stdout + done.stderr
    steps = json.loads((tmp_path / "out.json").read_text())["steps"]
    runnable = [v.name for v in shipped.VARIANTS[platform.machine()] if v.needs <= shipped.processor_flags()]
    assert list(steps) == ["this machine's", *runnable]
    assert all(len(rounds) == 1 for found in steps.values() for rounds in found.values())


def test_decode_fidelity_runs(tiny_folder, tmp_path):
    done = run("decode_fidelity.py", "--model", tiny_folder, "--json", tmp_path / "out.json")
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "out.json").read_text())
    assert list(result["methods"]) == ["dense", *METHODS]
    assert result["methods"]["static"]["to_static"] == [1.0, 1.0, 1.0]
    assert len(result["per_passage"]) == 2
    judged = {verdict["target"]: verdict["passed"] for verdict in result["verdicts"]}
    assert [passed for target, passed in judged.items() if target.startswith("KL")] == [
        None
    ] * 4  # not the standard setting
    assert [passed for target, passed in judged.items() if target.startswith("one forward")] == [True, True]


def test_decode_speed_runs(tiny_folder, tmp_path):
    done = run("decode_speed.py", "--model", tiny_folder, "--json", tmp_path / "out.json")
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "out.json").read_text())
    (row,) = result["ffn"]
    assert row["width"] == 80
    assert row["byte_ratio"] == 2
    assert row["quotient"] == pytest.approx(row["speedup"] / 2)
    assert 0 < row["similar_changed"] < 0.3
    kinds = ["stock", "compiled"] if kernels.why_not() is None else ["stock"]
    variants = [(kind, ratio) for kind in kinds for ratio in (None, 0.2, 0.4)]
    rows = result["model"]["rows"]
    assert [(row["kernels"], row["ratio"]) for row in rows] == variants
    assert rows[0]["speedup"] == 1
    limits = [row["byte_limit"] for row in rows][:3]
    assert limits[0] == 1 < limits[1] < limits[2]
    assert 0.5 < result["memory"]["whole"]["ratio"] < 1.5
    assert {row["prompt"] for row in result["prefill"]["rows"]} == {32}
    targets = [verdict["target"] for verdict in result["verdicts"]]
    assert sum("of Amdahl's limit" in target for target in targets) == 2 * len(kinds)
    assert sum("scoring and selection" in target for target in targets) == 2 * len(kinds)
    assert sum("statistics, partition and reordering" in target for target in targets) == 4
    assert sum("as fast as stock dense" in target for target in targets) == len(kinds) - 1
    assert sum("peak resident size" in target for target in targets) == 2
    assert all(verdict["passed"] is None for verdict in result["verdicts"])


def test_no_divergence_at_ratio_0(fidelity):
    model = tiny("llama")
    ids = torch.randint(96, (1, 49), generator=torch.Generator().manual_seed(0))
    scores = fidelity.score_passage(model, ids, 32, 0.0)
    assert list(scores) == ["dense", *METHODS]
    for score in scores.values():
        assert score == fidelity.Score(scores["dense"].loss, 0.0, 1.0)


def test_only_decode_steps_are_scored(fidelity):
    model = tiny("llama")
    ids = torch.randint(96, (1, 41), generator=torch.Generator().manual_seed(0))
    config = fidelity.config_for(fidelity.METHODS[0], 0.5)
    dense, (pruned, _) = fidelity.step_logits(model, ids, 32), fidelity.pruned_step_logits(model, ids, 32, config)
    assert dense.shape == pruned.shape == (1, 8, 96)
    assert ((dense - pruned).abs().amax(-1) > 1e-4).all()
    torch.testing.assert_close(pruned, fidelity.stepwise_logits(model, ids, 32, config), atol=1e-4, rtol=1e-4)


def test_order_of_the_methods_on_a_real_model(fidelity):
    from pop_mm.samples import load

    model, tokenizer = load("smollm2-135m")
    passages = fidelity.read_passages(tokenizer, 3, 256 + 64 + 1)
    scores = [fidelity.score_passage(model, ids, 256, 0.3) for ids in passages.values()]
    summary = fidelity.summarise(scores)
    static, pop1, pop2, full = (summary[name]["kl"].value for name in METHODS)
    assert static > pop1 > pop2 > full > 0


def test_moe_decode_speed_runs(tmp_path):
    done = run("moe_decode_speed.py", "--json", tmp_path / "out.json")
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "out.json").read_text())
    assert [row["width"] for row in result["results"]] == [80, 24]
    for row in result["results"]:
        assert row["byte_ratio"] == 2
        assert row["quotient"] == pytest.approx(row["speedup"] / 2)
        stock = {"pruned", "same", "views", "eager", "batched_mm", "grouped_mm"}
        assert set(row["milliseconds"]) - {"read whole", "read narrow"} == stock
    assert [verdict["passed"] for verdict in result["verdicts"]] == [None] * 4  # not the real shapes


def test_prefill_cost_runs(tiny_folder, tmp_path):
    done = run("prefill_cost.py", "--model", tiny_folder, "--json", tmp_path / "out.json")
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "out.json").read_text())
    kinds = ["compiled", "torch"] if kernels.why_not() is None else ["torch"]
    ways = ("dense", "partition", "probe 64", "probe 128")
    expected = [(kind, way, prompt) for kind in kinds for way in ways for prompt in ("first", "next")]
    assert [(row["kernels"], row["prefill"], row["prompt"]) for row in result["rows"]] == expected
    for row in result["rows"]:
        assert row["overhead"] == pytest.approx(row["statistics"] + row["partition"] + row["reordering"])
        assert min(row["statistics"], row["partition"], row["reordering"]) > 0
        assert 0 < row["moved_share"] < 1
    assert list(result["quality"]) == ["dense", "partition", "probe 32", "probe 64", "probe 128"]
    assert [verdict["passed"] for verdict in result["verdicts"]] == [None] * 2 * len(kinds)


def test_vlm_accuracy_runs(tmp_path):
    done = run("vlm_accuracy.py", "--json", tmp_path / "out.json")
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "out.json").read_text())
    methods = [row["method"] for row in result["rows"]]
    half = 1 + len(methods) // 2
    assert methods[0] == "dense" and methods[1:half] == methods[half:]
    assert {"random", "magnitude", "Wanda-sp", "GRIFFIN", "static", "POP", "full", "POP, partition prefill"} < set(
        methods
    )
    for row in result["rows"]:
        assert set(row["types"]) == {"colour", "shape", "position", "count", "presence", "description"}
        assert all(0 <= own["exact_match"] <= 1 and own["n"] == 1 for own in row["types"].values())
    assert all(verdict["passed"] is None for verdict in result["verdicts"])


def test_results_runs(tiny_folder, tmp_path):
    moe = tmp_path / "moe"
    shutil.copytree(tiny_folder, moe)
    tiny("mixtral", vocab_size=256).save_pretrained(moe)
    parts = ("text", "moe", "ablations", "batch", "layers", "outputs")
    done = run("results.py", "--only", *parts, "--output", tmp_path / "out", "--model", tiny_folder, "--moe", moe)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "not judged" in done.stdout
    page = (tmp_path / "out" / "results.md").read_text()
    assert (tmp_path / "out" / "results.png").exists()
    for part in parts:
        assert json.loads((tmp_path / "out" / f"{part}.json").read_text())
    assert "## vision\n\nNot run." in page
    assert page.count("| wanda_sp |") == 2 * 2 + 2  # both prefills, and the mixture
    assert page.count("not run here") > 10
