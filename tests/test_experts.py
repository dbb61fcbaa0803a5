"""The record of a layer's experts, over every way that transformers stores them."""

import pytest
import torch
from torch import nn

from helpers.channels import (
    IDS,
    bits,
    channel,
    close,
    compute,
    experts_of,
    inputs,
    logits,
    random_swaps,
    records_of,
    run,
    same_bits,
    swap_everything,
)
from helpers.modes import EXPERT_LAYOUTS, IMPLEMENTATIONS, in_turn
from helpers.tiny_models import MOE_MODELS, tiny
from pop_mm.adapters import ExpertPaths
from pop_mm.weights.experts import Experts


@pytest.fixture(params=MOE_MODELS)
def model_type(request):
    return request.param


@pytest.mark.parametrize(("model_type", "implementation"), in_turn(MOE_MODELS, EXPERT_LAYOUTS, IMPLEMENTATIONS))
def test_every_expert_gets_tokens(model_type, implementation):
    dtype = torch.float32 if implementation == "grouped_mm" else torch.float64  # no float64 kernel on a CPU
    model = tiny(model_type, dtype, experts_implementation=implementation)
    seen = {}
    for record in experts_of(model):
        record.module.register_forward_pre_hook(lambda module, args: seen.update({module: args}))
    result = logits(model)
    assert len(seen) == len(experts_of(model))
    for record in experts_of(model):
        hidden, ids, weights = seen[record.module]
        assert hidden.shape == (IDS.numel(), 32) and ids.shape == weights.shape == (IDS.numel(), record.top_k)
        assert ids.unique().tolist() == [0, 1, 2, 3]
    eager = logits(tiny(model_type, dtype, experts_implementation="eager"))
    torch.testing.assert_close(result, eager, **close(model_type, 1e-4 if dtype == torch.float32 else 1e-9))


def test_swapping_channels_changes_nothing(model_type):
    model = tiny(model_type, torch.float64)
    records = records_of(model)
    dense, before = logits(model), bits(model)
    outputs = {(r, e): run(r, e, inputs(r)) for r in records if isinstance(r, Experts) for e in range(r.count)}
    swap_everything(records)
    assert all(not torch.equal(r.module.down_proj.view(torch.int64), before[f"{r.name}.down_proj"]) for r, _ in outputs)
    for (record, expert), output in outputs.items():
        torch.testing.assert_close(run(record, expert, inputs(record)), output, **close(model_type, 1e-9))
    torch.testing.assert_close(logits(model), dense, **close(model_type, 1e-9))
    swap_everything(records)
    assert same_bits(bits(model), before)


def test_an_expert_is_what_its_views_say(model_type):
    model = tiny(model_type, torch.float64)
    for record in experts_of(model):
        x = inputs(record)
        for expert in range(record.count):
            for width in (24, 10, 7, 1):
                views = [*record.input_views(expert, width), record.down_view(expert, width)]
                held = {p.data_ptr() for p in record.module.parameters()}
                assert all(w.untyped_storage().data_ptr() in held for w, _ in views), "copies"
                assert sum(w.shape[1] for w, _ in views[:-1]) == width * (2 if record.module.has_gate else 1)
                stored = record.down.detach().clone()
                with torch.no_grad():
                    (record.down if record.module.is_transposed else record.down.transpose(1, 2))[expert, width:] = 0
                masked = run(record, expert, x)
                with torch.no_grad():
                    record.down.copy_(stored)
                torch.testing.assert_close(compute(record, expert, x, width), masked, **close(model_type, 1e-12))
            assert (run(record, expert, x) - masked).abs().max() > 0.01, "the other channels hardly matter"


def test_narrow_ffns_equal_masked_ones(model_type):
    """The FFNs beside the experts, dense and shared, as modules of their own."""
    model = tiny(model_type, torch.float64)
    for ffn in records_of(model):
        if isinstance(ffn, Experts):
            continue
        half, x = ffn.size // 2, inputs(ffn)
        hook = ffn.down.module.register_forward_pre_hook(
            lambda _, args, half=half: (torch.cat([args[0][..., :half], 0 * args[0][..., half:]], -1),)
        )
        with torch.no_grad():
            masked = ffn.holder(x)
            hook.remove()
            dense = ffn.holder(x)
            for p in ffn.projections:
                p.module.forward = p.narrow(half)
            torch.testing.assert_close(ffn.holder(x), masked, **close(model_type, 1e-12))
        assert (dense - masked).abs().max() > 0.01


@pytest.mark.parametrize(("model_type", "dtype"), in_turn(MOE_MODELS, EXPERT_LAYOUTS, (torch.float64, torch.bfloat16)))
def test_norms_equal_loops(model_type, dtype):
    record = experts_of(tiny(model_type, dtype))[-1]
    down, reads = record.down_column_norms(), record.input_norms()
    assert down.shape == reads.shape == record.channel_shape
    assert down.dtype == reads.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for expert in range(record.count):
        for index in range(record.size):
            read, written = channel(record, expert, index)
            torch.testing.assert_close(down[expert, index], written.to(down.dtype).norm())
            torch.testing.assert_close(reads[expert, index], read.to(down.dtype).norm())


def test_swapping_moves_whole_channels_of_one_expert(model_type):
    record = experts_of(tiny(model_type, torch.bfloat16))[0]
    with torch.no_grad():
        record.down.view(-1)[:2] = torch.tensor([float("nan"), -0.0])
        wide = record.module.gate_up_proj if record.module.has_gate else record.module.up_proj
        wide.view(-1)[:2] = torch.tensor([float("nan"), -0.0])
    before = {index: [w.clone() for w in channel(record, 2, index)] for index in range(24)}
    others, everything = record.module.down_proj[[0, 1, 3]].clone(), bits(record.module)
    first, second = torch.tensor([0, 5, 23]), torch.tensor([7, 22, 1])
    record.swap(2, first, second)
    moved = dict(zip([*first.tolist(), *second.tolist()], [*second.tolist(), *first.tolist()], strict=True))
    for index in range(24):
        for now, then in zip(channel(record, 2, index), before[moved.get(index, index)], strict=True):
            assert torch.equal(now.view(torch.int16), then.view(torch.int16))
    assert torch.equal(record.module.down_proj[[0, 1, 3]].view(torch.int16), others.view(torch.int16))
    record.swap(2, first, second)
    assert same_bits(bits(record.module), everything)


def test_biases_of_gpt_oss_move_along():
    module = (record := experts_of(tiny("gpt_oss"))[0]).module
    inner, outer = module.gate_up_proj_bias[1].clone(), module.down_proj_bias.clone()
    assert inner.unique().numel() == 48
    record.swap(1, torch.tensor([3]), torch.tensor([20]))
    expected = inner.clone()
    expected[[6, 7, 40, 41]] = inner[[40, 41, 6, 7]]
    assert torch.equal(module.gate_up_proj_bias[1], expected)
    assert torch.equal(module.down_proj_bias, outer), "not by channel"


LAYOUTS = {
    "biased": dict(has_bias=True),
    "ungated, biased, transposed": dict(has_gate=False, has_bias=True, is_transposed=True),
    "ungated, biased": dict(has_gate=False, has_bias=True),
    "interleaved": dict(is_concatenated=False),
    "interleaved, biased": dict(is_concatenated=False, has_bias=True),
    "transposed, biased": dict(is_transposed=True, has_bias=True),  # openai_privacy_filter
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("implementation", ["batched_mm", "grouped_mm"])
def test_every_layout_that_the_interface_knows(layout, implementation):
    """No decoder of transformers has these combinations; its own implementations say what they mean."""
    from transformers import MixtralConfig
    from transformers.integrations.moe import use_experts_implementation

    flags = LAYOUTS[layout]
    blocks = 2 if flags.get("has_gate", True) else 1
    name = "gate_up_proj" if blocks == 2 else "up_proj"
    dtype = torch.float32 if implementation == "grouped_mm" else torch.float64

    @use_experts_implementation(**flags)
    class Own(nn.Module):
        def __init__(self, config):
            super().__init__()
            shapes = [(3, blocks * 24, 32), (3, 32, 24)]
            for key, shape in zip([name, "down_proj"], shapes, strict=True):
                stored = (shape[0], shape[2], shape[1]) if flags.get("is_transposed") else shape
                setattr(self, key, nn.Parameter(torch.randn(stored, dtype=dtype) / 5))
                if flags.get("has_bias"):
                    setattr(self, f"{key}_bias", nn.Parameter(torch.randn(shape[:2], dtype=dtype)))
            self.num_experts = 3
            self.act_fn = nn.SiLU()

        def forward(self, hidden, ids, weights):
            raise AssertionError

        if not flags.get("is_concatenated", True):

            def _apply_gate(self, gate_up):
                return self.act_fn(gate_up[..., ::2]) * gate_up[..., 1::2]

    module = Own(config := MixtralConfig())
    config._experts_implementation = implementation
    record = ExpertPaths("own").build("layers.0", nn.ModuleDict({"own": module}), 0)
    assert record.layout.count(",") == 1 + layout.count(",") + 1
    x, before = inputs(record), bits(module)
    outputs = [run(record, expert, x) for expert in range(3)]
    tolerance = dict(rtol=0, atol=1e-5 if dtype == torch.float32 else 1e-12)
    for expert in range(3):
        torch.testing.assert_close(compute(record, expert, x, 24), outputs[expert], **tolerance)
    norms = record.down_column_norms(), record.input_norms()
    for expert in range(3):
        record.swap(expert, *random_swaps(24, expert))
        for index in range(24):
            read, written = channel(record, expert, index)
            torch.testing.assert_close(record.down_column_norms()[expert, index], written.norm())
            torch.testing.assert_close(record.input_norms()[expert, index], read.norm())
    for expert in range(3):
        torch.testing.assert_close(run(record, expert, x), outputs[expert], **tolerance)
        assert not torch.equal(record.down_column_norms()[expert], norms[0][expert])
        assert not torch.equal(record.input_norms()[expert], norms[1][expert])
        record.swap(expert, *random_swaps(24, expert))
    assert same_bits(bits(module), before)


# --- what cannot be moved ------------------------------------------------------------------------------------------


def _another_type(record):
    weight = record.down.detach()
    del record.module.down_proj
    record.module.down_proj = weight


def _integers(record):
    weight = torch.zeros_like(record.module.gate_up_proj, dtype=torch.int8)
    record.module.gate_up_proj = nn.Parameter(weight, requires_grad=False)


def _strided(record):
    record.module.down_proj = nn.Parameter(record.down.detach().transpose(1, 2).contiguous().transpose(1, 2))


def _inference(record):
    with torch.inference_mode():
        record.module.gate_up_proj = nn.Parameter(record.module.gate_up_proj.clone())


def _parametrised(record):
    nn.utils.parametrize.register_parametrization(record.module, "down_proj", nn.Identity())


def _offloaded(record):
    record.module._hf_hook = object()
    record.module.to("meta")


def _flat(record):
    record.module.gate_up_proj = nn.Parameter(record.module.gate_up_proj.detach().flatten(0, 1))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (_another_type, "down_proj of model.layers.0.mlp.experts is a Tensor"),
        (_integers, "gate_up_proj of model.layers.0.mlp.experts is torch.int8 with shape (4, 48, 32)"),
        (_flat, "gate_up_proj of model.layers.0.mlp.experts is torch.float32 with shape (192, 32)"),
        (_strided, "down_proj of model.layers.0.mlp.experts is not contiguous"),
        (_inference, "gate_up_proj of model.layers.0.mlp.experts was made in inference mode"),
        (_parametrised, "model.layers.0.mlp.experts is parametrised"),
        (_offloaded, "gate_up_proj of model.layers.0.mlp.experts is offloaded"),
    ],
)
def test_why_not_plain(damage, reason):
    record = experts_of(tiny("mixtral"))[0]
    damage(record)
    assert record.why_not_plain() == reason


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss", "nemotron_h"])
def test_offloaded_experts_have_norms_all_the_same(model_type):
    from accelerate import cpu_offload

    model = tiny(model_type)
    expected = [(record.down_column_norms(), record.input_norms()) for record in experts_of(model)]
    for record, (down, reads) in zip(experts_of(cpu_offload(model)), expected, strict=True):
        assert "is offloaded" in record.why_not_plain()
        assert torch.equal(record.down_column_norms(), down) and torch.equal(record.input_norms(), reads)
        assert record.down.device.type == "meta", "as it was"


def test_experts_of_another_width_than_the_model():
    model = tiny("nemotron_h", torch.float64, moe_latent_size=12)
    record = experts_of(model)[0]
    assert (record.hidden_size, record.size, record.weight_count) == (12, 24, 2 * 2 * 24 * 12)
    x = inputs(record)
    torch.testing.assert_close(compute(record, 1, x, 24), run(record, 1, x))
