"""Weights inside a session: saving, loading and moving them, which backend serves which FFN, and the settings."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import pop_mm
from helpers.modes import BACKENDS, LAYOUTS, LENGTH, STEPS, alone, backends, fresh, generate, pruned
from helpers.observe import Active, Wrapped, partitions, prompt, same_afterwards
from helpers.tiny_models import tiny
from pop_mm import ConfigError, Pop, PopConfig, prune, register_scorer
from pop_mm.adapters import LlamaAdapter
from pop_mm.methods.scoring import Scorer

# --- weights inside a session ---------------------------------------------------------------------------------------


@backends
@pytest.mark.parametrize("model_type", LAYOUTS)
def test_saving_in_a_session_gives_the_original_order_and_decoding_goes_on(model_type, backend, tmp_path):
    model = fresh(model_type)
    model.save_pretrained(tmp_path)  # this alone changes the config
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ids = prompt(1, LENGTH)
    expected = alone(model, ids)
    with same_afterwards(model), pruned(model, backend), torch.no_grad():
        out = model(ids, use_cache=True)
        tokens = [out.logits[:, -1].argmax(-1, keepdim=True)]
        for step in range(STEPS - 1):
            logits = model(tokens[-1], past_key_values=out.past_key_values).logits
            tokens.append(logits[:, -1].argmax(-1, keepdim=True))
            if step == 0:
                state = model.state_dict()
                assert all(torch.equal(state[name], before[name]) for name in before)
            if step == 1:
                model.save_pretrained(tmp_path)
        assert torch.equal(torch.cat(tokens, 1), expected)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64).state_dict()
    assert all(torch.equal(saved[name], before[name]) for name in before)


@backends
def test_a_submodules_state_dict_is_in_the_original_order_too(model, backend):
    mlp = model.model.layers[0].mlp
    before = {name: tensor.clone() for name, tensor in mlp.state_dict().items()}
    with pruned(model, backend):
        model.generate(prompt(), max_new_tokens=3)
        assert all(torch.equal(tensor, before[name]) for name, tensor in mlp.state_dict().items())
        assert torch.equal(model.model.layers[0].mlp.down_proj.state_dict()["weight"], before["down_proj.weight"])


@backends
def test_weights_loaded_in_a_session_are_pruned_by_their_own_norms_and_stay(backend):
    model, other = fresh(), fresh(seed=5)
    expected = alone(other, prompt())
    with pruned(model, backend):
        model.generate(prompt(), max_new_tokens=3)
        model.load_state_dict(other.state_dict())
        assert torch.equal(generate(model, prompt())[0], expected)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name


@backends
@pytest.mark.parametrize("part", ["model.layers.0.mlp", "model.layers.1.mlp.down_proj"])
def test_weights_loaded_into_a_part_of_the_model_count_too(backend, part):
    model, other, expected = fresh(), fresh(seed=5), fresh()
    state = {name: 3 * tensor for name, tensor in other.get_submodule(part).state_dict().items()}
    expected.get_submodule(part).load_state_dict(state)
    tokens = alone(expected, prompt())
    with pruned(model, backend) as session:
        model.generate(prompt(), max_new_tokens=3)
        model.get_submodule(part).load_state_dict(state)
        assert torch.equal(generate(model, prompt())[0], tokens)
        found = partitions(session)
    with pruned(expected) as session:
        expected.generate(prompt(), max_new_tokens=2)
        assert partitions(session) == found


@backends
def test_a_model_may_change_its_dtype_in_a_session(backend):
    model = tiny("llama", torch.float32)
    double = tiny("llama", torch.float32).to(torch.float64)
    expected = alone(double, prompt())
    with pruned(model, backend):
        model.generate(prompt(), max_new_tokens=3)
        model.to(torch.float64)
        assert torch.equal(generate(model, prompt())[0], expected)
    assert all(torch.equal(t, double.state_dict()[name]) for name, t in model.state_dict().items())


# --- backends -------------------------------------------------------------------------------------------------------


def test_layers_that_share_an_ffn_run_masked_and_the_report_says_so():
    model = fresh()
    model.model.layers[1].mlp = model.model.layers[0].mlp
    with same_afterwards(model), prune(model, ratio=0.4, scope="ffn") as session, Active(model):
        found = generate(model, prompt())[0]
    assert {ffn.plan.backend for ffn in session.report.ffns} == {"masked"}
    assert "share" in session.report.ffns[0].plan.reason
    with pruned(model, "masked"):
        assert torch.equal(generate(model, prompt())[0], found)
    with pytest.raises(ConfigError, match="share"):
        pruned(model, "inplace")


def test_layers_whose_weights_are_tied_run_masked():
    model = fresh()
    model.model.layers[1].mlp.down_proj.weight = model.model.layers[0].mlp.down_proj.weight
    session = prune(model, ratio=0.4, scope="ffn")
    assert [plan.backend for plan in session.plans] == ["masked", "masked"]


@pytest.mark.parametrize("name", ["gate_proj", "up_proj", "down_proj"])
def test_a_wrapped_projection_runs_masked_beside_others_in_place(name):
    model, merged = fresh(), fresh()
    for m in (model, merged):
        setattr(m.model.layers[0].mlp, name, Wrapped(getattr(m.model.layers[0].mlp, name)))
    wrapped = getattr(merged.model.layers[0].mlp, name)
    plain = nn.Linear(wrapped.in_features, wrapped.out_features, bias=True, dtype=torch.float64)
    with torch.no_grad():
        plain.weight.copy_(wrapped.base.weight + wrapped.b @ wrapped.a)
        plain.bias.copy_(wrapped.base.bias)
    setattr(merged.model.layers[0].mlp, name, plain)
    with same_afterwards(model), prune(model, ratio=0.4, scope="ffn") as session:
        found = generate(model, prompt())
    assert [ffn.plan.backend for ffn in session.report.ffns] == ["masked", "inplace"]
    assert "Wrapped" in session.report.ffns[0].plan.reason
    with pruned(merged, "masked") as other:
        expected = generate(merged, prompt())
    assert partitions(session) == partitions(other)
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1], rtol=0, atol=1e-9)


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_offloaded_ffns_run_masked_and_right(place, tmp_path):
    from accelerate import dispatch_model

    expected = alone(fresh(), prompt())
    model = fresh()
    modules = {name: "cpu" for name, child in model.named_modules() if name and not list(child.children())}
    for name in modules:
        if "layers.0.mlp" in name:
            modules[name] = place
    settings = {"offload_dir": str(tmp_path)} if place == "disk" else {"main_device": "cpu", "force_hooks": True}
    model = dispatch_model(model, modules, **settings)
    with prune(model, ratio=0.4, scope="ffn") as session:
        found = generate(model, prompt())[0]
    assert torch.equal(found, expected)
    assert session.report.ffns[0].plan.backend == "masked"


# --- settings -------------------------------------------------------------------------------------------------------


@backends
def test_layer_ratios_leave_a_layer_dense(model, backend):
    with pruned(model, backend, layer_ratios={0: 0.0}) as session, Active(model) as seen:
        model.generate(prompt(), max_new_tokens=3)
    assert [ffn.plan.backend for ffn in session.report.ffns] == ["dense", backend]
    assert all(active.all() for active in seen.seen[0])
    assert [int(active.sum()) for active in seen.seen[1][1:]] == [39, 39]


class Rounded(Pop):
    """R and C together are a multiple of 16, as kernels of one's own may need."""

    name = "tests_rounded"

    def sizes(self, channels, ratio, gamma, round_to=1):
        return super().sizes(channels, ratio, gamma, 16)


@backends
def test_a_method_that_rounds_widens_the_candidates_and_keeps_the_active_channels(model, backend):
    with pruned(model, backend, method=Rounded()) as session, Active(model) as seen:
        model.generate(prompt(), max_new_tokens=3)
    sizes = session.report.ffns[0].plan.sizes
    assert (sizes.width, sizes.kept) == (48, 39)
    assert [int(active.sum()) for ffn in seen.seen for active in ffn[1:]] == [39] * 4


@backends
def test_gamma_0_is_a_static_mask(model, backend):
    with pruned(model, backend, gamma=0.0) as session, Active(model) as seen:
        model.generate(prompt(), max_new_tokens=4)
    assert session.report.ffns[0].plan.sizes.candidates == 0
    for first, *others in (ffn[1:] for ffn in seen.seen):
        assert all(torch.equal(first, other) for other in others)


@backends
def test_a_gamma_that_does_not_fit_is_clamped_and_reported(model, backend):
    with pruned(model, backend, ratio=0.1, gamma=0.9) as session, Active(model) as seen:
        model.generate(prompt(), max_new_tokens=2)
    assert [int(active.sum()) for ffn in seen.seen for active in ffn[1:]] == [58] * 2
    sizes = session.report.ffns[0].plan.sizes
    assert (sizes.candidates, sizes.pruned, sizes.kept) == (12, 0, 58)
    assert any("gamma" in note and "clamped" in note for note in session.report.notes)


@pytest.mark.parametrize(
    ("ratio", "gamma", "parts"), [(0.98, 0.0, (2, 0, 62)), (0.98, 1.0, (0, 4, 60)), (0.5, 1.0, (0, 64, 0))]
)
def test_the_ends_of_the_range_are_the_same_on_both_backends(model, ratio, gamma, parts):
    found = []
    for backend in BACKENDS:
        with pruned(model, backend, ratio=ratio, gamma=gamma) as session, Active(model) as seen:
            tokens = model.generate(prompt(2, LENGTH), max_new_tokens=STEPS)
        sizes = session.report.ffns[0].plan.sizes
        assert (sizes.retained, sizes.candidates, sizes.pruned) == parts
        found.append((tokens.tolist(), seen.sets(2)))
    assert found[0] == found[1]


def test_an_adapter_may_be_given_by_hand(model):
    config = PopConfig(0.4, scope="ffn", backend="masked")
    with prune(model, config, adapter=LlamaAdapter()):
        found = generate(model, prompt())[0]
    assert torch.equal(found, alone(model, prompt()))


class ByNumber(Scorer):
    """Ranks channels by their number, whatever the activations."""

    name = "tests_by_number"

    def channel_weight(self, ffn):
        return 100.0 ** torch.arange(ffn.size, dtype=torch.float64)


@backends
@pytest.mark.parametrize("by_name", [True, False])
def test_an_own_scorer_ranks_the_channels(model, backend, by_name, monkeypatch):
    monkeypatch.setattr(pop_mm.methods.scoring._SCORERS, "_classes", dict(pop_mm.methods.scoring._SCORERS))
    if by_name:
        register_scorer(ByNumber)
        with pytest.raises(ConfigError, match="exists"):
            register_scorer(ByNumber)
    with pruned(model, backend, scorer=ByNumber.name if by_name else ByNumber()) as session:
        model.generate(prompt(), max_new_tokens=2)
    for [(retained, candidates, left_out)] in partitions(session):
        assert max(left_out) < min(candidates) < max(candidates) < min(retained)


class Narrow(Scorer):
    """Weights of a dtype that scores cannot have."""

    name = "tests_narrow"

    def __init__(self, dtype):
        self._dtype = dtype

    def channel_weight(self, ffn):
        return (torch.arange(ffn.size) % 7).to(self._dtype)


@backends
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int64])
def test_an_own_scorers_weights_are_widened(model, backend, dtype):
    found = []
    for weights in dtype, torch.float32:
        with pruned(model, backend, scorer=Narrow(weights)):
            found.append(generate(model, prompt())[1])
    assert torch.equal(*found)


@pytest.mark.parametrize("method", ["static", "full"])
@pytest.mark.parametrize("rows", [1, 2])
def test_the_papers_ablations_are_the_same_on_both_backends(model, method, rows):
    found = []
    for backend in BACKENDS:
        with pruned(model, backend, method=method), Active(model) as seen:
            tokens = model.generate(prompt(rows, LENGTH), max_new_tokens=STEPS)
        found.append((tokens.tolist(), seen.sets(rows)))
        assert all(len(columns[0]) == 39 for step in seen.sets(rows)[1:] for ffn in step for columns in ffn)
    assert found[0] == found[1]
