"""Weights that others use too: other models, other layers, other processes, files. They stay as they are for all of them."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from helpers.modes import backends, fresh, generate, pruned
from helpers.observe import partitions, prompt, same_afterwards
from helpers.reference import down_projections
from pop_mm import ConfigError, prune

AUTO = {"ratio": 0.4, "scope": "ffn", "kernels": "stock"}
FAMILIES = ("llama", "mixtral")
families = pytest.mark.parametrize("family", FAMILIES)


def expected_of(model, ids=None):
    with pruned(model):
        return generate(model, prompt() if ids is None else ids)[1]


def near(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


def plans(session):
    return [(plan.backend, plan.reason) for plan in session.plans]


def downs(model):
    if model.config.model_type == "mixtral":
        return [(layer.mlp.experts, "down_proj") for layer in model.model.layers]
    return [(down, "weight") for down in down_projections(model)]


def same_parameters(a, b):
    for one, other in zip(a.modules(), b.modules(), strict=True):
        other._parameters.update(one._parameters)


def same_memory(a, b):
    b.load_state_dict(a.state_dict(), assign=True)


def same_downs(a, b):
    for (one, name), (other, _) in zip(downs(a), downs(b), strict=True):
        setattr(other, name, getattr(one, name))


def views_of_downs(a, b):
    for (one, name), (other, _) in zip(downs(a), downs(b), strict=True):
        weight = getattr(one, name).detach()
        setattr(other, name, nn.Parameter(weight.view_as(weight)))


@families
@pytest.mark.parametrize("share", [same_parameters, same_memory, same_downs, views_of_downs])
def test_a_model_that_shares_with_a_pruned_one_stays_what_it_is(family, share):
    a, b = fresh(family), fresh(family, seed=7)
    share(a, b)
    expected, dense = expected_of(copy.deepcopy(a)), generate(b, prompt())[1]
    with same_afterwards(a), same_afterwards(b), prune(a, **AUTO) as session:
        near(generate(a, prompt())[1], expected)
        assert torch.equal(generate(b, prompt())[1], dense)
        for backend, reason in plans(session):
            assert backend == "masked"
            assert "of another model" in reason
            assert "so its channels cannot be reordered" in reason


@families
def test_sessions_on_two_models_that_share(family):
    a, b = fresh(family), fresh(family)
    same_memory(a, b)
    expected = expected_of(fresh(family))
    with same_afterwards(a), same_afterwards(b), prune(a, **AUTO), prune(b, **AUTO):
        generate(a, prompt(1, 12, seed=5))
        near(generate(b, prompt())[1], expected)
        near(generate(a, prompt())[1], expected)


@families
def test_in_place_is_refused_for_weights_of_two_models(family):
    a, b = fresh(family), fresh(family)
    same_downs(a, b)
    with same_afterwards(a), same_afterwards(b):
        with pytest.raises(ConfigError, match=r"backend='inplace' cannot serve 2 of 2 FFNs.*of another model"):
            pruned(a, "inplace").attach()
        with pruned(a):
            generate(a, prompt())


def test_a_model_that_is_gone_shares_nothing():
    a, b = fresh(), fresh()
    same_downs(a, b)
    b.itself = [b]  # goes when the collector finds it
    del b
    with pruned(a, "inplace"):
        generate(a, prompt())


@families
def test_holding_a_models_weights_is_no_sharing(family):
    a = fresh(family)
    held = [*a.parameters(), *(p.detach() for p in a.parameters())]
    with pruned(a, "inplace"):
        generate(a, prompt())
    assert held


# --- layers ---------------------------------------------------------------------------------------------------------


def shared_by_layers(family, what):
    """A model of 4 layers, of which the third uses modules of the first, and the same with copies."""
    model = fresh(family, num_hidden_layers=4)
    path, _, name = f"mlp.{what}".rpartition(".") if what else ("", "", "mlp")
    first, third = (model.model.layers[i].get_submodule(path) for i in (0, 2))
    setattr(third, name, getattr(first, name))
    twin = copy.deepcopy(model)
    twin_third = twin.model.layers[2].get_submodule(path)
    setattr(twin_third, name, copy.deepcopy(getattr(twin_third, name)))
    return model, twin


@pytest.mark.parametrize("batch", ["shared", "per_sequence"])
@pytest.mark.parametrize("backend", ["masked", "auto"])
@pytest.mark.parametrize(
    ("family", "what"),
    [("llama", ""), ("llama", "down_proj"), ("llama", "gate_proj"), ("mixtral", ""), ("mixtral", "experts")],
)
def test_layers_that_share_a_module_are_pruned_as_if_each_had_its_own(family, what, backend, batch):
    model, twin = shared_by_layers(family, what)
    with pruned(twin, batch=batch) as other:
        expected = generate(twin, prompt(2))[1]
    with same_afterwards(model), pruned(model, backend, batch=batch) as session:
        near(generate(model, prompt(2))[1], expected)
        assert partitions(session) == partitions(other)
    if batch == "shared" and backend == "auto":
        assert [plan.backend for plan in session.plans] == ["masked", "inplace"] * 2


# --- processes and files --------------------------------------------------------------------------------------------


def shared_memory(weight, path):
    return weight.share_memory_()


def mapped_for_reading(weight, path):
    np.save(path, weight.numpy())
    return torch.from_numpy(np.load(path, mmap_mode="r"))


def mapped_for_writing(weight, path):
    np.save(path, weight.numpy())
    return torch.from_numpy(np.load(path, mmap_mode="r+"))


def file_of_torch(weight, path):
    weight.numpy().tofile(path)
    return torch.from_file(str(path), shared=True, size=weight.numel(), dtype=weight.dtype).view(weight.shape)


@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")
@families
@pytest.mark.parametrize("place", [shared_memory, mapped_for_reading, mapped_for_writing, file_of_torch])
def test_memory_that_is_not_the_models_alone_is_not_written(family, place, tmp_path):
    model = fresh(family)
    expected = expected_of(model)
    for number, (module, name) in enumerate(downs(model)):
        weight = place(getattr(module, name).detach().clone(), tmp_path / f"{number}.npy")
        setattr(module, name, nn.Parameter(weight, requires_grad=False))
    with same_afterwards(model), prune(model, **AUTO) as session:
        near(generate(model, prompt())[1], expected)
        for backend, reason in plans(session):
            assert backend == "masked"
            assert "are in memory that is" in reason
    with pytest.raises(ConfigError, match="are in memory that is"):
        pruned(model, "inplace").attach()


def test_a_private_mapping_is_the_models_own(tmp_path):
    model = fresh()
    expected = expected_of(model)
    for number, (module, name) in enumerate(downs(model)):
        np.save(tmp_path / f"{number}.npy", getattr(module, name).detach().numpy())
        weight = torch.from_numpy(np.load(tmp_path / f"{number}.npy", mmap_mode="c"))
        setattr(module, name, nn.Parameter(weight, requires_grad=False))
    with same_afterwards(model), pruned(model, "inplace"):
        near(generate(model, prompt())[1], expected)


@backends
def test_weights_may_move_to_shared_memory_inside_a_session(backend):
    model, twin = fresh(), fresh()
    expected = expected_of(twin)
    with pruned(model, "auto" if backend == "inplace" else backend) as session:
        generate(model, prompt(1, 12, seed=5))
        model.share_memory()
        near(generate(model, prompt())[1], expected)
        assert {plan.backend for plan in session.plans} == {"masked"}
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))
