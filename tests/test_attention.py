"""Attention of a single token by the compiled kernel: equal to torch's, and only where transformers would have asked torch."""

import struct
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from helpers.modes import generate, left_padded, pruned, threads_of_torch, without_library
from helpers.observe import differences, fingerprint, prompt
from helpers.tiny_models import tiny
from pop_mm.accel.attention import with_own_interface
from pop_mm.ops.layer import attention, attention_takes
from pop_mm.ops.library import library

TYPES = ("llama", "qwen3", "gemma3_text", "gpt_neox", "mixtral", "qwen2_moe", "deepseek_v3", "lfm2")


@pytest.fixture
def lengths(monkeypatch):
    """How many keys each call of the kernel saw."""
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        compiled = library(dtype)

        def attend(shape, *rest, _original=compiled.attend):
            found.append(struct.unpack_from("=q", shape, 16)[0])
            _original(shape, *rest)

        monkeypatch.setattr(compiled, "attend", attend)
    return found


def random(*shape, seed=0, dtype=torch.bfloat16):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    group=st.integers(1, 4),
    groups=st.integers(1, 5),
    length=st.integers(1, 70),
    size=st.sampled_from([1, 7, 16, 40, 64]),
    wide=st.sampled_from([1, 9, 64]),
    layout=st.sampled_from(["plain", "tokens first", "longer"]),
    threads=st.integers(1, 4),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
)
def test_it_is_torchs(group, groups, length, size, wide, layout, threads, dtype):
    def laid_out(seed, last):
        if layout == "tokens first":
            return random(1, length, groups, last, seed=seed, dtype=dtype).transpose(1, 2)
        return (
            random(1, groups, length + 5, last, seed=seed, dtype=dtype)[:, :, :length]
            if layout == "longer"
            else random(1, groups, length, last, seed=seed, dtype=dtype)
        )

    query = random(1, 1, group * groups, size, dtype=dtype).transpose(1, 2)
    key, value = laid_out(1, size), laid_out(2, wide)
    assert attention_takes(query, key, value)
    with threads_of_torch(threads):
        found = attention(query, key, value, 0.3)
    wide_key, wide_value = (t.double().repeat_interleave(group, 1) for t in (key, value))
    expected = F.scaled_dot_product_attention(query.double(), wide_key, wide_value, scale=0.3).transpose(1, 2)
    assert found.dtype == dtype
    close = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 1e-5, torch.float64: 1e-12}[dtype]
    torch.testing.assert_close(found.double(), expected, rtol=close, atol=min(close, 1e-5))


def test_large_scores_and_values_that_are_not_finite():
    query, key, value = random(1, 2, 1, 16) * 1000, random(1, 2, 6, 16, seed=1) * 1000, random(1, 2, 6, 8, seed=2)
    assert attention(query, key, value, 1.0).isfinite().all()
    value[0, 1, 3, 4] = float("nan")
    assert attention(query, key, value, 0.0).isnan().nonzero().tolist() == [[0, 0, 1, 4]]
    key[0, 0, 2, 0] = float("nan")
    assert attention(query, key, value, 0.1)[0, 0, 0].isnan().all()


def test_what_it_does_not_take():
    query, key, value = random(1, 4, 1, 8), random(1, 2, 6, 8), random(1, 2, 6, 8)
    assert attention_takes(query, key, value)
    assert not attention_takes(query.cfloat(), key.cfloat(), value.cfloat())
    assert not attention_takes(query, key.float(), value)
    assert not attention_takes(random(2, 4, 1, 8), random(2, 2, 6, 8), random(2, 2, 6, 8))
    assert not attention_takes(random(1, 4, 2, 8), key, value)
    assert not attention_takes(random(1, 3, 1, 8), key, value)
    assert not attention_takes(query, random(1, 2, 8, 6).transpose(2, 3), value)
    assert not attention_takes(query, key, random(1, 2, 7, 8))


@pytest.mark.parametrize("model_type", TYPES)
def test_a_session_decodes_by_it(model_type, lengths):
    model = tiny(model_type, torch.bfloat16)
    if model.config._attn_implementation != "sdpa":
        model.set_attn_implementation("sdpa")
    before = fingerprint(model)
    with pruned(model, "inplace", kernels="compiled"):
        lengths.clear()  # of what layers were tried with
        found = generate(model, prompt(), 2)[1]
        assert lengths and set(lengths) == {10}  # the prompt's 9 keys, and the token's own
        lengths.clear()
        with pytest.MonkeyPatch.context() as patch:
            for module in ("attention", "layers"):
                patch.setattr(f"pop_mm.accel.{module}.attention_takes", lambda *_: False)
            expected = generate(model, prompt(), 2)[1]
        assert not lengths
    torch.testing.assert_close(found, expected, rtol=0, atol=0.05 * float(expected.abs().max()))
    assert differences(before, fingerprint(model)) == []
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa_attention_forward


@pytest.mark.parametrize("case", ["eager", "two rows", "padding", "static cache", "autograd", "stock", "no compiler"])
def test_anything_else_is_left_to_transformers(case, lengths):
    model = tiny("llama", torch.bfloat16)
    if case == "eager":
        model.set_attn_implementation("eager")
    ids, mask = left_padded(prompt(2), (3, 0)) if case == "padding" else (prompt(2 if case == "two rows" else 1), None)
    settings = {"cache_implementation": "static"} if case == "static cache" else {}
    kind = {"stock": "stock", "no compiler": "auto"}.get(case, "compiled")
    with without_library() if case == "no compiler" else nullcontext(), pruned(model, "inplace", kernels=kind):
        lengths.clear()  # of what layers were tried with
        if case == "autograd":
            cache = model(ids, use_cache=True).past_key_values
            assert model(ids[:, :1], past_key_values=cache).logits.requires_grad
        else:
            generate(model, ids, 3, attention_mask=mask, **settings)
    assert not lengths


def test_what_transformers_refuses_is_refused():
    module = tiny("llama", torch.bfloat16).model.layers[0].self_attn
    forward = with_own_interface(type(module).forward)
    attend = forward.__globals__["ALL_ATTENTION_FUNCTIONS"]["sdpa"]
    with pytest.raises(ValueError, match="softcap"):
        attend(module, *(random(1, 2, 1, 8) for _ in range(3)), None, softcap=30.0)
    assert with_own_interface(torch.nn.Linear.forward) is None


def test_another_implementation_that_is_chosen_meanwhile_is_used(lengths):
    model = tiny("llama", torch.bfloat16)
    with pruned(model, "inplace", kernels="compiled"):
        lengths.clear()  # of what layers were tried with
        model.set_attn_implementation("eager")
        generate(model, prompt(), 3)
        assert not lengths
        model.set_attn_implementation("sdpa")
        generate(model, prompt(), 3)
        assert lengths


def test_a_module_whose_forward_somebody_replaced_is_left_alone(lengths):
    model = tiny("llama", torch.bfloat16)
    module = model.model.layers[0].self_attn
    own = type(module).forward.__get__(module)
    module.forward = own
    with pruned(model, "inplace", kernels="compiled"):
        lengths.clear()  # of what layers were tried with
        generate(model, prompt(), 2)
        assert module.forward is own
    assert module.forward is own and len(lengths) == model.config.num_hidden_layers - 1


def test_a_function_that_is_registered_meanwhile_is_used(lengths, monkeypatch):
    model, calls = tiny("llama", torch.bfloat16), []

    def own(module, *args, **options):
        calls.append(module)
        return sdpa_attention_forward(module, *args, **options)

    with pruned(model, "inplace", kernels="compiled"):
        lengths.clear()  # of what layers were tried with
        monkeypatch.setitem(type(ALL_ATTENTION_FUNCTIONS)._global_mapping, "sdpa", own)
        generate(model, prompt(), 3)
    assert len(calls) == 3 * model.config.num_hidden_layers and not lengths


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_the_user_compiles_decodes_in_a_session_and_after_it(dtype):
    model = tiny("llama", dtype)
    compiled = torch.compile(model, backend="eager")

    def steps(call):
        with torch.no_grad():
            cache = call(prompt(), use_cache=True).past_key_values
            return torch.stack([call(prompt()[:, :1], past_key_values=cache).logits for _ in range(4)])

    with pruned(model, "inplace", kernels="compiled"):
        expected = steps(model)
        found = steps(compiled)
    torch.testing.assert_close(found, expected, rtol=0, atol=0.05 if dtype == torch.bfloat16 else 1e-4)
    torch.testing.assert_close(steps(compiled), steps(model), rtol=0, atol=0.05 if dtype == torch.bfloat16 else 1e-4)
