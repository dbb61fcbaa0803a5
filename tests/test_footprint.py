"""The bytes that a decoded token reads are counted once: the report, inspect, bench and eval print the same number."""

import pytest
import torch

import pop_mm
from helpers.observe import prompt
from helpers.tiny_folder import save
from pop_mm import PopConfig
from pop_mm.adapters import adapter_for
from pop_mm.bench.limits import step_bytes
from pop_mm.evaluation import cost_of
from pop_mm.report.footprint import footprint
from pop_mm.report.tables import byte_size
from pop_mm.session.session import plan_ffns

MODELS = ("llama", "mixtral", "qwen2_moe")  # dense, experts, experts with a shared one and a dense layer
SETTINGS = {
    "dense": {"ratio": 0.0},
    "pop": {"ratio": 0.3, "scope": "ffn"},
    "masked": {"ratio": 0.3, "scope": "ffn", "backend": "masked"},
    "thresholds": {"budget": 0.6},
}


def flags(settings):
    return [word for name, value in settings.items() for word in (f"--{name}", value)]


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("model_type", MODELS)
def test_report_inspect_bench_and_eval_print_the_same_bytes(load, call, tmp_path, model_type, settings):
    model, config = load(model_type, torch.float32), PopConfig(**settings)
    with pop_mm.prune(model, config) as session:
        model.generate(prompt(1, 40), max_new_tokens=5)
        report = session.report
    found = report.to_dict()["bytes_per_token"]
    assert found == report.bytes_per_token
    assert found["dense"] >= found["read"] >= found["intended"]

    cost = cost_of(model, config, report)
    assert sum(cost.bytes.values()) == found["kept"]

    thresholds = "budget" in settings
    code, out, err = call("inspect", "--model", save(tmp_path, model_type), *flags(settings))
    assert (code, err) == (0, "")
    pruned = found["intended" if thresholds else "read"]
    assert f"total {byte_size(found['dense'])} {byte_size(pruned)}" in " ".join(out.split())

    if not thresholds:  # bench compares methods by their ratio
        parts = step_bytes(model, config, 1, 40).parts
        assert sum(parts.values()) - parts["KV cache"] == found["read"]
        assert found["read"] == (found["dense"] if settings.get("backend") == "masked" else found["intended"])


def test_bytes_of_a_token_are_those_of_the_weights(load):
    model = load("llama", torch.float32)
    found = footprint(model, adapter_for(model), plan_ffns(model, PopConfig(0.0)))
    read = [p for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name]
    assert found.dense == found.read
    assert found.total == sum(p.nbytes for p in read)


def test_experts_that_ran_dense_are_read_whole(load):
    model = load("mixtral")
    with pop_mm.prune(model, ratio=0.4, scope="ffn", experts=pop_mm.ExpertPolicy(min_tokens=10**6)) as session:
        model.generate(prompt(), max_new_tokens=4)
        found = session.report.bytes_per_token
    assert found["kept"] == found["dense"] > found["intended"]
