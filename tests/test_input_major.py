"""Whole products with turned weights of half precision, where torch's own are slow: prompts, batches and masked steps."""

import pytest
import torch
from test_thresholds import thresholds
from torch import nn

from helpers.modes import LENGTH, generate, with_experts
from helpers.observe import differences, fingerprint, prompt
from helpers.tiny_models import tiny
from pop_mm.executors import rows_experts, rows_linears
from pop_mm.ops import input_major
from pop_mm.ops.turn import is_turned
from pop_mm.samples.quantise import quantise

HALVES = (torch.bfloat16, torch.float16)


@pytest.mark.parametrize("stored", [None, torch.int8], ids=["floats", "int8"])
@pytest.mark.parametrize("dtype", HALVES)
def test_products_are_rounded_once(dtype, stored, monkeypatch):
    monkeypatch.setattr(input_major, "_BLOCK", 100)  # rows of 13: seven at a time, and two at the end
    x, weight = torch.randn(2, 3, 30).to(dtype), (40 * torch.randn(30, 13)).to(stored or dtype)
    bias, scale = torch.randn(13).to(dtype), torch.rand(13)
    found = input_major.product(x, weight, bias, None if stored is None else scale)
    exact = x.double() @ weight.double() * (1 if stored is None else scale.double()) + bias.double()
    assert found.dtype is dtype and found.shape == (2, 3, 13)
    torch.testing.assert_close(found, exact.to(dtype), rtol=1e-2 if dtype is torch.bfloat16 else 1e-3, atol=1e-3)


def test_a_torch_without_onednn_is_slow(monkeypatch):
    monkeypatch.setattr(torch.ops, "mkldnn", object())
    assert [input_major.is_slow.__wrapped__(dtype) for dtype in (*HALVES, torch.float32)] == [True, True, False]


def test_gradients_and_other_dtypes_are_left_to_torch(monkeypatch):
    monkeypatch.setattr(input_major, "is_slow", lambda dtype: dtype is torch.bfloat16)
    weight = nn.Parameter(torch.randn(4, 4).bfloat16())
    x = torch.randn(2, 4).bfloat16()
    assert not input_major.helps(x, weight)
    with torch.no_grad():
        assert input_major.helps(x, weight) and not input_major.helps(x.float(), weight)


@pytest.fixture(params=["llama", "phi3", "opt", "gpt2", "int8", "mixtral", "gpt_oss"])
def model(request):
    if request.param == "int8":
        pytest.importorskip("torchao.quantization")
        return lambda dtype: quantise(tiny("llama", dtype))
    if request.param in ("mixtral", "gpt_oss"):
        return lambda dtype: with_experts(tiny, request.param, "grouped_mm", dtype)
    return lambda dtype: tiny(request.param, dtype)


@torch.no_grad()
@pytest.mark.parametrize("slow", [True, False])
@pytest.mark.parametrize("dtype", HALVES)
def test_prompts_and_batches_on_turned_weights(model, dtype, slow, monkeypatch):
    monkeypatch.setattr(input_major, "is_slow", lambda _: slow)
    calls = []
    for module, name in ((input_major, "product"), (rows_experts, "product"), (rows_linears._Whole, "__call__")):
        own = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, own=own: calls.append(args[1]) or own(*args))
    model = model(dtype)
    before, one, two = fingerprint(model), prompt(1, LENGTH), prompt(2, 2)
    expected = [model(one, use_cache=False).logits, model(two, use_cache=False).logits]
    with thresholds(model) as session:
        generate(model, one, 3)
        assert {plan.backend for plan in session.plans} == {"rows"}
        calls.clear()
        found = [model(one, use_cache=False).logits, model(two, use_cache=False).logits]
        assert bool(calls) == slow
        generate(model, prompt(2, LENGTH), 3)  # masked steps
    assert differences(before, fingerprint(model)) == []
    for logits, dense in zip(found, expected, strict=True):
        assert (logits - dense).abs().mean() < 0.02 * dense.abs().mean()


@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("change", [lambda x: torch.cat((x, x), -1), lambda x: x.half()], ids=["width", "dtype"])
def test_inputs_that_do_not_fit_a_turned_weight_are_refused_as_outside(rows, change, monkeypatch):
    monkeypatch.setattr(input_major, "is_slow", lambda _: True)
    model, ids = tiny("llama", torch.bfloat16), prompt(rows, 4)
    module = model.model.layers[0].mlp.up_proj
    with thresholds(model):
        generate(model, prompt(1, LENGTH), 3)
        assert is_turned(module.weight)
        module.register_forward_pre_hook(lambda _, args: (change(args[0]),))
        with pytest.raises(RuntimeError, match=r"shapes|dtype"):
            model(ids, use_cache=False)


@torch.no_grad()
def test_torch_multiplies_no_turned_half(monkeypatch):
    monkeypatch.setattr(input_major, "is_slow", lambda _: True)
    own = torch.nn.functional.linear

    def linear(x, weight, bias=None):
        assert not (weight.dim() == 2 and is_turned(weight)), "it would take 30 times as long"
        return own(x, weight, bias)

    model = tiny("llama").bfloat16()
    with thresholds(model):
        generate(model, prompt(1, LENGTH), 3)
        monkeypatch.setattr(torch.nn.functional, "linear", linear)
        generate(model, prompt(1, LENGTH, seed=1), 3)
        generate(model, prompt(3, LENGTH), 3)
