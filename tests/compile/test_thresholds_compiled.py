"""The method thresholds on models of which something was compiled, before or inside the session: as on their uncompiled twins."""

import copy

import pytest
import torch
from test_compiled import generate as static
from test_precompiled import compile_parts, every_layer, forward_compiled
from test_precompiled import small as one_layer_of_experts
from test_thresholds_changes import FIRST, masked, same, thresholds

from helpers.modes import fresh, generate
from helpers.observe import prompt, same_afterwards
from helpers.tiny_models import tiny
from helpers.tiny_vlms import image_inputs, tiny_vlm
from pop_mm import SessionError

# how a session runs compiled parts eagerly is no method's matter: all parts are in test_precompiled.py, here those of attention
COMPILED = [("llama", "attention.compile()"), ("llama", "compile(layer)"), ("mixtral", "compile(experts)")]


@pytest.fixture
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore:.*compiled before the session")
@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize(("family", "what"), COMPILED)
def test_a_compiled_model_is_pruned_as_its_uncompiled_twin(family, what):
    twin, model = one_layer_of_experts(family), one_layer_of_experts(family)
    expected, dense = masked(twin), generate(twin, prompt(), 2)
    compile_parts(model, what)
    for backend in ("masked", "auto"):
        with same_afterwards(model), thresholds(model, backend):
            same(generate(model, prompt()), expected)
    same(generate(model, prompt(), 2), dense)


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("traced_before", [False, True])
def test_a_compiled_wrapper_is_pruned_as_the_model_in_it(traced_before):
    model = fresh()
    compiled = torch.compile(model, backend="eager")
    if traced_before:
        with torch.no_grad():
            compiled(prompt())
    expected = masked(model)
    for backend in ("masked", "auto"):
        with same_afterwards(model), thresholds(compiled, backend), torch.no_grad():
            same(generate(compiled, prompt()), expected)
            out = compiled(prompt(), use_cache=True)
            step = compiled(expected[0][:, :1], past_key_values=out.past_key_values)
            torch.testing.assert_close(step.logits[:, -1], expected[1][1], rtol=0, atol=1e-6)


@pytest.mark.filterwarnings("ignore:.*compiled before the session")
@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("do", [lambda layer: layer.mlp.compile(backend="eager"), lambda m: m.self_attn.compile()])
def test_what_is_compiled_inside_a_session_runs_eagerly_from_then_on(do):
    model = fresh()
    expected = masked(model)
    with thresholds(model):
        generate(model, FIRST)
        every_layer(do)(model)
        same(generate(model, prompt()), expected)


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("compile_it", [lambda model: model.compile(backend="eager"), forward_compiled])
def test_a_model_that_is_compiled_as_a_whole_inside_a_session_is_refused(compile_it):
    model = fresh()
    with thresholds(model):
        generate(model, prompt(), 2)
        compile_it(model)
        for _ in range(2):
            with pytest.raises(SessionError, match=r"compiled inside the session.*before a new one"):
                generate(model, prompt(), 2)


def of_vlm(model, inputs):
    inputs = {key: value.double() if value.is_floating_point() else value for key, value in inputs.items()}
    out = model.generate(**inputs, max_new_tokens=3, do_sample=False, return_dict_in_generate=True, output_logits=True)
    return out.sequences, torch.stack(out.logits)


VLM_COMPILERS = {
    "language model": lambda model: model.model.language_model.compile(backend="eager"),
    "layers": lambda model: [layer.compile(backend="eager") for layer in model.model.language_model.layers],
}


@pytest.mark.filterwarnings("ignore:.*compiled before the session")
@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize(
    ("model_type", "what"), [("llava", what) for what in VLM_COMPILERS] + [("qwen2_vl", "language model")]
)
def test_compiled_vision_language_models(model_type, what):
    twin, model = tiny_vlm(model_type, torch.float64), copy.deepcopy(tiny_vlm(model_type, torch.float64))
    inputs = image_inputs(model_type, model, images=[1])
    expected = masked(twin, inputs, of_vlm)
    VLM_COMPILERS[what](model)
    of_vlm(model, inputs)
    for backend in ("masked", "auto"):
        with same_afterwards(model), thresholds(model, backend):
            same(of_vlm(model, inputs), expected)


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("backend", ["masked", "auto"])
def test_compiled_decode_steps_of_generate(backend):
    model = tiny("llama", torch.float32)
    expected = masked(model, run=lambda m, ids: static(m, ids, False))
    with thresholds(model, backend):
        found = static(model, prompt(), True)
    same(found, expected, 1e-4)
