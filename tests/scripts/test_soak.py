"""The soak finds what leaks and what slows down, and the comparison of kernels says what ran and what won."""

import json
from pathlib import Path

import pytest
import torch

from pop_mm import Session, kernels
from pop_mm.tracking.phase import PhaseTracker

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def soak(monkeypatch):
    from transformers import logging

    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import soak

    for name, value in {"PROBE_PROMPT": 8, "PROBE_TOKENS": 4, "PROBE_RUNS": 1, "ABANDONED_EVERY": 3}.items():
        monkeypatch.setattr(soak, name, value)
    monkeypatch.setattr("soak_traffic.LENGTHS", (4, 24))
    verbosity = logging.get_verbosity()
    yield soak
    logging.set_verbosity(verbosity)


@pytest.fixture
def cpu_kernels(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import cpu_kernels

    return cpu_kernels


def run(script, tmp_path, *arguments):
    """Exit code and JSON."""
    file = tmp_path / "out.json"
    code = script.main(["--quick", "--threads", "1", "--json", str(file), *arguments])
    return code, json.loads(file.read_text())


def passed(result):
    return {verdict["target"].split(":")[0]: verdict["passed"] for verdict in result["verdicts"]}


COUNTS = ["live tensors do not grow", "states of prompts do not grow", "caches known do not grow"]
RESTORED = "leaving the session restores the weights bit for bit"


@pytest.mark.parametrize("arguments", [[], ["--moe"], ["--batch", "per_sequence"], ["--dense"]], ids=" ".join)
def test_nothing_leaks(soak, tmp_path, arguments):
    code, result = run(soak, tmp_path, *arguments)
    assert code == 0, result["verdicts"]
    assert [reading["prompts"] for reading in result["readings"]] == [3, 6, 9, 12]
    assert sum(count for kind, count in result["sent"].items() if kind != "abandoned") == 12
    assert result["sent"]["abandoned"] == 4
    last = result["readings"][-1]
    assert last["rss_mib"] > 100 and last["tensors"] > 20 and last["objects"] > last["tensors"]
    assert len(last["tokens_per_s"]) == len(last["dense_tokens_per_s"]) == 1
    verdicts = passed(result)
    assert all(verdicts[name] for name in [*COUNTS, RESTORED])
    assert list(verdicts.values()).count(None) == 3  # memory, objects and speed, which have not settled


def test_states_that_are_kept_are_found(soak, tmp_path, monkeypatch):
    kept, new_state = [], Session.new_state

    def keep(self, rows, cache):
        kept.append(new_state(self, rows, cache))
        return kept[-1]

    monkeypatch.setattr(Session, "new_state", keep)
    code, result = run(soak, tmp_path)
    assert code == 1
    verdicts = passed(result)
    assert [verdicts[name] for name in COUNTS] == [False, False, True]
    assert verdicts[RESTORED]


def test_caches_that_are_kept_are_found(soak, tmp_path, monkeypatch):
    kept, bind = [], PhaseTracker._bind

    def keep(self, cache, state):
        kept.append(cache)
        bind(self, cache, state)

    monkeypatch.setattr(PhaseTracker, "_bind", keep)
    code, result = run(soak, tmp_path)
    assert code == 1
    assert [passed(result)[name] for name in COUNTS] == [False, False, False]


def test_every_abandoned_prompt_is_abandoned(soak, monkeypatch):
    from soak_traffic import KINDS, Abandoned, Traffic

    traffic = Traffic(soak.tiny_model(False))
    generate, raised = traffic._generate, []

    def count(*arguments, **own):
        try:
            return generate(*arguments, **own)
        except Abandoned:
            raised.append(arguments)
            raise

    monkeypatch.setattr(traffic, "_generate", count)
    for kind in KINDS:
        traffic.send(kind, abandoned=True)
    assert len(raised) == len(KINDS) == traffic.sent["abandoned"]
    traffic.send("batch")
    assert len(raised) == len(KINDS)


@pytest.mark.parametrize(
    ("change", "failing"),
    [
        ({}, None),
        ({"rss_mib": 1021.0}, "resident memory"),
        ({"rss_mib": 1019.0}, None),
        ({"objects": 1500}, "live objects"),
        ({"tensors": 51}, "live tensors"),
        ({"tokens_per_s": (94.0, 94.0, 500.0)}, "the fixed prompt"),
        ({"tokens_per_s": (50.0,) * 3, "dense_tokens_per_s": (50.0,) * 3}, None),  # a busy machine
    ],
)
def test_what_is_judged(soak, change, failing):
    from dataclasses import replace

    steady = soak.Reading(100, 1000.0, 1000, 50, 1, 0, (100.0,) * 3, (100.0,) * 3)
    readings = [replace(steady, prompts=100 * number) for number in range(1, 21)]
    readings[18:] = [replace(reading, **change) for reading in readings[18:]]
    verdicts = soak.soak_verdicts(readings, True, True)
    assert len(verdicts) == 7
    assert [v.target for v in verdicts if not v.passed] == [
        v.target for v in verdicts if failing and failing in v.target
    ]
    assert [v.passed for v in soak.soak_verdicts(readings, False, False)][-1] is False


def test_cpu_kernels_runs(cpu_kernels, tmp_path):
    code, result = run(cpu_kernels, tmp_path, "--no-compile", "--dims", "64x160:float32", "48x96:bfloat16")
    assert code == 0
    assert result["settings"]["dims"] == ["64x160:float32", "48x96:bfloat16"]
    names = {"F.linear", "torch.mm", "oneDNN packed", "matvec", "reading only"}
    for dtype, width, shares in (("float32", 160, [1, 0.7, 0.5, 0.4]), ("bfloat16", 96, [1, 67 / 96, 0.5, 38 / 96])):
        own = [row for row in result["rows"] if row["dtype"] == dtype]
        found = {row["kernel"] for row in own}
        missing = {name.split(", ")[0] for name in result["failed"] if name.endswith(dtype)}
        assert found | missing == names and not found & missing and "F.linear" in found
        assert ("matvec" in found) == (kernels.why_not() is None)
        for name in found:
            assert [row["kept_share"] for row in own if row["kernel"] == name] == pytest.approx(shares)
        for row in own:
            assert row["ms"] > 0 and row["read_share"] > 0 and row["speedup"] > 0
            size = 3 * row["hidden"] * row["width"] * (4 if dtype == "float32" else 2)
            assert row["gb_s"] == pytest.approx(size / row["ms"] / 1e6)
            assert (row["before_ms"] > 0) == row["each_prompt"] == (row["kernel"] == "oneDNN packed")
        fastest = result["fastest"][f"{own[0]['hidden']} x {width} {'fp32' if dtype == 'float32' else 'bf16'}"]
        for share, winner in fastest.items():
            rows = [r for r in own if f"{r['kept_share']:.2f}" == share and r["kernel"] != "reading only"]
            assert winner == min(rows, key=lambda row: row["ms"])["kernel"]


def test_a_kernel_that_computes_something_else_is_left_out(cpu_kernels, tmp_path, monkeypatch):
    from ffn_kernels import PLAIN, Kernel

    def wrong(layers):
        return Kernel(lambda x: [torch.zeros_like(x) for _ in layers])

    monkeypatch.setitem(PLAIN, "torch.mm", wrong)
    _, result = run(cpu_kernels, tmp_path, "--no-compile")
    assert "computes something else" in result["failed"]["torch.mm, float32"]
    assert "torch.mm" not in {row["kernel"] for row in result["rows"]}


def test_dims_that_make_no_sense(cpu_kernels, capsys):
    with pytest.raises(SystemExit):
        cpu_kernels.main(["--dims", "64:float32"])
    assert "is not like 576x1536:float32" in capsys.readouterr().err
