import re

import pytest
import torch
from torch import nn

from helpers.channels import IDS, close, experts_of, logits, records_of, swap_everything
from helpers.tiny_models import MOE_MODELS, tiny
from pop_mm import AdapterError
from pop_mm.adapters import (
    ExpertPaths,
    LlamaAdapter,
    Qwen2MoeAdapter,
    adapter_for,
    registered_adapters,
)
from pop_mm.methods.ratio import LayerWeights
from pop_mm.weights.experts import LAYOUT_FLAGS, Experts

# model types: layers with experts, layers with a dense FFN, channels of the shared expert
_STRUCTURES = {
    ((0, 1), (), None): "mixtral minimax minimax_m2 phimoe olmoe flex_olmo gpt_oss granitemoe",
    ((1, 2), (0,), None): "qwen3_moe mellum mimo_v2_flash beam lfm2_moe",
    ((1,), (0, 2), None): "jamba",
    ((0, 1), (), 24): "deepseek_v4 hunyuan_v1_moe",
    ((0, 1), (), 40): "qwen3_5_moe_text qwen4_exp_text granitemoeshared granitemoe_swa granitemoehybrid kolibri1",
    ((0, 1), (), 48): "aria_text gemma4_text solar_open",
    ((1, 2), (0,), 40): "qwen2_moe flint qwen3_next laguna minimax_m3_vl_text dots3_note_text",
    ((1, 2), (0,), 48): "deepseek_v2 deepseek_v3 deepseek_v32 glm4_moe glm4_moe_lite glm_moe_dsa dots1 mistral4 axk1 "
    "axk2 kimi_linear bailing_hybrid hy_v3 hy_v4 afmoe exaone_moe cohere2_moe ernie4_5_moe",
    ((1, 4), (3,), 40): "nemotron_h",
}
STRUCTURES = {name: structure for structure, names in _STRUCTURES.items() for name in names.split()}
MIXERS = re.compile("attn|attention|conv|mamba|mixer.(in|out|q|k|v|o)_proj|_hc$|hyper_connection")


@pytest.fixture(params=MOE_MODELS)
def model_type(request):
    return request.param


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


def test_on_the_meta_device():
    with torch.device("meta"):
        records = records_of(tiny("deepseek_v3"))
    assert [record.role for record in records] == ["dense", "shared_expert", "expert", "shared_expert", "expert"]
    assert records[2].weight_count == TOP_2


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
