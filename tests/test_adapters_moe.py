import re

import pytest
import torch
from torch import nn

from pop_mm import AdapterError
from pop_mm.adapters import (
    ExpertPaths,
    LlamaAdapter,
    Qwen2MoeAdapter,
    adapter_for,
    registered_adapters,
)
from pop_mm.experts import LAYOUT_FLAGS, Experts
from pop_mm.ratio import LayerWeights
from tiny_models import MOE_MODELS, tiny

IDS = torch.randint(1, 96, (2, 16), generator=torch.Generator().manual_seed(1))

# model types: layers with experts, layers with a dense FFN, channels of the shared expert
_STRUCTURES = {
    ((0, 1), (), None): "mixtral minimax minimax_m2 phimoe olmoe flex_olmo gpt_oss granitemoe",
    ((1, 2), (0,), None): "qwen3_moe mellum mimo_v2_flash beam lfm2_moe",
    ((1,), (0, 2), None): "jamba",
    ((0, 1), (), 24): "deepseek_v4 hunyuan_v1_moe",
    ((0, 1), (), 40): "qwen3_5_moe_text qwen4_exp_text granitemoeshared granitemoe_swa granitemoehybrid kolibri1",
    ((0, 1), (), 48): "aria_text gemma4_text solar_open",
    ((1, 2), (0,), 40): "qwen2_moe flint qwen3_next laguna minimax_m3_vl_text dots3_note_text",
    (
        (1, 2),
        (0,),
        48,
    ): "deepseek_v2 deepseek_v3 deepseek_v32 glm4_moe glm4_moe_lite glm_moe_dsa dots1 mistral4 axk1 axk2 "
    "kimi_linear bailing_hybrid hy_v3 hy_v4 afmoe exaone_moe cohere2_moe ernie4_5_moe",
    ((1, 4), (3,), 40): "nemotron_h",
}
STRUCTURES = {name: structure for structure, names in _STRUCTURES.items() for name in names.split()}
MIXERS = re.compile("attn|attention|conv|mamba|mixer.(in|out|q|k|v|o)_proj|_hc$|hyper_connection")
IN_FLOAT32 = {"beam", "nemotron_h"}  # logits (beam: also the activations of its experts), whatever the weights are


def close(model_type, bound):
    """Tolerance in float64."""
    return dict(rtol=0, atol=1e-5 if model_type in IN_FLOAT32 else bound)


@pytest.fixture(params=MOE_MODELS)
def model_type(request):
    return request.param


def records_of(model):
    return adapter_for(model).projections(model)


def experts_of(model):
    return [record for record in records_of(model) if isinstance(record, Experts)]


@torch.no_grad()
def logits(model):
    return model(IDS).logits


def bits(model):
    """Every parameter and buffer as integers."""
    kinds = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return {
        name: tensor.clone().view(kinds[tensor.element_size()]) if tensor.is_floating_point() else tensor.clone()
        for name, tensor in model.state_dict().items()
    }


def same_bits(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def random_swaps(size, seed):
    """Disjoint positions, 3 of them left alone."""
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
    return order[: size // 2 - 1], order[size // 2 + 1 :][: size // 2 - 1]


def swap_everything(records):
    """Other channels in each FFN and each expert; the same call puts them back."""
    for record in records:
        if isinstance(record, Experts):
            for expert in range(record.count):
                record.swap(expert, *random_swaps(record.size, 10 * record.layer + expert))
        else:
            record.swap(*random_swaps(record.size, record.layer))


@torch.no_grad()
def compute(record, expert, x, width):
    """An expert's first ``width`` channels, from its views."""
    parts = [x @ w if b is None else x @ w + b for w, b in record.input_views(expert, width)]
    gate_up = torch.cat(parts, -1)
    h = record.module._apply_gate(gate_up) if record.module.has_gate else record.module.act_fn(gate_up)
    weight, bias = record.down_view(expert, width)
    return h @ weight if bias is None else h @ weight + bias


@torch.no_grad()
def run(record, expert, x):
    """The module's own output for tokens that are all routed to one expert."""
    ids = torch.full((len(x), 1), expert)
    return record.module(x, ids, torch.ones(len(x), 1, dtype=x.dtype))


def inputs(record, tokens=5):
    generator = torch.Generator().manual_seed(2)
    return torch.randn(tokens, record.hidden_size, generator=generator).to(record.down.dtype)


def channel(record, expert, index):
    """Weights of one channel, from the stored tensors: what gate and up read, what down writes."""
    module, size = record.module, record.size
    if not module.has_gate:
        rows = [index]
    elif module.is_concatenated:
        rows = [index, size + index]
    else:
        rows = [2 * index, 2 * index + 1]
    reads = module.gate_up_proj[expert] if module.has_gate else module.up_proj[expert]
    reads = reads.t() if module.is_transposed else reads
    writes = module.down_proj[expert] if module.is_transposed else module.down_proj[expert].t()
    return reads[rows], writes[index]


# --- the records ---------------------------------------------------------------------------------------------------


def test_every_tiny_model_is_described_here():
    assert STRUCTURES.keys() == MOE_MODELS.keys()
    assert all(registered_adapters()[name].kind == "moe" for name in MOE_MODELS)


def test_every_ffn_and_all_experts_are_found(model_type):
    model = tiny(model_type)
    records, modules = records_of(model), dict(model.named_modules())
    with_experts, dense, shared = STRUCTURES[model_type]
    assert [(r.layer, r.size) for r in records if r.role == "expert"] == [(layer, 24) for layer in with_experts]
    dense_size = 24 if model_type == "jamba" else 48
    assert [(r.layer, r.size) for r in records if r.role == "dense"] == [(layer, dense_size) for layer in dense]
    found = [(r.layer, r.size) for r in records if r.role == "shared_expert"]
    assert found == [(layer, shared) for layer in with_experts if shared]
    assert [r.layer for r in records] == sorted(r.layer for r in records)
    for record in records:
        assert modules[record.name] is (record.module if isinstance(record, Experts) else record.holder)
        assert record.hidden_size == 32
        assert record.why_not_plain() is None
        assert record.device.type == "cpu" and record.float_dtype == torch.float32
        assert len(record.modules) == len(set(record.modules))
    for record in experts_of(model):
        assert (record.count, record.top_k, record.channel_shape) == (4, 2, (4, 24))
        weights = [p for p in record.module.parameters(recurse=False) if p.dim() == 3]
        assert record.weight_count * 2 == sum(p.numel() for p in weights)  # 2 of 4 experts
        assert record.layout in {paths.layout for paths in adapter_for(model).experts}
        assert record.layout in adapter_for(model).layout()


def test_every_matrix_is_one_thing_only(model_type):
    """A mixer's, an FFN's, the experts' or a router's: and what is left out of the count is no mixer's."""
    model = tiny(model_type)
    adapter = adapter_for(model)
    records = adapter.projections(model)
    found = {module for record in records for module in record.modules}
    weights = adapter.layer_weights(model, records)
    for index, layer in enumerate(adapter.layers(model)[1]):
        attention = 0
        norms = {m for module in layer.modules() if "Norm" in type(module).__name__ for m in module.modules()}
        for path, module in layer.named_modules():
            matrices = [p for p in module.parameters(recurse=False) if p.dim() >= 2]
            mixer = bool(MIXERS.search(path))
            unpruned = any(path == name or path.startswith(f"{name}.") for name in adapter.not_weights)
            if matrices and module not in norms:
                assert mixer + unpruned + (module in found) == 1, path
                attention += mixer * sum(p.numel() for p in matrices)
        assert weights[index].attention == attention
        own = [record for record in records if record.layer == index]
        assert weights[index].ffn == sum(record.weight_count for record in own if record.role != "shared_expert")


Q_O, K_V = 32 * 32, 16 * 32
TOP_2 = 2 * 3 * 24 * 32


@pytest.mark.parametrize(
    ("model_type", "expected"),
    [
        ("mixtral", [(2 * Q_O + 2 * K_V, TOP_2)] * 2),  # without the router
        ("gpt_oss", [(2 * Q_O + 2 * K_V, TOP_2)] * 2),  # without biases
        ("qwen2_moe", [(2 * Q_O + 2 * K_V, 3 * 48 * 32)] + [(2 * Q_O + 2 * K_V, TOP_2)] * 2),  # nor the shared one
        ("gemma4_text", [(2 * Q_O + 2 * K_V, TOP_2)] * 2),
        ("granitemoeshared", [(2 * Q_O + 2 * K_V, TOP_2)] * 2),
        ("afmoe", [(3 * Q_O + 2 * K_V, 3 * 48 * 32)] + [(3 * Q_O + 2 * K_V, TOP_2)] * 2),  # attention has a gate_proj
    ],
)
def test_what_counts_as_attention_and_ffn(model_type, expected):
    model = tiny(model_type)
    adapter = adapter_for(model)
    found = adapter.layer_weights(model, adapter.projections(model))
    assert found == {index: LayerWeights(*weights) for index, weights in enumerate(expected)}


def test_layers_of_one_kind_each():
    model = tiny("nemotron_h")
    adapter = adapter_for(model)
    found = adapter.layer_weights(model, adapter.projections(model))
    assert [bool(weights.ffn) for weights in found.values()] == [False, True, False, True, True]
    assert [bool(weights.attention) for weights in found.values()] == [True, False, True, False, False]
    assert found[1].ffn == 2 * 2 * 24 * 32
    assert found[3].ffn == 2 * 48 * 32


def test_experts_of_another_width_than_the_model():
    model = tiny("nemotron_h", torch.float64, moe_latent_size=12)
    record = experts_of(model)[0]
    assert (record.hidden_size, record.size, record.weight_count) == (12, 24, 2 * 2 * 24 * 12)
    x = inputs(record)
    torch.testing.assert_close(compute(record, 1, x, 24), run(record, 1, x))


def test_on_the_meta_device():
    with torch.device("meta"):
        records = records_of(tiny("deepseek_v3"))
    assert [record.role for record in records] == ["dense", "shared_expert", "expert", "shared_expert", "expert"]
    assert records[2].weight_count == TOP_2


# --- the records are the model's own function ----------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
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
        half, x = ffn.size // 2, torch.randn(3, 32, dtype=torch.float64)
        hook = ffn.down.module.register_forward_pre_hook(
            lambda _, args, half=half: (torch.cat([args[0][..., :half], 0 * args[0][..., half:]], -1),)
        )
        with torch.no_grad():
            masked = ffn.holder(x)
            hook.remove()
            dense = ffn.holder(x)
            for p in ffn.projections:
                p.module.forward = p.narrow(half)
            torch.testing.assert_close(ffn.holder(x), masked, rtol=0, atol=1e-12)
        assert (dense - masked).abs().max() > 0.01


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
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


# --- models of these types without experts, and experts that nobody knows ------------------------------------------


@pytest.mark.parametrize(
    ("model_type", "settings", "sizes"),
    [
        ("qwen2_moe", {"mlp_only_layers": [0, 1, 2]}, [48] * 3),
        ("qwen2_moe", {"num_experts": 0}, [48] * 3),
        ("qwen3_moe", {"decoder_sparse_step": 4}, [48] * 3),
        ("deepseek_v3", {"first_k_dense_replace": 3}, [48] * 3),
        ("granitemoehybrid", {"num_local_experts": 0}, [40] * 2),  # Granite 4 Micro
        ("gemma4_text", {"enable_moe_block": False}, [48] * 2),
        ("jamba", {"num_experts": 1}, [24] * 3),
        ("nemotron_h", {"layers_block_type": ["mamba", "mlp", "attention", "mlp", "mlp"]}, [48] * 3),
    ],
)
def test_without_any_experts_it_is_a_dense_model(model_type, settings, sizes):
    model = tiny(model_type, torch.float64, **settings)
    adapter = adapter_for(model)
    records = adapter.projections(model)
    assert [record.size for record in records] == sizes
    assert {record.role for record in records} == {"dense"}, "what nobody shares is no shared expert"
    weights = adapter.layer_weights(model, records)
    assert sum(layer.ffn for layer in weights.values()) == sum(record.weight_count for record in records)
    dense = logits(model)
    swap_everything(records)
    torch.testing.assert_close(logits(model), dense, **close(model_type, 1e-9))


def test_without_any_ffn_it_is_an_error():
    model = tiny("nemotron_h", layers_block_type=["mamba", "attention"], num_hidden_layers=2)
    with pytest.raises(AdapterError, match=r"found no decoder layer with .*mixer\.experts in NemotronHForCausalLM"):
        records_of(model)


def test_experts_that_the_adapter_does_not_know_are_an_error():
    model = tiny("qwen3_moe")  # its first layer would look prunable
    with pytest.raises(AdapterError, match=r"LlamaAdapter does not know the experts at model\.layers\.1\.mlp\.experts"):
        LlamaAdapter().projections(model)


def test_experts_that_are_not_dispatched_are_an_error():
    model = tiny("mixtral")
    model.model.layers[1].mlp.experts = nn.ModuleList([nn.Linear(32, 32)])
    with pytest.raises(AdapterError, match=r"layers\.1\.mlp\.experts is a ModuleList, which .*without quantisation"):
        records_of(model)


def test_a_config_that_does_not_say_top_k():
    class Odd(Qwen2MoeAdapter):
        experts = (ExpertPaths(top_k="experts_for_each"),)

    with pytest.raises(AdapterError, match="Qwen2MoeConfig has no experts_for_each; it should say how many"):
        Odd().projections(tiny("qwen2_moe"))


def test_top_k_may_differ_by_layer():
    model = tiny("hunyuan_v1_moe", moe_topk=[2, 1])
    assert [record.top_k for record in experts_of(model)] == [2, 1]
    assert [record.weight_count for record in experts_of(model)] == [TOP_2, TOP_2 // 2]


# --- refusals ------------------------------------------------------------------------------------------------------

_OWN = r"computed by code of its own, not dispatched through transformers' ExpertsInterface"
REFUSED = {
    "llama4_text": (dict(num_local_experts=4, num_experts_per_tok=1, intermediate_size_mlp=48, head_dim=8), "batched"),
    "dbrx": (
        dict(
            d_model=32,
            n_heads=4,
            n_layers=2,
            attn_config=dict(kv_n_heads=2, rope_theta=1e4),
            ffn_config=dict(ffn_hidden_size=24),
        ),
        _OWN,
    ),
    "jetmoe": (dict(kv_channels=8, num_local_experts=4, num_experts_per_tok=2, intermediate_size=24), _OWN),
    "longcat_flash": (dict(num_layers=2, n_routed_experts=4, moe_topk=2, expert_ffn_hidden_size=24), _OWN),
}
_LONGCAT = dict(
    q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8, ffn_hidden_size=48
)


@pytest.mark.parametrize("model_type", REFUSED)
def test_experts_past_the_interface_are_refused(model_type):
    settings, reason = REFUSED[model_type]
    model = tiny(model_type, **settings, **(_LONGCAT if model_type == "longcat_flash" else {}))
    with pytest.raises(AdapterError, match=f"does not prune {type(model).__name__}: its experts .*{reason}"):
        records_of(model)
    assert registered_adapters()[model_type].kind == "moe"
    assert not any(hasattr(module, flag) for module in model.modules() for flag in LAYOUT_FLAGS), "not true any more"


def test_llama4_runs_every_expert_on_every_token():
    model = tiny("llama4_text", **REFUSED["llama4_text"][0])
    rows = []
    for path, module in model.named_modules():
        if path.endswith("feed_forward.experts"):
            module.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    logits(model)
    assert rows and set(rows) == {4 * IDS.numel()}
    assert registered_adapters()["llama4"] is registered_adapters()["llama4_text"]


def test_gpt_oss_on_kernels_of_the_hub_is_refused():
    model = tiny("gpt_oss")
    model._use_kernels = True
    with pytest.raises(AdapterError, match=r"one kernel, past .* Load the model with use_kernels=False"):
        records_of(model)


def test_doge_with_experts_is_refused():
    model = tiny("doge", is_moe=True, num_experts=16, num_experts_per_tok=2)
    with pytest.raises(AdapterError, match="does not prune Doge with is_moe=True"):
        records_of(model)
