"""int8 weights by rows: as masked, as the dequantised twin, and given back as they were."""

import copy

import pytest
import torch
from test_rows_executor import both, by_rows, steps
from test_thresholds import same, thresholds

from helpers.modes import LENGTH, MODES, generate
from helpers.observe import prompt, same_afterwards
from helpers.tiny_models import tiny
from helpers.tiny_vlms import image_inputs, tiny_vlm
from pop_mm import PopConfig, Thresholds
from pop_mm.formats import format_of, stored, tensors_behind
from pop_mm.ops.turn import is_turned
from pop_mm.samples.quantise import quantise
from pop_mm.session.threshold_session import plan_thresholds

quantization = pytest.importorskip("torchao.quantization")
CLOSE = 2e-5  # of logits in float32


def int8(model):
    quantise(model)
    generate(model, prompt(), 2)  # what is set up on first use is no change
    return model


def dequantised(model, original):
    """The twin with plain weights."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if format_of(p).name == "int8":
                original.get_parameter(name).copy_(p.dequantize())
    return original


def linears(model):
    return [m for m in model.modules() if format_of(m._parameters.get("weight")) and stored(m.weight)]


def matrices(model):
    return [stored(m.weight).matrix for m in linears(model) if format_of(m.weight).name == "int8"]


@pytest.fixture(params=["llama", "phi3", "opt", "gpt_neox", "lfm2", "qwen2_moe", "mixtral"])
def pair(request):
    model = int8(tiny(request.param))
    return model, dequantised(model, tiny(request.param))


@pytest.mark.parametrize("mode", ["single", "chunked", "assisted", "beams", "static"])
def test_rows_give_what_masked_and_the_dequantised_twin_give(pair, mode):
    model, twin = pair
    run = MODES[mode][0]
    with thresholds(twin, backend="masked"):
        expected = run(twin)
    with same_afterwards(model):
        (masked, shares), (found, own), session = both(run, model)
    assert by_rows(session)
    same(masked, expected, CLOSE)
    same(found, expected, CLOSE)
    assert own == pytest.approx(shares, abs=0.01)
    if mode == "single":
        assert session.timings.masked_forwards == 0 and session.moving_seconds > 0


def test_weights_lie_input_major_meanwhile_in_no_more_memory(pair):
    model, _ = pair
    tensors = {t.data_ptr(): t for p in model.parameters() for t in tensors_behind(p)}.values()
    size = sum(t.untyped_storage().nbytes() for t in tensors)
    with thresholds(model) as session:
        mine = [m for plan in session.plans for m in plan.record.modules if hasattr(m, "weight")]  # not routed experts
        turning = [stored(m.weight).matrix for m in mine]
        generate(model, prompt(1, LENGTH))
        assert turning and all(map(is_turned, turning))
        assert sum(t.untyped_storage().nbytes() for t in tensors) == size
        model.state_dict()  # whoever takes them gets their own order
        assert all(m.is_contiguous() for m in matrices(model))
        generate(model, prompt(1, LENGTH))
        assert all(map(is_turned, turning))
    assert all(m.is_contiguous() for m in matrices(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_floats_are_as_near_float64_as_masked(dtype):
    model = int8(tiny("llama", dtype))
    twin = dequantised(model, tiny("llama")).double()
    with torch.no_grad():
        for name, module in model.named_modules():
            if (
                format_of(module._parameters.get("weight"))
                and (found := stored(module.weight))
                and found.scale is not None
            ):
                twin.get_submodule(name).weight.copy_(found.matrix.double() * found.scale.double())
    with thresholds(twin, backend="masked"):
        expected = steps(twin)
    (masked, shares), (found, own), session = both(steps, model)
    assert by_rows(session)
    errors = [float((one - expected).abs().mean()) for one in (masked, found)]
    assert errors[1] < 1.5 * errors[0]
    assert own == pytest.approx(shares, abs=0.03)


def test_a_vision_language_model():
    model = quantise(tiny_vlm("llava", torch.float32))
    inputs = image_inputs("llava", model, images=[1])

    def run(model):
        out = model.generate(**inputs, max_new_tokens=4, output_logits=True, return_dict_in_generate=True)
        return out.sequences, torch.stack(out.logits)

    run(model)
    with same_afterwards(model):
        (expected, shares), (found, own), session = both(run, model)
    assert by_rows(session) and matrices(model)
    same(found, expected, CLOSE)
    assert own == pytest.approx(shares, abs=0.01)


def test_the_lm_head_too():
    model = tiny("llama", tie_word_embeddings=False)
    config = quantization.Int8WeightOnlyConfig()
    quantization.quantize_(model, config)
    assert format_of(model.lm_head.weight).name == "int8"
    generate(model, prompt(), 2)
    with same_afterwards(model):
        (expected, _), (found, _), session = both(MODES["single"][0], model, method=Thresholds(head_budget=0.8))
    assert by_rows(session) and any(plan.record.role == "lm_head" for plan in session.plans)
    same(found, expected, CLOSE)


def test_a_checkpoint_that_transformers_loads(tmp_path):
    from transformers import AutoModelForCausalLM, TorchAoConfig

    tiny("llama").save_pretrained(tmp_path / "plain")
    form = TorchAoConfig(quantization.Int8WeightOnlyConfig())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", quantization_config=form)
    model.save_pretrained(tmp_path / "int8")
    for again in (model, AutoModelForCausalLM.from_pretrained(tmp_path / "int8")):
        again.generation_config.pad_token_id = 0
        generate(again, prompt(), 2)
        with same_afterwards(again):
            (expected, _), (found, _), session = both(MODES["single"][0], again)
        assert by_rows(session)
        same(found, expected, CLOSE)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (lambda q: q.Int8WeightOnlyConfig(granularity=q.PerTensor()), "not one for each output"),
        (lambda q: q.Int8WeightOnlyConfig(granularity=q.PerGroup(32)), "not one for each output"),
        (lambda q: q.Int8DynamicActivationInt8WeightConfig(), "activations too"),
        (lambda q: q.Float8WeightOnlyConfig(), "is a Float8Tensor"),
    ],
    ids=["tensor", "groups", "activations", "float8"],
)
def test_other_weights_of_torchao_are_masked_and_it_says_why(config, said):
    model = tiny("llama", hidden_size=64, intermediate_size=128, head_dim=16)
    quantization.quantize_(model, config(quantization), filter_fn=lambda m, name: name.endswith("_proj"))
    plans = plan_thresholds(model, PopConfig(budget=0.6))
    assert {plan.backend for plan in plans} == {"masked"} and all(said in plan.reason for plan in plans)


def test_zero_points_are_masked():
    model = quantise(tiny("llama"))
    model.model.layers[0].mlp.up_proj.weight.zero_point[3] = 1
    plans = {plan.record.name: plan for plan in plan_thresholds(model, PopConfig(budget=0.6))}
    assert "with zero points" in plans["model.layers.0.mlp"].reason
    assert plans["model.layers.1.mlp"].backend == "rows"


def test_a_torchao_that_computes_something_else_is_masked(monkeypatch):
    monkeypatch.setattr("pop_mm.formats.int8._is_as_known", lambda: False)
    model = quantise(tiny("llama"))
    assert {plan.backend for plan in plan_thresholds(model, PopConfig(budget=0.6))} == {"masked"}


def test_weights_that_two_modules_share_are_masked():
    model = quantise(tiny("llama"))
    one, other = (layer.mlp.up_proj for layer in model.model.layers)
    other._parameters["weight"] = copy.copy(one.weight)  # another tensor of the same memory
    assert other.weight is not one.weight and other.weight.qdata.data_ptr() == one.weight.qdata.data_ptr()
    plans = {plan.record.name: plan for plan in plan_thresholds(model, PopConfig(budget=0.6))}
    assert (
        plans["model.layers.1.mlp"].backend == "masked" and "shares its weights" in plans["model.layers.1.mlp"].reason
    )


def replace_qdata(weight):
    weight.qdata = (weight.qdata // 2).contiguous()


def replace_scale(weight):
    weight.scale = weight.scale * 2


def write_scale(weight):
    weight.scale.mul_(2)


def write_qdata(weight):
    weight.qdata.bitwise_not_()


@pytest.mark.parametrize("change", [replace_qdata, replace_scale, write_scale, write_qdata])
def test_what_changes_inside_a_session_is_followed(change):
    model, ids = int8(tiny("llama")), prompt(1, LENGTH)
    twin = copy.deepcopy(model)
    for layer in twin.model.layers:
        change(layer.mlp.down_proj.weight)
    with thresholds(twin, backend="masked"):
        expected = generate(twin, ids)
    with thresholds(model):
        generate(model, ids)
        for layer in model.model.layers:
            change(layer.mlp.down_proj.weight)
        same(generate(model, ids), expected, CLOSE)
    for a, b in zip(matrices(model), matrices(twin), strict=True):
        assert torch.equal(a, b) and a.is_contiguous()
