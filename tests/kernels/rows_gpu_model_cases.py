"""What test_gpu_kernels.py runs in a process of its own: thresholds of whole models on the Triton kernels against masked ones.

On a GPU if there is one; else with TRITON_INTERPRET=1 on the CPU, where a step of a tiny model takes a second.
"""

import pytest
import torch
from gpu_kernel_cases import DEVICE

from helpers.modes import generate
from helpers.observe import prompt, same_afterwards
from helpers.tiny_models import tiny
from pop_mm import prune
from pop_mm.ops.gpu_rows import GPURowsFFN, GPURowsLinear

torch.set_num_threads(1)


@pytest.fixture
def calls(monkeypatch):
    """The kind of each call of the kernels."""
    found = []
    for kind in (GPURowsLinear, GPURowsFFN):

        def call(self, *args, original=kind.__call__):
            found.append(type(self))
            return original(self, *args)

        monkeypatch.setattr(kind, "__call__", call)
    experts = GPURowsFFN.experts

    def of_experts(*args):
        found.append("experts")
        return experts(*args)

    monkeypatch.setattr(GPURowsFFN, "experts", of_experts)
    return found


def decoded(model, **settings):
    """Tokens, logits, the report's inputs."""
    with same_afterwards(model), prune(model, budget=0.6, **settings) as session:
        ids, logits = generate(model, prompt().to(DEVICE), 3)
        return ids, logits, session.report.to_dict()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("model_type", ["llama", "qwen3", "phi3", "gpt2"])
def test_rows_give_what_masks_give(model_type, dtype, calls):
    layers = {"n_layer": 1} if model_type == "gpt2" else {"num_hidden_layers": 1}
    model = tiny(model_type, dtype, **layers).to(DEVICE)
    expected, found = decoded(model, backend="masked"), decoded(model, kernels="triton")
    assert torch.equal(found[0], expected[0])
    close = 1e-9 if dtype is torch.float64 else 1e-4
    torch.testing.assert_close(found[1], expected[1], rtol=0, atol=close * float(expected[1].abs().max()))
    assert [row["kept"] for row in found[2]["inputs"]] == [row["kept"] for row in expected[2]["inputs"]]
    assert set(found[2]["backends"]) == {"rows"} and found[2]["kernels"] == "triton"
    assert set(calls) == {GPURowsLinear, GPURowsFFN}


@pytest.mark.parametrize("model_type", ["mixtral", "qwen2_moe"])
def test_experts_by_rows_give_what_masks_give(model_type, calls):
    model = tiny(model_type, torch.float64, num_hidden_layers=1 + (model_type == "qwen2_moe")).to(
        DEVICE
    )  # its first is dense
    expected, found = decoded(model, backend="masked"), decoded(model, kernels="triton")
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1], rtol=0, atol=1e-9)
    assert [row["kept"] for row in found[2]["inputs"]] == [row["kept"] for row in expected[2]["inputs"]]
    assert set(found[2]["backends"]) == {"rows"} and "experts" in calls


def test_experts_of_another_kind_run_masked_and_say_why():
    model = tiny("gpt_oss", torch.float64, num_hidden_layers=1).to(DEVICE)
    with prune(model, budget=0.6, kernels="triton") as session:
        found = generate(model, prompt().to(DEVICE), 3)
        reasons = {plan.backend: plan.reason for plan in session.plans}
    expected = decoded(model, backend="masked")
    assert torch.equal(found[0], expected[0])
    assert set(reasons) == {"rows", "masked"} and "no others" in reasons["masked"]


def test_a_second_prompt_has_thresholds_of_its_own(calls):
    model = tiny("llama", torch.float64, num_hidden_layers=1).to(DEVICE)
    prompts = [prompt(1, 12, seed).to(DEVICE) for seed in (1, 2)]
    logits = {}
    for name, settings in {"masked": {"backend": "masked"}, "rows": {"kernels": "triton"}}.items():
        with prune(model, budget=0.6, **settings):
            logits[name] = [generate(model, ids, 3)[1] for ids in prompts]
    for found, expected in zip(logits["rows"], logits["masked"], strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
