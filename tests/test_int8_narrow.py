"""int8 weights that are not turned: the product of one token, the dense model on compiled kernels, and POP in place."""

import pytest
import torch
from test_int8_kernels import quantised
from test_int8_rows import CLOSE, dequantised, int8, matrices
from test_rows import Maker, assert_close

from helpers.modes import LENGTH, MODES, generate, pruned, threads_of_torch, without_library
from helpers.observe import partitions, prompt, same_afterwards
from helpers.tiny_models import tiny
from pop_mm import SessionError, prune
from pop_mm.formats import stored
from pop_mm.ops import library
from pop_mm.ops.dot import Dot

pytest.importorskip("torchao")
FAMILIES = ("llama", "phi3", "opt", "gpt_neox", "qwen2_moe")


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("dtype", library.INT8)
@pytest.mark.parametrize(("inputs", "outputs"), [(1, 1), (37, 61), (64, 48), (300, 7)])
def test_products_are_those_of_float64(dtype, threads, inputs, outputs):
    make = Maker(dtype, inputs)
    matrix, scale, weight = quantised(make(inputs, outputs + 3))
    matrix, scale = matrix.t().contiguous()[:outputs], scale[:outputs].view(-1, 1).contiguous()
    for columns in (inputs, max(1, inputs // 2)):  # narrow too
        x, bias = make(1, 1, columns), make(outputs)
        with threads_of_torch(threads):
            found = Dot(matrix[:, :columns], scale, bias, dtype)(x)
        assert found.shape == (1, 1, outputs)
        assert_close(found[0, 0], x[0, 0].double() @ weight[:columns, :outputs] + bias.double(), dtype)


def test_every_number_is_read_right():
    every = torch.arange(-128, 172).clamp(max=127).to(torch.int8)
    found = Dot(every.view(1, -1), torch.tensor([[0.5]]), None, torch.float32)(torch.ones(300))
    assert found.item() == every.sum().item() / 2


@pytest.fixture(params=FAMILIES)
def pair(request):
    model = int8(tiny(request.param))
    return model, dequantised(model, tiny(request.param))


@pytest.mark.parametrize("mode", ["single", "greedy", "chunked", "assisted"])
@pytest.mark.parametrize("kernels", ["stock", "compiled"])
def test_pop_moves_channels_as_in_the_dequantised_twin(pair, mode, kernels):
    model, twin = pair
    run = MODES[mode][0]
    with pruned(twin) as session:
        expected = run(twin)
        parts = partitions(session)
    with same_afterwards(model), pruned(model, "auto", kernels=kernels) as session:
        found = run(model)
        assert partitions(session) == parts
        plans = [plan for plan in session.plans if plan.ffn.role != "expert"]
        assert {(plan.backend, plan.reason) for plan in plans} == {("inplace", "int8 weights")}
        assert session.report.timings.masked_forwards == 0 or mode != "single"
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1], rtol=0, atol=CLOSE)


def test_pop_without_a_compiler():
    model = int8(tiny("llama"))
    with pruned(model):
        expected = generate(model, prompt(1, LENGTH))
    with without_library(), same_afterwards(model), pruned(model, "auto"):
        found = generate(model, prompt(1, LENGTH))
    torch.testing.assert_close(found[1], expected[1], rtol=0, atol=CLOSE)


@pytest.mark.parametrize("settings", [{"batch": "per_sequence"}, {"prefill": "partition", "probe_tokens": 4}])
def test_what_the_kernels_do_not_take_is_masked(settings):
    model = int8(tiny("llama"))
    with same_afterwards(model), pruned(model, "auto", **settings) as session:
        generate(model, prompt(2, LENGTH))
    assert {plan.backend for plan in session.plans} == {"masked"}


@pytest.mark.parametrize("dtype", library.INT8[:2])
def test_the_dense_model_on_compiled_kernels(dtype):
    model = int8(tiny("llama", dtype))
    expected, calls = generate(model, prompt(1, LENGTH)), []
    own = Dot.__call__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Dot, "__call__", lambda self, x: (calls.append(self), own(self, x))[1])
        with same_afterwards(model), prune(model, ratio=0.0, kernels="compiled"):
            found = generate(model, prompt(1, LENGTH))
    assert {len(calls) % len(matrices(model)), len(set(map(id, calls)))} == {0, len(matrices(model))}
    if dtype is torch.float32:
        torch.testing.assert_close(found[1], expected[1], rtol=0, atol=CLOSE)


def test_scales_move_with_their_channels():
    model, ids = int8(tiny("llama")), prompt(1, LENGTH)
    before = [stored(layer.mlp.up_proj.weight).scale.clone() for layer in model.model.layers]
    with pruned(model, "auto"):
        generate(model, ids)
        during = [stored(layer.mlp.up_proj.weight).scale for layer in model.model.layers]
        assert any(not torch.equal(a, b) for a, b in zip(before, during, strict=True))
        for a, b in zip(before, during, strict=True):
            assert torch.equal(a.flatten().sort().values, b.flatten().sort().values)
    for a, b in zip(before, during, strict=True):
        assert torch.equal(a, b)


def test_what_somebody_writes_while_channels_are_moved_is_refused():
    model, ids = int8(tiny("llama")), prompt(1, LENGTH)
    session = pruned(model, "auto").attach()
    generate(model, ids)
    model.model.layers[0].mlp.up_proj.weight.scale.add_(0.5)
    with pytest.raises(SessionError, match=r"up_proj\.weight\.scale was written"):
        generate(model, ids)
    with pytest.warns(UserWarning, match="was written"):
        session.detach()


def test_a_scale_that_was_multiplied_is_taken_along():
    model, ids = int8(tiny("llama")), prompt(1, LENGTH)
    wanted = [2 * stored(layer.mlp.up_proj.weight).scale for layer in model.model.layers]
    with pruned(model, "auto"):
        generate(model, ids)
        for layer in model.model.layers:
            layer.mlp.up_proj.weight.scale = 2 * layer.mlp.up_proj.weight.scale
        generate(model, ids)
    for layer, scale in zip(model.model.layers, wanted, strict=True):
        assert torch.equal(layer.mlp.up_proj.weight.scale, scale)
