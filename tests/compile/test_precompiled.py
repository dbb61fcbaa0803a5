"""Models of which something was compiled, before or inside the session: pruned as their uncompiled twins, and left compiled."""

import warnings
from unittest import mock

import pytest
import torch
from test_compiled import generate as generate_static

from helpers.covering import covering
from helpers.modes import BACKENDS, fresh, generate, padded, pruned
from helpers.observe import partitions, prompt, same_afterwards
from helpers.tiny_models import tiny
from pop_mm import SessionError, prune

pytestmark = pytest.mark.filterwarnings("ignore:.*compiled before the session")


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def every_layer(do):
    def compile_parts(model):
        for layer in model.model.layers:
            do(layer)

    return compile_parts


def compiled(module):
    return torch.compile(module, backend="eager")


def forward_compiled(module):
    module.forward = compiled(module.forward)


def children_wrapped(name):
    return lambda layer: setattr(layer, name, compiled(getattr(layer, name)))


def layers_wrapped(model):
    layers = model.model.layers
    for index, layer in enumerate(layers):
        layers[index] = compiled(layer)


def in_mlp(do):
    return every_layer(lambda layer: do(layer.mlp))


COMPILERS = {
    "model.compile()": lambda model: model.compile(backend="eager"),
    "mlp.compile()": in_mlp(lambda mlp: mlp.compile(backend="eager")),
    "model.forward": forward_compiled,
    "compile(layer)": layers_wrapped,
    "attention.compile()": every_layer(lambda layer: layer.self_attn.compile(backend="eager")),
}
DENSE = {
    "compile(mlp)": every_layer(children_wrapped("mlp")),
    "compile(down)": in_mlp(children_wrapped("down_proj")),
}
MOE = {
    "experts.forward": in_mlp(lambda mlp: forward_compiled(mlp.experts)),
    "compile(experts)": in_mlp(children_wrapped("experts")),
}
CASES = [
    *(("llama", what) for what in (*COMPILERS, *DENSE)),
    *(("mixtral", what) for what in (*COMPILERS, *MOE)),
]
cases = pytest.mark.parametrize(("family", "what"), CASES)


def compile_parts(model, what):
    {**COMPILERS, **DENSE, **MOE}[what](model)
    generate(model, prompt(), 2)  # what the session must not go on with


def small(family):
    """A mixture has one layer: to trace all its experts takes seconds for each."""
    return fresh(family, num_hidden_layers=1 if family == "mixtral" else 2)


@cases
def test_a_compiled_model_is_pruned_as_its_uncompiled_twin(family, what):
    twin, model = small(family), small(family)
    with pruned(twin) as other:
        expected = generate(twin, prompt(), 3)
    dense = generate(twin, prompt(), 2)[1]
    compile_parts(model, what)
    for backend in BACKENDS:
        with same_afterwards(model), pruned(model, backend) as session:
            found = generate(model, prompt(), 3)
            assert partitions(session) == partitions(other)
        assert torch.equal(found[0], expected[0])
        torch.testing.assert_close(found[1], expected[1], rtol=0, atol=1e-9)
    torch.testing.assert_close(generate(model, prompt(), 2)[1], dense, rtol=0, atol=1e-9)  # and dense it is again


@pytest.mark.parametrize("what", ["model.forward", "mlp.compile()"])
def test_rows_that_choose_alone_do_so_in_a_compiled_model(what):
    twin, model = fresh(), fresh()
    with pruned(twin, batch="per_sequence"):
        expected = padded(twin)[1]
    compile_parts(model, what)
    with pruned(model, batch="per_sequence"):
        torch.testing.assert_close(padded(model)[1], expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("kernels", ["stock", "compiled"])
@pytest.mark.parametrize("what", ["model.forward", "attention.compile()"])
def test_compiled_kernels_serve_a_compiled_model(what, kernels):
    twin, model = tiny("llama", torch.float32), tiny("llama", torch.float32)
    with pruned(twin, "inplace", kernels=kernels):
        expected = generate(twin, prompt())
    compile_parts(model, what)
    with same_afterwards(model), pruned(model, "inplace", kernels=kernels):
        found = generate(model, prompt())
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1], rtol=0, atol=1e-4)


def test_compiled_steps_of_generate_go_on_working_in_a_compiled_model():
    twin, model = tiny("llama", torch.float32), tiny("llama", torch.float32)
    with pruned(twin, "inplace"):
        expected = generate_static(twin, prompt(), False)
    forward_compiled(model)
    model.model.layers[0].compile(backend="eager")
    generate(model, prompt())
    with pruned(model, "inplace"):
        found = generate_static(model, prompt(), True)
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1], rtol=0, atol=1e-4)


def test_one_warning_says_what_runs_eagerly():
    model = fresh()
    compile_parts(model, "mlp.compile()")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        session = pruned(model)
        assert not caught
        with session:
            generate(model, prompt())
    [message] = [str(w.message) for w in caught if "compiled before" in str(w.message)]
    assert "model.layers.0.mlp and 1 more" in message
    assert "eagerly" in message


def test_what_is_compiled_beside_the_ffns_stays_compiled():
    model = fresh()
    compile_parts(model, "attention.compile()")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pruned(model):
            assert model.model.layers[0].self_attn._compiled_call_impl is not None
            generate(model, prompt())


@pytest.mark.parametrize(
    ("backend", "batch", "kernels"),
    [("masked", "shared", "stock"), ("auto", "shared", "auto"), ("auto", "per_sequence", "stock")],
)
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_what_is_compiled_inside_a_session_runs_eagerly_from_then_on(family, backend, batch, kernels):
    twin, model = fresh(family), fresh(family)
    settings = {"batch": batch, "kernels": kernels}
    with pruned(twin, backend, **settings):
        expected = [generate(twin, prompt(seed=seed), 3)[1] for seed in range(3)]
    other = fresh(family)  # what was traced for another session is of no use here
    with pruned(other, backend, **settings):
        every_layer(lambda layer: layer.mlp.compile(backend="eager"))(other)
        generate(other, prompt(), 3)
    with pruned(model, backend, **settings):
        found = [generate(model, prompt(), 3)[1]]
        every_layer(lambda layer: layer.mlp.compile(backend="eager"))(model)
        found.append(generate(model, prompt(seed=1), 3)[1])
        for layer in model.model.layers:
            layer.compile(backend="eager")
            forward_compiled(layer.self_attn)
        found.append(generate(model, prompt(seed=2), 3)[1])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
    assert all(layer._compiled_call_impl is not None for layer in model.model.layers)


@pytest.mark.parametrize("compile_it", [lambda model: model.compile(backend="eager"), forward_compiled])
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_a_model_that_is_compiled_as_a_whole_inside_a_session_is_refused(family, compile_it):
    model = fresh(family)
    with pruned(model):
        generate(model, prompt(), 2)
        compile_it(model)
        for _ in range(2):
            with pytest.raises(SessionError, match=r"compiled inside the session.*before a new one"):
                generate(model, prompt(), 2)


@torch.no_grad()
def by_hand(call):
    """Logits of a prompt and a step."""
    out = call(prompt(), None)
    return torch.cat([out.logits[:, -1], call(prompt()[:, :1], out.past_key_values).logits[:, -1]])


def around(model, what):
    """Something compiled that the session is not told of."""
    wrapper = compiled(model) if what == "wrapper" else model

    def call(ids, cache):
        return wrapper(ids, past_key_values=cache, use_cache=True)

    return compiled(call) if what == "function" else call


METHODS = [{"ratio": 0.4, "scope": "ffn"}, {"budget": 0.6}]


@pytest.mark.parametrize(
    ("family", "backend", "settings", "what", "when"),
    [
        *covering(["llama"], ["masked", "auto"], METHODS, ["wrapper", "function"], ["before", "inside"]),
        ("mixtral", "auto", METHODS[0], "wrapper", "before"),
        ("mixtral", "auto", METHODS[1], "function", "inside"),
    ],
)
def test_compiled_calls_of_the_model_run_eagerly_inside_a_session(family, backend, settings, what, when):
    model = small(family)
    plain = around(model, "model")
    dense = by_hand(plain)
    with prune(model, backend=backend, **settings):
        expected = by_hand(plain)
    call = around(model, what)
    if when == "before":
        by_hand(call)
    with same_afterwards(model), prune(model, backend=backend, **settings):
        call = call if when == "before" else around(model, what)
        assert torch.equal(by_hand(call), expected)
    torch.testing.assert_close(by_hand(call), dense, rtol=0, atol=1e-9)


def test_sessions_that_overlap_share_what_runs_eagerly():
    models = [fresh(), fresh()]
    calls = [around(model, "wrapper") for model in models]
    expected = []
    for call, model in zip(calls, models, strict=True):
        by_hand(call)
        with pruned(model):
            expected.append(by_hand(around(model, "model")))
    first, second = (pruned(model).attach() for model in models)
    first.detach()
    assert torch.equal(by_hand(calls[1]), expected[1])
    second.detach()
    assert not torch.allclose(by_hand(calls[1]), expected[1])


def test_a_compiler_that_is_loaded_inside_a_session_is_refused():
    model = fresh()
    with mock.patch("pop_mm.session.eager.EagerCalls.hold"), pruned(model):
        expected = generate(model, prompt(), 2)[1]
        with pytest.raises(SessionError, match=r"was compiled inside the session.*Call the model itself"):
            by_hand(around(model, "wrapper"))
        torch.testing.assert_close(generate(model, prompt(), 2)[1], expected, rtol=0, atol=1e-9)
