"""Attention and lm_head by the compiled kernel, for steps of a few tokens of a session, and only then."""

import pytest
import torch

from helpers.modes import generate, pruned
from helpers.observe import prompt
from helpers.tiny_models import tiny
from pop_mm.adapters import adapter_for
from pop_mm.kernels import Matvec


@pytest.fixture
def shapes(monkeypatch):
    """Shapes of all weights that the kernel multiplied, in order."""
    found = []
    original = Matvec.__call__

    def call(self, rows, x):
        found.extend(tuple(weight.shape) for r in rows for weight in r.weights)
        return original(self, rows, x)

    monkeypatch.setattr(Matvec, "__call__", call)
    return found


def others(model):
    adapter = adapter_for(model)
    return [m for m in adapter.besides_ffns(model, adapter.projections(model)) if type(m) is torch.nn.Linear]


def step(model, cache, token=5):
    with torch.no_grad():
        return model(torch.tensor([[token]]), past_key_values=cache).logits


def prefill(model, ids=None):
    with torch.no_grad():
        return model(prompt() if ids is None else ids, use_cache=True).past_key_values


@pytest.mark.parametrize(
    ("model_type", "names"),
    [
        ("llama", {"q_proj", "k_proj", "v_proj", "o_proj", "lm_head"}),
        ("mixtral", {"q_proj", "k_proj", "v_proj", "o_proj", "lm_head"}),
        ("qwen2_moe", {"q_proj", "k_proj", "v_proj", "o_proj", "lm_head"}),
        ("gpt_neox", {"query_key_value", "dense", "lm_head"}),
        ("gpt2", {"lm_head"}),
    ],
)
def test_which_modules_are_meant(model_type, names):
    model = tiny(model_type, torch.float32)
    known = {module: name for name, module in model.named_modules()}
    assert {known[module].rsplit(".", 1)[-1] for module in others(model)} == names


def test_a_step_reads_attention_and_head_by_the_kernel(shapes):
    model = tiny("llama", torch.float32)
    wanted = [tuple(module.weight.shape) for module in others(model)]
    with pruned(model, "inplace", kernels="stock"):
        expected = step(model, prefill(model))
    with pruned(model, "inplace", kernels="compiled"):
        cache = prefill(model)
        assert not shapes
        found = step(model, cache)
    for shape in wanted:
        assert shapes.count(shape) >= wanted.count(shape)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert not any("forward" in module.__dict__ for module in model.modules())


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_biases_and_replaced_weights_are_followed(model_type):
    model, other = (tiny(model_type, torch.float32) for _ in range(2))
    with torch.no_grad():
        for module in others(other):
            module.weight.mul_(1.5)
            if module.bias is not None:
                module.bias.uniform_(-1, 1)
    with pruned(other, "inplace", kernels="stock"):
        expected = generate(other, prompt(), 4)[1]
    with pruned(model, "inplace", kernels="compiled"):
        generate(model, prompt(), 3)
        for module, source in zip(others(model), others(other), strict=True):
            module.load_state_dict(source.state_dict(), assign=True)
        found = generate(model, prompt(), 4)[1]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_hooks_of_others_still_run():
    model = tiny("llama", torch.float32)
    seen = []
    with pruned(model, "inplace", kernels="compiled"):
        hook = model.model.layers[0].self_attn.q_proj.register_forward_hook(lambda *_: seen.append(1))
        step(model, prefill(model))
        hook.remove()
    assert len(seen) == 2


def test_a_module_whose_forward_somebody_replaced_is_left_alone():
    model = tiny("llama", torch.float32)
    module = model.model.layers[0].self_attn.q_proj
    calls = []

    def own(x):
        calls.append(x.shape)
        return type(module).forward(module, x)

    module.forward = own
    with pruned(model, "inplace", kernels="compiled"):
        step(model, prefill(model))
        assert module.forward is own
    assert module.forward is own and len(calls) == 2


@pytest.mark.parametrize("model_type", ["llama", "mixtral", "qwen2_moe"])
def test_ratio_0_on_the_compiled_kernel_is_the_dense_model_on_that_kernel(model_type, shapes):
    model = tiny(model_type, torch.float32)
    expected = generate(model, prompt(), 6)
    with pruned(model, "auto", ratio=0.0, kernels="compiled") as session:
        found = generate(model, prompt(), 6)
        assert {ffn["backend"] for ffn in session.report.to_dict()["ffns"]} == {"inplace"}
    assert shapes
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1], rtol=0, atol=1e-4)


@pytest.mark.parametrize("kernels", ["auto", "stock"])
def test_ratio_0_is_dense_bit_for_bit_otherwise(kernels, shapes):
    model = tiny("llama", torch.float32)
    expected = generate(model, prompt(), 6)
    with pruned(model, "auto", ratio=0.0, kernels=kernels):
        found = generate(model, prompt(), 6)
    assert torch.equal(found[1], expected[1]) and not shapes
