"""Decoder layers of one token without a frame for each part: what they compute, and when they are left to themselves."""

import gc
import json
from contextlib import nullcontext

import pytest
import torch
from torchao.quantization import Int8WeightOnlyConfig, quantize_
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer

import pop_mm
from helpers.modes import generate, left_padded
from helpers.observe import differences, fingerprint, prompt
from helpers.tiny_models import tiny
from pop_mm.accel.layers import Parts, agrees
from pop_mm.accel.whole import WholeLayer
from pop_mm.ops.rows import RowsFFN, RowsLinear

COMMON = ("llama", "mistral", "qwen2", "qwen3", "mixtral", "qwen3_moe")
SETTINGS = {"dense": {"ratio": 0.0, "kernels": "compiled"}, "pop": {"ratio": 0.4}, "thresholds": {"budget": 0.6}}


@pytest.fixture
def tokens(monkeypatch):
    """Layers that were run here, one entry for each."""
    found, by_parts, by_rows = [], Parts.run, WholeLayer.__call__

    def run(self, *args):
        found.append(self.layer)
        return by_parts(self, *args)

    def whole(self, *args):
        out = by_rows(self, *args)
        found.extend([] if out is None else [self.parts.layer])
        return out

    monkeypatch.setattr(Parts, "run", run)
    monkeypatch.setattr(WholeLayer, "__call__", whole)
    return found


def first_layer(model):
    return model.model.layers[0]


@pytest.mark.parametrize("model_type", COMMON)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_common_layers_are_recognised(model_type, dtype):
    assert agrees(Parts.of(first_layer(tiny(model_type, dtype))))


def test_a_layer_whose_attention_cancels_is_recognised():
    """Of the sums of its o projection little is left, so that rounding is much of it: as in the first layer of SmolLM2."""
    layer, given = first_layer(tiny("llama", torch.float32)), []
    layer.self_attn.o_proj.register_forward_pre_hook(lambda _, args: given.append(args[0].flatten()))
    agrees(Parts.of(layer))
    weight, x = layer.self_attn.o_proj.weight.data, given[0]
    weight -= torch.outer(weight @ x, x) / x.square().sum() * (1 - 2**-6)
    layer.self_attn.o_proj.bias.data.zero_()
    assert agrees(Parts.of(layer))


@pytest.mark.parametrize("model_type", ["gemma2", "phi3", "olmo2", "gpt2", "gpt_neox"])
def test_layers_with_other_parts_are_not(model_type):
    model = tiny(model_type)
    assert not any(Parts.of(module) for module in model.modules())


class WithoutResidual(LlamaDecoderLayer):
    def forward(self, hidden_states, **kwargs):
        return super().forward(hidden_states, **kwargs) - hidden_states


class Loud(LlamaDecoderLayer):
    def forward(self, hidden_states, **kwargs):
        return (super().forward(hidden_states, **kwargs),)


class Unrotated(LlamaAttention):
    def forward(self, hidden_states, position_embeddings, **kwargs):
        cos, sin = position_embeddings
        return super().forward(hidden_states, position_embeddings=(torch.ones_like(cos), 0 * sin), **kwargs)


class Doubled(LlamaAttention):
    def forward(self, hidden_states, **kwargs):
        found, weights = super().forward(hidden_states, **kwargs)
        return 2 * found, weights


@pytest.mark.parametrize("kind", [WithoutResidual, Loud, Unrotated, Doubled])
def test_layers_that_compute_something_else_are_not(kind):
    layer = first_layer(tiny("llama"))
    (layer if issubclass(kind, LlamaDecoderLayer) else layer.self_attn).__class__ = kind
    assert not agrees(Parts.of(layer))


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("model_type", COMMON)
def test_a_session_decodes_as_without_them(settings, model_type, tokens):
    model = tiny(model_type, torch.float64 if settings == "thresholds" else torch.float32)
    before, found = fingerprint(model), {}
    for by_parts in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            if not by_parts:
                patch.setattr(Parts, "of", lambda layer: None)
            with pop_mm.prune(model, **SETTINGS[settings]):
                tokens.clear()
                found[by_parts] = generate(model, prompt(), 4)
        assert len(tokens) == by_parts * 3 * model.config.num_hidden_layers
    assert torch.equal(found[True][0], found[False][0])
    close = 1e-12 if settings == "thresholds" else 1e-4
    torch.testing.assert_close(found[True][1], found[False][1], rtol=0, atol=close)
    assert differences(before, fingerprint(model)) == []


@pytest.mark.parametrize("case", ["two rows", "padding", "eager", "static cache", "autograd", "stock"])
def test_anything_else_is_left_to_the_layers(case, tokens):
    model = tiny("llama")
    if case == "eager":
        model.set_attn_implementation("eager")
    ids, mask = left_padded(prompt(2), (3, 0)) if case == "padding" else (prompt(2 if case == "two rows" else 1), None)
    options = {"cache_implementation": "static"} if case == "static cache" else {}
    with pop_mm.prune(model, ratio=0.4, kernels="stock" if case == "stock" else "compiled"):
        tokens.clear()
        if case == "autograd":
            cache = model(ids, use_cache=True).past_key_values
            assert model(ids[:, :1], past_key_values=cache).logits.requires_grad
        else:
            generate(model, ids, 3, attention_mask=mask, **options)
    assert not tokens


def decoded(model, without_whole_layers=False):
    """Tokens, logits, what the report says that was read; and how many layers were two calls."""
    calls, whole = [], WholeLayer.__call__

    def counted(self, *args):
        out = whole(self, *args)
        calls.extend([] if out is None else [1])
        return out

    with pytest.MonkeyPatch.context() as patch, pop_mm.prune(model, budget=0.6) as session:
        patch.setattr(WholeLayer, "__call__", counted)
        if without_whole_layers:
            patch.setattr(WholeLayer, "__call__", lambda *_: None)
        ids, logits = generate(model, prompt(), 4)
        report = json.loads(session.report.to_json())
    return ids, logits, report["inputs"], len(calls)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("model_type", COMMON)
def test_two_calls_a_layer_give_the_bits_of_its_parts(model_type, dtype):
    model = tiny(model_type, dtype)
    found = decoded(model)
    assert found[3] == 3 * model.config.num_hidden_layers
    expected = decoded(model, without_whole_layers=True)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    assert found[2] == expected[2]


def test_nothing_of_the_turned_weights_is_kept_after_a_session():
    def kernels():
        gc.collect()
        return sum(isinstance(thing, RowsLinear | RowsFFN) for thing in gc.get_objects())

    model, before = tiny("llama"), kernels()
    with pop_mm.prune(model, budget=0.6) as session:
        generate(model, prompt(), 4)
        assert kernels() > before
        model.state_dict()
        assert kernels() == before
        generate(model, prompt(), 4)
    assert kernels() == before and session.report.prompt_tokens


@pytest.mark.parametrize("weights", ["all", "ffn"])
def test_two_calls_a_layer_on_int8_weights(weights):
    model = tiny("llama", torch.float32, hidden_size=64, intermediate_size=128)
    only = (lambda module, name: isinstance(module, torch.nn.Linear) and "mlp" in name) if weights == "ffn" else None
    quantize_(model, Int8WeightOnlyConfig(), **({} if only is None else {"filter_fn": only}))
    found, expected = decoded(model), decoded(model, without_whole_layers=True)
    assert torch.equal(found[1], expected[1]) and found[2] == expected[2]
    assert found[3] == 3 * model.config.num_hidden_layers


def test_a_norm_that_is_changed_inside_a_session_is_followed():
    model = tiny("llama")
    found = []
    for whole in (True, False):
        norm = first_layer(model).post_attention_layernorm
        with pytest.MonkeyPatch.context() as patch, pop_mm.prune(model, budget=0.6):
            if not whole:
                patch.setattr(WholeLayer, "__call__", lambda *_: None)
            first = generate(model, prompt(), 4)[1]
            patch.setattr(norm, "variance_epsilon", 0.5)
            found.append(generate(model, prompt(), 4)[1])
            assert not torch.equal(first, found[-1])
    assert torch.equal(*found)


@pytest.mark.parametrize("path", ["self_attn", "self_attn.q_proj", "self_attn.o_proj", "input_layernorm"])
@pytest.mark.parametrize("settings", ["pop", "thresholds"])
def test_hooks_of_the_parts_are_called(path, settings, tokens):
    model, calls = tiny("llama"), []
    with pop_mm.prune(model, **SETTINGS[settings]):
        module = first_layer(model).get_submodule(path)
        handle = module.register_forward_hook(lambda *_: calls.append(1))
        tokens.clear()
        generate(model, prompt(), 4)
        handle.remove()
        assert len(calls) == 4 and first_layer(model) not in tokens


@pytest.mark.parametrize("path", ["mlp", "mlp.up_proj", "mlp.down_proj", "mlp.act_fn"])
def test_hooks_of_an_ffn_are_called(path, tokens):
    model, calls = tiny("llama"), []
    with pop_mm.prune(model, budget=0.6):
        handle = first_layer(model).get_submodule(path).register_forward_hook(lambda *_: calls.append(1))
        tokens.clear()
        generate(model, prompt(), 4)
        handle.remove()
    assert len(calls) == 4 and len(tokens) == 3 * model.config.num_hidden_layers


def test_outputs_that_are_asked_for_come(tokens):
    model = tiny("llama")
    with pop_mm.prune(model, ratio=0.4, kernels="compiled"), torch.no_grad():
        found = []
        for asked in ({}, {"output_hidden_states": True}):
            cache = model(prompt(), use_cache=True).past_key_values
            found.append(model(prompt()[:, :1], past_key_values=cache, **asked))
    assert len(found[1].hidden_states) == model.config.num_hidden_layers + 1
    torch.testing.assert_close(found[0].logits, found[1].logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("where", ["self_attn", "self_attn.v_proj", "post_attention_layernorm"])
def test_a_part_whose_forward_somebody_replaced_is_called(where, tokens):
    model, calls = tiny("llama"), []
    module = first_layer(model).get_submodule(where)
    own = type(module).forward.__get__(module)

    def forward(*args, **kwargs):
        calls.append(1)
        return own(*args, **kwargs)

    module.forward = forward
    with pop_mm.prune(model, ratio=0.4, kernels="compiled"):
        assert not calls
        tokens.clear()
        generate(model, prompt(), 4)
    assert len(calls) == 4 and first_layer(model) not in tokens and tokens


@pytest.mark.parametrize("cache", [None, "sliding"])
def test_caches_of_other_kinds(cache, tokens):
    model = tiny("mistral", torch.float64)
    model.config.sliding_window = 6 if cache else None
    found = []
    for settings in ({"kernels": "compiled"}, {"kernels": "stock"}):
        with pop_mm.prune(model, ratio=0.4, **settings) if cache is None or settings else nullcontext():
            found.append(generate(model, prompt(), 6))
    assert torch.equal(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1], found[1][1], rtol=0, atol=1e-9)
