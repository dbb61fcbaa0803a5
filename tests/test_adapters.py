import re
from importlib import metadata

import pytest
import torch
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration

import pop_mm
from helpers.channels import bits, logits, records_of, same_bits
from helpers.tiny_models import DENSE_MODELS, tiny
from pop_mm import AdapterError
from pop_mm.adapters import (
    Adapter,
    FFNPaths,
    LlamaAdapter,
    RefusedAdapter,
    adapter_for,
    register_adapter,
    registered_adapters,
    support_table,
    unregister_adapter,
)

GEMMA3N = {
    "vocab_size_per_layer_input": 96,
    "hidden_size_per_layer_input": 8,
    "num_kv_shared_layers": 0,
    "laurel_rank": 4,
    "layer_types": ["sliding_attention", "full_attention"],
    "activation_sparsity_pattern": [0.0, 0.95],  # the first layer alone would look prunable
}
MIXTRAL = {"num_local_experts": 4, "num_experts_per_tok": 2}


@pytest.fixture(autouse=True)
def _same_registry():
    """Every test leaves the registry as it was."""
    before = registered_adapters()
    yield
    after = registered_adapters()
    for name in after.keys() - {name for name, cls in before.items() if after.get(name) is cls}:
        unregister_adapter(name)
    for name, cls in before.items():
        register_adapter(name)(cls)


# --- dense models: the records are the model's own function --------------------------------------------------------


@pytest.fixture(params=DENSE_MODELS)
def model_type(request):
    return request.param


def test_every_ffn_is_found(model_type):
    model = tiny(model_type, num_hidden_layers=2)
    records = records_of(model)
    size = 128 if model_type in ("mpt", "bloom") else 64
    assert [ffn.layer for ffn in records] == [0, 1]
    modules = dict(model.named_modules())
    for ffn in records:
        assert (ffn.size, ffn.hidden_size, ffn.role) == (size, 32, "dense")
        assert ffn.name in modules
        assert all(modules[p.name] is p.module and p.name.startswith(f"{ffn.name}.") for p in ffn.projections)
        assert ffn.why_not_plain() is None
        assert ffn.weight_count == sum(p.weight.numel() for p in ffn.projections)
        assert len(ffn.inputs) in (1, 2)
    # whatever multiplies by a matrix in a layer is attention (or another token mixer), or one of the projections
    found = {p.module for ffn in records for p in ffn.projections}
    _, layers = adapter_for(model).layers(model)
    for path, module in layers.named_modules():
        held = [p for p in module.parameters(recurse=False) if p.dim() >= 2]
        mixer = re.search("attn|attention|conv", path) or "Norm" in type(module).__name__
        assert bool(held) <= (bool(mixer) != (module in found)), path


def test_masking_channels_equals_narrowing(model_type):
    model = tiny(model_type, torch.float64)
    records = records_of(model)
    dense = logits(model)
    half = records[0].size // 2

    def mask(_, args):
        return (torch.cat([args[0][..., :half], torch.zeros_like(args[0][..., half:])], -1), *args[1:])

    hooks = [ffn.down.module.register_forward_pre_hook(mask) for ffn in records]
    masked = logits(model)
    for hook in hooks:
        hook.remove()
    for ffn in records:
        for p in ffn.projections:
            p.module.forward = p.narrow(half)
    narrow = logits(model)
    assert (dense - masked).abs().max() > 0.1, "half of the channels hardly matter: the test sees nothing"
    # norms that compute in float32 round away what float64 leaves
    torch.testing.assert_close(narrow, masked, rtol=0, atol=1e-6)


def test_swapping_channels_changes_nothing(model_type):
    model = tiny(model_type, torch.float64)
    dense, before = logits(model), bits(model)
    records = records_of(model)
    swaps = {}
    for ffn in records:
        order = torch.randperm(ffn.size, generator=torch.Generator().manual_seed(ffn.layer))
        swaps[ffn] = order[: ffn.size // 2 - 3], order[ffn.size // 2 + 3 :]
        ffn.swap(*swaps[ffn])
        for p in ffn.projections:
            assert not torch.equal(bits(model)[f"{p.name}.weight"], before[f"{p.name}.weight"])
    torch.testing.assert_close(logits(model), dense, rtol=0, atol=1e-6)
    for ffn in records:
        ffn.swap(*swaps[ffn])
    assert same_bits(bits(model), before)


def test_swapping_back_restores_every_bit_in_bfloat16(model_type):
    model = tiny(model_type, torch.bfloat16)
    ffn = records_of(model)[1]
    with torch.no_grad():
        ffn.down.weight[0, :2] = torch.tensor([float("nan"), -0.0])
    before = bits(model)
    first, second = torch.arange(0, 30), torch.arange(63, 33, -1)
    ffn.swap(first, second)
    assert not same_bits(bits(model), before)
    ffn.swap(first, second)
    assert same_bits(bits(model), before)


def test_column_norms_are_those_of_the_function(model_type):
    model = tiny(model_type, torch.float64)
    ffn = records_of(model)[0]
    down = ffn.down.module
    with torch.no_grad():
        columns = down(torch.eye(ffn.size).double()) - down(torch.zeros(1, ffn.size).double())
    torch.testing.assert_close(ffn.down_column_norms(), columns.norm(dim=1))


@pytest.mark.parametrize("model_type", ["llama", "phi3", "gpt2"], indirect=True)
def test_many_swaps_at_once(model_type):
    size = {"n_inner" if model_type == "gpt2" else "intermediate_size": 500}
    model = tiny(model_type, torch.float64, **size)
    dense = logits(model)
    for ffn in records_of(model):
        assert ffn.size == 500
        order = torch.randperm(500, generator=torch.Generator().manual_seed(0))
        ffn.swap(order[:250], order[250:])
    torch.testing.assert_close(logits(model), dense, rtol=0, atol=1e-6)


def test_tiny_models_are_deterministic():
    state = torch.get_rng_state()
    assert same_bits(bits(tiny("gpt2")), bits(tiny("gpt2")))
    assert not same_bits(bits(tiny("gpt2")), bits(tiny("gpt2", seed=1)))
    assert torch.equal(torch.get_rng_state(), state)


# --- the registry --------------------------------------------------------------------------------------------------


def test_every_tiny_model_has_a_registered_adapter():
    registered = registered_adapters()
    assert all(name in registered for name in DENSE_MODELS)
    assert list(registered) == sorted(registered)


def test_an_adapter_can_be_used_by_itself():
    model = tiny("llama")
    assert [ffn.name for ffn in LlamaAdapter().projections(model)] == ["model.layers.0.mlp", "model.layers.1.mlp"]


def test_register_an_own_adapter():
    @pop_mm.register_adapter("my_type", "my_other_type")
    class MyAdapter(Adapter):
        ffns = (FFNPaths(gate="", up="gate_proj"),)

    model = tiny("llama")
    model.config.model_type = "my_type"
    assert isinstance(adapter_for(model), MyAdapter)
    assert [p.name for p in records_of(model)[0].projections] == [
        "model.layers.0.mlp.gate_proj",
        "model.layers.0.mlp.down_proj",
    ]
    assert register_adapter("my_type")(MyAdapter) is MyAdapter, "registering the same class again is no conflict"
    unregister_adapter("my_other_type")
    assert "my_other_type" not in registered_adapters()


def test_a_taken_model_type_is_an_error():
    class MyAdapter(Adapter):
        pass

    with pytest.raises(AdapterError, match=r"'llama' is served by LlamaAdapter already.*unregister_adapter\('llama'\)"):
        register_adapter("free_type", "llama")(MyAdapter)
    assert "free_type" not in registered_adapters(), "all or nothing"
    unregister_adapter("llama")
    register_adapter("llama")(MyAdapter)
    assert registered_adapters()["llama"] is MyAdapter


@pytest.mark.parametrize("thing", [object, LlamaAdapter(), lambda model: None])
def test_only_adapters_can_be_registered(thing):
    with pytest.raises(AdapterError, match=r"needs a subclass of pop_mm\.adapters\.Adapter; got"):
        register_adapter("my_type")(thing)


@pytest.mark.parametrize("names", [(), ("",), (3,)])
def test_a_model_type_is_needed(names):
    with pytest.raises(AdapterError, match="at least one model type"):
        register_adapter(*names)(LlamaAdapter)


def test_unregistering_what_nobody_registered():
    with pytest.raises(AdapterError, match=r"'lama'\. Did you mean 'llama'"):
        unregister_adapter("lama")


class _FromPackage(Adapter):
    ffns = (FFNPaths(),)


def _offer(monkeypatch, *entries):
    """Pretend that installed packages offer these entry points."""

    def entry_points(group):
        return [metadata.EntryPoint(name, value, group) for name, value in entries if group == "pop_mm.adapters"]

    monkeypatch.setattr("pop_mm.adapters.registry.entry_points", entry_points)


def test_entry_points_of_installed_packages(monkeypatch):
    _offer(monkeypatch, ("package_type", f"{__name__}:_FromPackage"))
    model = tiny("llama")
    model.config.model_type = "package_type"
    assert isinstance(adapter_for(model), _FromPackage)
    assert "package_type" in {row["model_type"] for row in support_table()}


def test_an_entry_point_does_not_replace_an_adapter(monkeypatch):
    _offer(monkeypatch, ("llama", f"{__name__}:_FromPackage"))
    assert registered_adapters()["llama"] is LlamaAdapter


def test_a_broken_entry_point_is_named(monkeypatch):
    _offer(monkeypatch, ("broken_type", "no_such_package.adapters:Broken"))
    try:
        with pytest.raises(AdapterError, match=r"'broken_type' \(no_such_package\.adapters:Broken\) cannot be loaded"):
            adapter_for(tiny("llama"))
    finally:
        monkeypatch.undo()


def test_an_entry_point_must_be_an_adapter(monkeypatch):
    _offer(monkeypatch, ("dict_type", "builtins:dict"))
    try:
        with pytest.raises(AdapterError, match=r"needs a subclass of pop_mm\.adapters\.Adapter; got <class 'dict'>"):
            registered_adapters()
    finally:
        monkeypatch.undo()


def test_support_table():
    rows = {row["model_type"]: row for row in support_table()}
    assert set(rows) == set(registered_adapters())
    for name in DENSE_MODELS:
        assert set(rows[name]) == {"model_type", "adapter", "kind", "layout"}
        assert rows[name]["kind"] == "dense"
        assert rows[name]["adapter"] == registered_adapters()[name].__name__
        assert rows[name]["layout"] == records_of(tiny(name))[0].layout
    assert rows["llama"]["layout"] == "gate_proj, up_proj, down_proj"
    assert rows["phi3"]["layout"] == "gate_up_proj (fused), down_proj"
    assert rows["gpt2"]["layout"] == "c_fc, c_proj (ungated, transposed)"
    assert rows["bitnet"]["layout"].startswith("refused: ")


# --- model types that nobody registered ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "like", ["llama", "stablelm", "apertus", "phi3", "lfm2", "arcee", "gpt_neo", "gpt_neox", "phi", "gptj"]
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_an_unregistered_type_is_matched_by_structure(like, dtype):
    model = tiny(like, dtype).train()
    expected = [[p.name for p in ffn.projections] for ffn in records_of(model)]
    model.config.model_type = "brand_new"
    before, hooks, state = bits(model), dict(model.named_modules()), torch.get_rng_state()
    adapter = adapter_for(model)
    assert [[p.name for p in ffn.projections] for ffn in adapter.projections(model)] == expected
    assert type(adapter) not in registered_adapters().values()
    assert adapter.layer_weights(model, adapter.projections(model)).keys() == {0, 1}
    # the probe leaves no trace
    assert same_bits(bits(model), before)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training and "forward" not in vars(module) for module in hooks.values())


class _Coupled(nn.Module):
    """A gated FFN whose channels see each other: ``couple`` runs in front of the down projection."""

    def __init__(self, mlp, couple):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj
        self.couple = couple

    def forward(self, x):
        return self.down_proj(self.couple(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x)))


COUPLINGS = {
    "norm over all channels": lambda h: h / h.pow(2).mean(-1, keepdim=True).sqrt(),
    "threshold from all channels": lambda h: h * (h > h.mean(-1, keepdim=True)),
    "norm over groups of channels": lambda h: nn.functional.normalize(h.unflatten(-1, (-1, 4)), dim=-1).flatten(-2),
    "neighbouring channels": lambda h: h + 0.3 * h.roll(1, -1),
    "a scale of each position": lambda h: h * torch.linspace(0.5, 1.5, h.shape[-1], dtype=h.dtype),
}


@pytest.mark.parametrize("coupling", COUPLINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_channels_that_depend_on_each_other_are_refused(coupling, dtype):
    model = tiny("llama", dtype)
    model.config.model_type = "brand_new"
    for layer in model.model.layers:
        layer.mlp = _Coupled(layer.mlp, COUPLINGS[coupling])
    with pytest.raises(
        AdapterError, match=r"No adapter .* 'brand_new'.*model\.layers\.0\.mlp .* not independent.*register_adapter"
    ):
        adapter_for(model)
    assert all("forward" not in vars(module) for module in model.modules())


def test_one_unusual_layer_is_enough_to_refuse():
    model = tiny("llama")
    model.config.model_type = "brand_new"
    for layer in model.model.layers:
        layer.mlp.cutoff = 0.0
    layer.mlp = _Coupled(layer.mlp, COUPLINGS["norm over all channels"])
    with pytest.raises(AdapterError, match=r"model\.layers\.1\.mlp .* not independent"):
        adapter_for(model)


def test_projections_that_are_never_called_are_refused():
    model = tiny("llama")
    model.config.model_type = "brand_new"
    for layer in model.model.layers:
        layer.mlp.forward = lambda x: x
    with pytest.raises(AdapterError, match=r"model\.layers\.0\.mlp gives the same result .* not called"):
        adapter_for(model)


def test_an_ffn_that_does_not_run_alone_is_refused():
    model = tiny("mpt")
    model.config.model_type = "brand_new"
    with pytest.raises(AdapterError, match=r"transformer\.blocks\.0\.ffn does not run .*'residual'"):
        adapter_for(model)


def test_experts_are_not_skipped_silently():
    model = tiny("mixtral", **MIXTRAL)
    model.config.model_type = "brand_new"
    with pytest.raises(AdapterError, match="hold experts"):
        adapter_for(model)


def test_an_unknown_structure_says_what_was_found():
    model = tiny("opt")
    model.config.model_type = "optt"
    with pytest.raises(AdapterError) as error:
        adapter_for(model)
    assert re.search(r"'optt'.*2 layers at 'model\.decoder\.layers' hold .*fc1, fc2", str(error.value))
    assert "@pop_mm.register_adapter('optt')" in str(error.value)
    assert "Did you mean 'opt'?" in str(error.value)


def test_without_one_list_of_layers():
    model = tiny("llama")
    model.config.model_type = "brand_new"
    model.model.more_layers = nn.ModuleList([nn.Identity(), nn.Identity()])
    with pytest.raises(AdapterError, match=r"2 of its 2 module lists have config\.num_hidden_layers = 2 items"):
        adapter_for(model)


# --- refusals ------------------------------------------------------------------------------------------------------


def test_no_config():
    with pytest.raises(AdapterError, match="config with a model_type; got Linear"):
        adapter_for(nn.Linear(2, 2))


def test_encoder_decoder():
    config = T5Config(vocab_size=96, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4)
    with pytest.raises(AdapterError, match="t5 is an encoder-decoder model; pop_mm prunes decoder-only models"):
        adapter_for(T5ForConditionalGeneration(config))


@pytest.mark.parametrize(
    ("model_type", "settings", "reason"),
    [("gemma3n_text", GEMMA3N, "mean and deviation of all gate channels"), ("bitnet", {}, "norm over all channels")],
)
@pytest.mark.parametrize("registered", [True, False])
def test_unprunable_model_types_are_refused(model_type, settings, reason, registered):
    model = tiny(model_type, **settings)
    if registered:
        with pytest.raises(AdapterError, match=f"does not prune {type(model).__name__}: .*{reason}"):
            records_of(model)
    else:  # the structural probe sees it too
        unregister_adapter(model_type)
        with pytest.raises(AdapterError, match=r"not independent|does not run on 32 of its 64 channels"):
            adapter_for(model)


def test_an_own_refusal():
    class Mine(RefusedAdapter):
        reason = "its channels are shy"

    assert Mine.layout() == "refused: its channels are shy"
    with pytest.raises(AdapterError, match="does not prune LlamaForCausalLM: its channels are shy"):
        Mine().projections(tiny("llama"))


def test_bloom_that_slices_its_weights_is_refused():
    model = tiny("bloom", slow_but_exact=True, pretraining_tp=2)
    with pytest.raises(AdapterError, match="slow_but_exact=False"):
        records_of(model)


def test_an_adapter_that_does_not_fit_says_so():
    with pytest.raises(
        AdapterError, match=r"LlamaAdapter found no decoder layer with mlp\.down_proj in GPT2LMHeadModel"
    ):
        LlamaAdapter().projections(tiny("gpt2"))

    class Wrong(Adapter):
        ffns = (FFNPaths(gate="gate_up_proj", up="gate_up_proj", down="wide"),)

    model = tiny("phi3")
    for layer in model.model.layers:
        layer.mlp.wide = nn.Linear(128, 32)
    with pytest.raises(AdapterError, match=r"gate_up_proj has 128 outputs, but .*wide takes 128 inputs \(.*fused"):
        Wrong().projections(model)
