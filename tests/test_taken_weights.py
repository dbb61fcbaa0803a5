"""Weights that somebody reads or writes inside a session past the modules: by ``parameters()``, as vectors, through NumPy."""

import pytest
import torch
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from helpers.covering import covers
from helpers.modes import backends, fresh, generate, pruned
from helpers.observe import prompt, same_afterwards
from pop_mm import SessionError, prune

FAMILIES = ("llama", "mixtral", "qwen2_moe")
families = pytest.mark.parametrize("family", FAMILIES)
FIRST, LATER = prompt(1, 12, seed=5), prompt(1, 10, seed=6)
SESSIONS = {
    "inplace": lambda model: pruned(model, "auto"),
    "masked": lambda model: pruned(model, "masked"),
    "rows": lambda model: prune(model, budget=0.6),
    "thresholds masked": lambda model: prune(model, budget=0.6, backend="masked"),
}
sessions = pytest.mark.parametrize("session_of", SESSIONS.values(), ids=SESSIONS.keys())


def weights_of(model):
    """Parameters of the last layer's FFN, with the axis of each along which channels lie."""
    mlp = model.model.layers[-1].mlp
    if hasattr(mlp, "experts"):
        return [(mlp.experts.gate_up_proj, 1), (mlp.experts.down_proj, 2)]
    return [(mlp.gate_proj.weight, 0), (mlp.up_proj.weight, 0), (mlp.down_proj.weight, 1)]


def same_weights(model, other):
    for (name, a), (_, b) in zip(model.state_dict().items(), other.state_dict().items(), strict=True):
        assert torch.equal(a, b), name


# --- read -----------------------------------------------------------------------------------------------------------


@sessions
@families
def test_parameters_are_given_in_the_original_order(family, session_of):
    model, plain = fresh(family), fresh(family)
    expected = parameters_to_vector(plain.parameters())
    with same_afterwards(model), session_of(model):
        first = generate(model, FIRST)
        assert torch.equal(parameters_to_vector(model.parameters()), expected)
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, plain.get_parameter(name)), name
        for path in ("model", "model.layers.1", "model.layers.1.mlp"):
            generate(model, LATER, 2)
            modules = (one.get_submodule(path) for one in (model, plain))
            for a, b in zip(*(module.parameters() for module in modules), strict=True):
                assert torch.equal(a, b)
        again = generate(model, FIRST)
    assert torch.equal(first[0], again[0])
    torch.testing.assert_close(first[1], again[1], rtol=0, atol=1e-9)


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_parameters_of_wrappers_are_given_in_the_original_order(family):
    peft = pytest.importorskip("peft")
    model, plain = fresh(family), fresh(family)
    wrapper = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"])).eval()
    with pruned(wrapper, "inplace"):
        generate(wrapper, FIRST)
        found = {name.replace(".base_layer", ""): p for name, p in wrapper.named_parameters() if "lora" not in name}
        for (name, a), (other, b) in zip(found.items(), plain.named_parameters(), strict=True):
            assert name.endswith(other)
            assert torch.equal(a, b), name


def test_a_look_at_the_device_moves_nothing():
    model = fresh()
    with pruned(model, "inplace") as session, torch.no_grad():
        cache = model(prompt(), use_cache=True).past_key_values
        model(prompt()[:, :1], past_key_values=cache)
        moved = session.report.moved_channels
        assert moved
        assert model.device.type == "cpu" and model.dtype is torch.float64
        next(model.parameters())
        model(prompt()[:, :1], past_key_values=cache)
        assert session.report.moved_channels == moved


# --- vectors --------------------------------------------------------------------------------------------------------


@sessions
@families
@pytest.mark.parametrize("when", ["inside", "afterwards"])
def test_a_vector_that_was_read_inside_is_written_back_right(family, session_of, when):
    model, twin = fresh(family), fresh(family)
    vector_to_parameters(1.1 * parameters_to_vector(twin.parameters()), twin.parameters())
    with session_of(twin):
        expected = generate(twin, prompt())
    with session_of(model):
        generate(model, FIRST)
        vector = 1.1 * parameters_to_vector(model.parameters())
        generate(model, LATER)
        if when == "inside":
            vector_to_parameters(vector, model.parameters())
            found = generate(model, prompt())
    if when == "afterwards":
        vector_to_parameters(vector, model.parameters())
        with session_of(model):
            found = generate(model, prompt())
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1], rtol=0, atol=1e-9)
    same_weights(model, twin)


@families
def test_weights_read_directly_and_written_back_after_channels_moved_again_are_refused(family):
    model = fresh(family)
    session = pruned(model, "inplace").attach()
    generate(model, FIRST)
    taken = [weight.detach().clone() for weight, _ in weights_of(model)]
    generate(model, LATER)
    for (weight, _), data in zip(weights_of(model), taken, strict=True):
        weight.data = data
    for _ in range(2):
        with pytest.raises(SessionError, match=r"another weight was made of it.*Load the model again"):
            generate(model, prompt())
    with pytest.warns(UserWarning, match="another weight was made of it"):
        session.detach()


# --- permuted -------------------------------------------------------------------------------------------------------


def reversed_(tensor, axis):
    tensor.copy_(tensor.flip(axis))


def rolled(tensor, axis):
    tensor.copy_(tensor.roll(3, axis))


WRITERS = {
    "data": lambda weight: weight.data,
    "numpy": lambda weight: torch.from_numpy(weight.detach().numpy()),
}


WHICH = {"input": slice(0, 1), "down": slice(-1, None)}


@covers(family=FAMILIES, session=SESSIONS, writer=WRITERS, which=WHICH, permute=(reversed_, rolled))
def test_channels_that_are_permuted_while_none_are_moved_are_followed(family, session, writer, which, permute):
    check_permuting(family, SESSIONS[session], WRITERS[writer], WHICH[which], permute)


@covers(session=SESSIONS, writer=WRITERS, permute=(reversed_, rolled))
def test_channels_of_all_weights_that_are_permuted_while_none_are_moved_are_followed(session, writer, permute):
    """Not of experts: their gate and up are one tensor, whose halves would be mixed."""
    check_permuting("llama", SESSIONS[session], WRITERS[writer], slice(None), permute)


def check_permuting(family, session_of, writer, which, permute):
    model, twin = fresh(family), fresh(family)

    def write(model):
        for weight, axis in weights_of(model)[which]:
            permute(writer(weight), axis)

    write(twin)
    with session_of(twin):
        expected = generate(twin, prompt())
    with session_of(model) as session:
        if "inplace" not in {plan.backend for plan in session.plans}:
            generate(model, FIRST)
        write(model)
        found = generate(model, prompt())
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1], rtol=0, atol=1e-9)
    same_weights(model, twin)


@pytest.mark.parametrize("permute", [reversed_, rolled])
@pytest.mark.parametrize("which", ["input", "down"])
@pytest.mark.parametrize("then", ["another prompt", "state_dict", "the end"])
@families
def test_permuting_moved_channels_is_refused(family, which, then, permute):
    model = fresh(family)
    session = pruned(model, "inplace").attach()
    generate(model, FIRST)
    weight, axis = weights_of(model)[0 if which == "input" else -1]
    permute(weight.data, axis)
    if then == "state_dict":
        model.state_dict()
    if then != "the end":
        for _ in range(2):
            with pytest.raises(SessionError, match=r"was written to inside the session.*Leave the session"):
                generate(model, prompt())
    with pytest.warns(UserWarning, match="written to inside the session"):
        session.detach()


@pytest.mark.parametrize("axis", [0, 1])
@backends
def test_a_write_to_one_row_or_column_is_seen(axis, backend):
    model, twin = fresh(), fresh()
    for name in ("gate_proj", "up_proj", "down_proj"):
        for one in (model, twin):
            one.written = getattr(one.model.layers[0].mlp, name).weight.data.select(axis, 7)
        twin.written.mul_(4)
        with pruned(twin):
            expected = generate(twin, prompt())
        with pruned(model, backend):
            if backend == "masked":
                generate(model, FIRST)
            model.written.mul_(4)
            torch.testing.assert_close(generate(model, prompt())[1], expected[1], rtol=0, atol=1e-9)
