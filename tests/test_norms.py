"""Norms of a few tokens by the compiled library: as transformers' modules compute them, and only those that do so."""

import pytest
import torch
from torch import nn
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNormGated

import pop_mm.kernels as kernels
from helpers.covering import covers
from helpers.modes import generate, pruned
from helpers.observe import differences, fingerprint, prompt
from helpers.tiny_models import tiny
from pop_mm.accel.norms import FewTokensNorms
from pop_mm.ops.library import library


@pytest.fixture
def sizes(monkeypatch):
    """Width of every norm that the library computed."""
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        compiled = library(dtype)

        def rms_norm(x, weight, out, rows, size, *rest, _original=compiled.rms_norm):
            found.append(size)
            _original(x, weight, out, rows, size, *rest)

        monkeypatch.setattr(compiled, "rms_norm", rms_norm)
    return found


class Static:
    active = False


def attached(module, few=True):
    norms = FewTokensNorms(kernels.library(), lambda: few, Static())
    norms.attach([module])
    return norms


def random_norm(kind, size, dtype, eps=1e-5):
    module = kind(size, eps=eps)
    with torch.no_grad():
        module.weight.copy_(torch.randn(size, generator=torch.Generator().manual_seed(1)))
    return module.to(dtype)


@covers(
    kind=[LlamaRMSNorm, Gemma2RMSNorm, GptOssRMSNorm, nn.RMSNorm],
    dtype=[torch.float32, torch.bfloat16],
    shape=[(1, 1, 8), (1, 1, 3, 37), (5, 1, 576)],
    scale=[1e-4, 1, 300],
)
def test_it_is_the_module(kind, dtype, shape, scale, sizes):
    module = random_norm(kind, shape[-1], dtype)
    x = (scale * torch.randn(shape, generator=torch.Generator().manual_seed(2))).to(dtype)
    with torch.no_grad():
        expected = module(x)
        norms = attached(module)
        sizes.clear()
        found = module(x)
    assert sizes == [shape[-1]]
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected, rtol=4 * torch.finfo(dtype).eps, atol=1e-6)
    if dtype == torch.bfloat16:  # rounded where the module rounds: what differs is a sum in another order
        assert (found == expected).float().mean() > 0.95
    norms.detach()
    assert "forward" not in module.__dict__


class CentredRMSNorm(LlamaRMSNorm):
    def forward(self, x):
        return super().forward(x - x.mean(-1, keepdim=True))


class OtherEpsRMSNorm(LlamaRMSNorm):
    def forward(self, x):
        return self.weight * x * (x.square().mean(-1, keepdim=True).sqrt() + self.variance_epsilon).reciprocal()


class LoudRMSNorm(LlamaRMSNorm):
    def forward(self, x):
        return super().forward(x), None


@pytest.mark.parametrize("kind", [CentredRMSNorm, OtherEpsRMSNorm, LoudRMSNorm, Qwen3NextRMSNormGated, nn.LayerNorm])
def test_modules_that_compute_something_else_are_left_alone(kind):
    module = kind(16, eps=1e-5)
    attached(module)
    assert "forward" not in module.__dict__


@pytest.mark.parametrize("case", ["float8_e4m3fn", "mixed", "no weight"])
def test_what_the_library_does_not_take_is_left_alone(case):
    module = LlamaRMSNorm(16)
    if case == "no weight":
        module = nn.RMSNorm(16, elementwise_affine=False)
    elif case != "mixed":
        module = module.to(getattr(torch, case))
    attached(module)
    if case != "mixed":
        assert "forward" not in module.__dict__
        return
    x = torch.randn(1, 1, 16).bfloat16()  # into a float32 weight: the module's own forward decides
    assert module(x).dtype == type(module).forward(module, x).dtype


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gemma3_text", "mixtral", "qwen2_moe"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_session_decodes_by_it(model_type, dtype, sizes):
    model = tiny(model_type, dtype)
    before = fingerprint(model)
    with pruned(model, "inplace", kernels="compiled"):
        sizes.clear()
        found = generate(model, prompt(), 2)[1]
        norms = [m for layer in model.model.layers for m in layer.modules() if "RMSNorm" in type(m).__name__]
        assert sorted(sizes) == sorted(m.weight.numel() for m in norms)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("pop_mm.accel.norms.norm_takes", lambda *_: False)
            expected = generate(model, prompt(), 2)[1]
    close = 0.05 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(found, expected, rtol=0, atol=close * float(expected.abs().max()))
    assert differences(before, fingerprint(model)) == []


@pytest.mark.parametrize("case", ["many rows", "autograd", "stock"])
def test_anything_but_a_few_tokens_is_left_to_the_module(case, sizes):
    model = tiny("llama", torch.float32)
    with pruned(model, "inplace", kernels="stock" if case == "stock" else "compiled"):
        sizes.clear()
        if case == "autograd":
            cache = model(prompt(), use_cache=True).past_key_values
            assert model(prompt()[:, :1], past_key_values=cache).logits.requires_grad
        else:
            generate(model, prompt(kernels.MOST_TOKENS + 1 if case == "many rows" else 1), 3)
    assert not sizes


class GatedRMSNorm(LlamaRMSNorm):
    def forward(self, hidden_states, gate=None):
        return super().forward(hidden_states if gate is None else hidden_states * gate)


def test_more_arguments_are_the_modules_own_affair(sizes):
    module, x = random_norm(GatedRMSNorm, 16, torch.float32), torch.randn(1, 1, 16)
    attached(module)
    sizes.clear()
    with torch.no_grad():
        assert torch.equal(module(x, x), type(module).forward(module, x, x))
        assert torch.equal(module(hidden_states=x), type(module).forward(module, x))
    assert not sizes


def test_an_eps_that_is_changed_is_used(sizes):
    module, x = random_norm(LlamaRMSNorm, 16, torch.float32), torch.randn(1, 1, 16)
    attached(module)
    module.variance_epsilon = 10.0
    with torch.no_grad():
        torch.testing.assert_close(module(x), type(module).forward(module, x))


@pytest.mark.parametrize(("model_type", "settings"), [("granitemoehybrid", {}), ("nemotron_h", {"n_groups": 1})])
def test_models_with_gated_norms(model_type, settings):
    model = tiny(model_type, torch.float32, **settings)
    found = []
    for kind in "stock", "compiled":
        with pruned(model, "inplace", kernels=kind):
            found.append(generate(model, prompt(), 4)[1])
    torch.testing.assert_close(*found, rtol=0, atol=1e-4 * float(found[0].abs().max()))


def test_a_weight_that_is_replaced_is_used(sizes):
    module = random_norm(LlamaRMSNorm, 32, torch.float32)
    attached(module)
    x = torch.randn(1, 1, 32)
    with torch.no_grad():
        module.weight = nn.Parameter(torch.full((32,), 3.0))
        sizes.clear()
        torch.testing.assert_close(module(x), type(module).forward(module, x))
    assert sizes == [32]
