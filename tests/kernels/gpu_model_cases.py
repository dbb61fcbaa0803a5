"""What test_gpu_kernels.py runs in a process of its own: whole models on the Triton kernels against the masked backend.

On a GPU if there is one; else with TRITON_INTERPRET=1 on the CPU, where a step of a tiny FFN takes a third of a second.
"""

import copy

import pytest
import torch
from gpu_kernel_cases import DEVICE

from helpers.modes import generate, left_padded, pruned
from helpers.observe import prompt, same_afterwards
from helpers.tiny_models import tiny
from pop_mm.executors.gathered import GatheredExecutor
from pop_mm.kernels.gpu import FusedStep, GatheredStep


def model_of(model_type="llama", dtype=torch.float64, **settings):
    """A tiny model; a llama has one layer, since the interpreter takes its time."""
    layers = {"num_hidden_layers": 1} if model_type == "llama" else {}
    return tiny(model_type, dtype, **{**layers, **settings}).to(DEVICE)


def strides(model):
    return [p.stride() for p in model.parameters()]


def log(session):
    return [(ffn.active_per_step, ffn.stability) for ffn in session.report.ffns]


@pytest.fixture
def calls(monkeypatch):
    """Rows of each step that the kernels computed."""
    found = []
    for kind in (FusedStep, GatheredStep):

        def call(self, x, *args, original=kind.__call__):
            found.append((type(self), len(x)))
            return original(self, x, *args)

        monkeypatch.setattr(kind, "__call__", call)
    return found


def compare(model, ids, steps=3, **settings):
    """A generation by the kernels must be that of the masked backend; the session that ran it."""
    generation = settings.pop("generation", {})
    with pruned(model, "masked", **settings) as reference:
        tokens, logits = generate(model, ids, steps, **generation)
    before = strides(model)
    with same_afterwards(model), pruned(model, "auto", kernels="triton", **settings) as session:
        found, found_logits = generate(model, ids, steps, **generation)
        report = session.report.to_dict()
    assert strides(model) == before
    assert torch.equal(found, tokens)
    close = 1e-9 if logits.dtype == torch.float64 and model.dtype == torch.float64 else 1e-4
    torch.testing.assert_close(found_logits, logits, rtol=0, atol=close * float(logits.abs().max()))
    assert log(session) == log(reference)
    assert report["kernels"] == "triton"
    return session


@pytest.mark.parametrize(
    ("model_type", "dtype"), [("llama", torch.float64), ("llama", torch.float32), ("phi3", torch.float64)]
)
def test_each_row_has_its_own_channels(model_type, dtype, calls):
    model = model_of(model_type, dtype)
    layers = model.config.num_hidden_layers
    ids, mask = (t.to(DEVICE) for t in left_padded(prompt(2)))
    session = compare(model, ids, batch="per_sequence", generation={"attention_mask": mask})
    assert calls == [(GatheredStep, 2)] * 2 * layers
    assert session.report.backends == {"gathered": layers} and not session.report.notes
    assert {plan.reason for plan in session.plans} == {"plain weights, of which each row reads its own channels"}


@pytest.mark.parametrize(("model_type", "rows"), [("llama", 1), ("llama", 3), ("gpt2", 2)])
def test_one_partition_for_all_rows(model_type, rows, calls):
    model = model_of(model_type)
    session = compare(model, prompt(rows).to(DEVICE), batch="shared")
    assert calls == [(FusedStep, rows)] * 2 * model.config.num_hidden_layers
    assert set(session.report.backends) == {"inplace"}


def test_beams_take_their_channels_along(calls):
    session = compare(model_of("llama"), prompt(1).to(DEVICE), batch="per_sequence", generation={"num_beams": 2})
    assert calls == [(GatheredStep, 2)] * 2 and session.report.timings.masked_forwards == 0


def test_without_candidates_in_a_model(calls):
    compare(model_of("llama"), prompt(2).to(DEVICE), 2, batch="per_sequence", method="static")
    compare(model_of("llama"), prompt(2).to(DEVICE), 2, batch="shared", method="static")
    assert calls == [(GatheredStep, 2), (FusedStep, 2)]


def test_steps_that_the_kernels_do_not_take(calls):
    model = model_of("llama")
    session = compare(model, prompt(9).to(DEVICE), batch="per_sequence")
    assert not calls and "at most 8 rows" in session.report.notes[0]
    ids = prompt(2, 12).to(DEVICE)
    with torch.no_grad():
        with pruned(model, "masked", batch="per_sequence") as session, session.split(6):
            expected = model(ids).logits
        with pruned(model, "auto", batch="per_sequence", kernels="triton") as session, session.split(6):
            torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=1e-12)
    with pruned(model, "auto", batch="per_sequence", kernels="triton"):
        cache = model(ids, use_cache=True).past_key_values
        assert model(ids[:, :1], past_key_values=cache).logits.requires_grad
    assert not calls


@torch.no_grad()
def test_two_caches_in_turn(calls):
    model = model_of("llama")
    found = {}
    for backend, kernels in (("masked", "stock"), ("auto", "triton")):
        with pruned(model, backend, batch="per_sequence", kernels=kernels):
            caches = [model(prompt(1, seed=seed).to(DEVICE), use_cache=True).past_key_values for seed in (1, 2)]
            token = torch.tensor([[5]], device=DEVICE)
            found[backend] = [model(token, past_key_values=caches[i]).logits for i in (0, 1, 0)]
    for one, other in zip(*found.values(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-9)
    assert len(calls) == 3


@torch.no_grad()
def test_weights_inside_a_session(calls, tmp_path):
    model, other = model_of("llama"), model_of("llama", seed=1)
    own, new = copy.deepcopy(model.state_dict()), copy.deepcopy(other.state_dict())  # held by no other model
    ids = prompt(1).to(DEVICE)
    with pruned(other, "masked", batch="per_sequence"):
        expected = generate(other, ids, 2)[1]
    before = strides(model)
    with pruned(model, "auto", batch="per_sequence", kernels="triton"):
        assert model.model.layers[0].mlp.down_proj.weight.stride() == (1, 32)
        assert all(torch.equal(value, own[name]) for name, value in model.state_dict().items())
        model.save_pretrained(tmp_path)
        for assign in (False, True):
            model.load_state_dict(new, assign=assign)
            torch.testing.assert_close(generate(model, ids, 2)[1], expected, rtol=0, atol=1e-9)
    assert strides(model) == before
    assert all(torch.equal(value, new[name]) for name, value in model.state_dict().items())
    saved = type(model).from_pretrained(tmp_path, dtype=torch.float64)
    assert all(torch.equal(value.to(DEVICE), own[name]) for name, value in saved.state_dict().items())
    assert len(calls) == 2


@torch.no_grad()
def test_hooks_of_the_user_see_whole_activations(calls):
    model, seen = model_of("llama", num_hidden_layers=2), []
    with pruned(model, "auto", batch="per_sequence", kernels="triton"):
        handle = model.model.layers[0].mlp.down_proj.register_forward_pre_hook(lambda _, a: seen.append(a[0].shape))
        generate(model, prompt(1).to(DEVICE), 2)
        handle.remove()
    assert seen == [(1, 9, 64), (1, 1, 64)]
    assert calls == [(GatheredStep, 1)]  # the other layer


@pytest.mark.parametrize(("model_type", "gathered"), [("mixtral", 0), ("qwen2_moe", 3)])
def test_experts_are_masked(model_type, gathered, calls):
    session = compare(model_of(model_type), prompt(2).to(DEVICE), 2, batch="per_sequence")
    backends = session.report.backends
    assert backends.get("gathered", 0) == gathered
    assert backends["masked"] == 2
    assert len(calls) == gathered
    assert "batch='per_sequence' needs a mask for each row; no speed-up" in {p.reason for p in session.plans}


def test_activations_that_the_kernels_do_not_know(calls):
    session = compare(model_of("llama", hidden_act="quick_gelu"), prompt(1).to(DEVICE), 2, batch="per_sequence")
    assert session.report.backends == {"masked": 1}
    assert (
        "mlp computes something that the kernels do not, so batch='per_sequence' needs a mask"
        in session.plans[0].reason
    )
    session = compare(model_of("llama", hidden_act="quick_gelu"), prompt(1).to(DEVICE), 2, batch="shared")
    assert session.report.backends == {"inplace": 1} and not calls


def test_a_failed_attach_leaves_nothing(monkeypatch):
    model = model_of("llama", num_hidden_layers=2)
    original = GatheredExecutor.attach

    def attach(self, index):
        original(self, index)
        if index:
            raise MemoryError

    monkeypatch.setattr(GatheredExecutor, "attach", attach)
    before = strides(model)
    with same_afterwards(model), pytest.raises(MemoryError):
        pruned(model, "auto", batch="per_sequence", kernels="triton").attach()
    assert strides(model) == before
