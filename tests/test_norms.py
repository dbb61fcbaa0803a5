"""Norms of prompts and of a few tokens by the compiled library: as transformers' modules compute them, if they do so."""

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


def attached(module):
    norms = FewTokensNorms(kernels.library(), lambda: True, Static(), lambda: False)
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
    shape=[(1, 1, 8), (1, 1, 3, 37), (5, 1, 576), (2, 40, 576)],
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
def test_a_session_runs_prompts_and_steps_by_it(model_type, dtype, sizes):
    model = tiny(model_type, dtype)
    before = fingerprint(model)
    with pruned(model, "inplace", kernels="compiled"):
        sizes.clear()
        found = generate(model, prompt(), 2)[1]
        norms = [m for layer in model.model.layers for m in layer.modules() if "RMSNorm" in type(m).__name__]
        widths = [m.weight.numel() for m in norms]
        whole = [width for width in widths if width == model.config.hidden_size]
        heads = [width for width in widths if width != model.config.hidden_size]
        of_prompt = [] if model_type == "gemma3_text" else heads  # which norms heads that do not lie together
        assert sorted(sizes) == sorted(widths + whole + of_prompt)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("pop_mm.accel.norms.norm_takes", lambda *_: False)
            expected = generate(model, prompt(), 2)[1]
    close = 0.05 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(found, expected, rtol=0, atol=close * float(expected.abs().max()))
    assert differences(before, fingerprint(model)) == []


@pytest.mark.parametrize("case", ["many rows", "autograd", "autocast", "stock"])
def test_what_the_library_cannot_know_is_left_to_the_module(case, sizes):
    model = tiny("llama", torch.float32)
    rows = kernels.MOST_TOKENS + 1 if case == "many rows" else 1
    with pruned(model, "inplace", kernels="stock" if case == "stock" else "compiled"):
        sizes.clear()
        with torch.set_grad_enabled(case == "autograd"), torch.autocast("cpu", enabled=case == "autocast"):
            cache = model(prompt(rows), use_cache=True).past_key_values
            if case == "many rows":
                assert sizes
                sizes.clear()
            logits = model(prompt(rows)[:, :1], past_key_values=cache).logits
    assert logits.requires_grad == (case == "autograd")
    assert not sizes
