import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from helpers.tiny_models import tiny
from pop_mm import ConfigError
from pop_mm.adapters import adapter_for
from pop_mm.methods.ratio import LayerWeights, ffn_ratios

# The paper's Table 8: public dimensions, and the FFN ratio in percent at 20 % and 40 % overall. Of experts, the
# intermediate size is that of a shared or dense FFN, which does not count.
_LLAMA = {"num_key_value_heads": 8, "vocab_size": 128256}
TABLE_8 = {
    "Llama-2-7B": ("llama", 4096, 11008, 32, {"vocab_size": 32000}, 29.9, 59.8),
    "Llama-2-13B": ("llama", 5120, 13824, 40, {"vocab_size": 32000}, 29.9, 59.8),
    "Llama-2-70B": ("llama", 8192, 28672, 64, {"num_key_value_heads": 8, "vocab_size": 32000}, 24.3, 48.6),
    "Llama-3.1-8B": ("llama", 4096, 14336, 32, _LLAMA, 24.8, 49.5),
    "Llama-3.1-70B": ("llama", 8192, 28672, 64, _LLAMA, 24.3, 48.6),
    "Qwen3-8B": ("qwen3", 4096, 12288, 32, {"num_key_value_heads": 8, "head_dim": 128}, 25.6, 51.1),
    "Qwen3-32B": ("qwen3", 5120, 25600, 64, {"num_key_value_heads": 8, "head_dim": 128}, 24.8, 49.6),
    "Qwen1.5-MoE-A2.7B": (
        "qwen2_moe",
        2048,
        5632,
        16,
        {
            "num_key_value_heads": 16,
            "num_experts": 60,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 1408,
            "shared_expert_intermediate_size": 5632,
        },
        29.7,
        59.4,
    ),
    "Qwen2-57B-A14B": (
        "qwen2_moe",
        3584,
        18944,
        28,
        {
            "num_key_value_heads": 4,
            "num_experts": 64,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 2560,
            "shared_expert_intermediate_size": 20480,
        },
        22.7,
        45.3,
    ),
    "Qwen3-30B-A3B": (
        "qwen3_moe",
        2048,
        6144,
        32,
        {
            "num_key_value_heads": 4,
            "head_dim": 128,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
        },
        30.0,
        60.0,
    ),
}


def weights(model):
    adapter = adapter_for(model)
    return adapter.layer_weights(model, adapter.projections(model))


def overall(ratios, layers):
    """Share of all attention and FFN weights that these FFN ratios leave out."""
    total = sum(w.attention + w.ffn for w in layers.values())
    return sum(ratios[layer] * w.ffn for layer, w in layers.items()) / total


@pytest.mark.parametrize("name", TABLE_8)
def test_table_8_of_the_paper(name):
    model_type, hidden, intermediate, heads, settings, at_20, at_40 = TABLE_8[name]
    config = AutoConfig.for_model(
        model_type,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_attention_heads=heads,
        num_hidden_layers=2,  # all layers of these models are alike, so the ratio does not depend on their number
        **settings,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    layers = weights(model)
    for ratio, percent in ((0.2, at_20), (0.4, at_40)):
        for found in ffn_ratios(ratio, "overall", layers, {}).values():
            assert abs(100 * found - percent) < 0.1


# hidden 32, FFN 64: what q, k, v, o (or the fused ones) and the FFN's matrices hold, without biases and norms
@pytest.mark.parametrize(
    ("model_type", "attention", "ffn"),
    [
        ("llama", 32 * 32 + 2 * 16 * 32 + 32 * 32, 3 * 64 * 32),  # biased, 4 query and 2 key-value heads of size 8
        ("qwen3", 32 * 32 + 2 * 16 * 32 + 32 * 32, 3 * 64 * 32),  # with norms of queries and keys
        ("cohere", 32 * 32 + 2 * 16 * 32 + 32 * 32, 3 * 64 * 32),  # whose weights are matrices: [heads, head_dim]
        ("phi3", (32 + 2 * 16) * 32 + 32 * 32, 3 * 64 * 32),  # fused
        ("falcon", (32 + 2 * 16) * 32 + 32 * 32, 2 * 64 * 32),  # fused, ungated
        ("gpt2", 3 * 32 * 32 + 32 * 32, 2 * 64 * 32),  # fused, Conv1D, ungated
        ("opt", 4 * 32 * 32, 2 * 64 * 32),  # FFN on the layer itself
    ],
)
def test_what_counts_as_attention_and_ffn(model_type, attention, ffn):
    layers = weights(tiny(model_type))
    assert layers == {0: LayerWeights(attention, ffn), 1: LayerWeights(attention, ffn)}


def test_a_wrapped_projection_counts_as_what_it_wraps():
    class Wrapped(nn.Module):
        """Like a LoRA layer: declares the features of the linear module that it holds, beside other matrices."""

        def __init__(self, base):
            super().__init__()
            self.base_layer, self.in_features, self.out_features = base, base.in_features, base.out_features
            self.lora_A = nn.Linear(base.in_features, 4, bias=False)
            self.weight = base.weight

    model = tiny("llama")
    before = weights(model)
    for layer in model.model.layers:
        layer.mlp.down_proj = Wrapped(layer.mlp.down_proj)
        layer.self_attn.q_proj = Wrapped(layer.self_attn.q_proj)
    assert weights(model) == before


LAYERS = {0: LayerWeights(10, 60), 1: LayerWeights(40, 60), 2: LayerWeights(50, 80)}


def test_without_overrides_it_is_the_papers_formula():
    expected = 0.4 * 300 / 200
    assert ffn_ratios(0.4, "overall", LAYERS, {}) == pytest.approx({0: expected, 1: expected, 2: expected})


@pytest.mark.parametrize("overrides", [{0: 0.0}, {0: 0.0, 2: 0.5}, {1: 0.9}])
def test_overrides_keep_the_overall_ratio(overrides):
    ratios = ffn_ratios(0.2, "overall", LAYERS, overrides)
    assert overall(ratios, LAYERS) == pytest.approx(0.2)
    assert {layer: ratios[layer] for layer in overrides} == overrides
    assert len({ratio for layer, ratio in ratios.items() if layer not in overrides}) == 1


def test_scope_ffn_takes_the_ratio_as_it_is():
    assert ffn_ratios(0.9, "ffn", LAYERS, {1: 0.1}) == {0: 0.9, 1: 0.1, 2: 0.9}


def test_zero_stays_zero():
    assert ffn_ratios(0.0, "overall", LAYERS, {}) == {0: 0.0, 1: 0.0, 2: 0.0}


@settings(derandomize=True, deadline=None)
@given(
    st.dictionaries(
        st.integers(0, 9), st.builds(LayerWeights, st.integers(1, 10**6), st.integers(1, 10**6)), min_size=1
    ),
    st.floats(0, 0.99),
    st.booleans(),
)
def test_the_named_largest_ratio_is_right(layers, fixed, override):
    overrides = {min(layers): fixed} if override and len(layers) > 1 else {}
    free = sum(w.ffn for layer, w in layers.items() if layer not in overrides)
    total = sum(w.attention + w.ffn for w in layers.values())
    largest = (free + sum(r * layers[layer].ffn for layer, r in overrides.items())) / total
    with pytest.raises(ConfigError, match=r"must stay below [0-9.]+ for this model") as error:
        ffn_ratios(max(largest, 1e-9) + 1e-6, "overall", layers, overrides)
    named = float(re.search(r"below ([0-9.]+)", str(error.value)).group(1))
    assert largest - 0.001 <= named <= largest + 1e-9
    below = named - 1e-6
    if below > fixed and below > 0:  # a ratio below the overrides' own share is another error
        ratios = ffn_ratios(below, "overall", layers, overrides)
        assert all(0 <= ratio < 1 for ratio in ratios.values())
        assert overall(ratios, layers) == pytest.approx(below)


def test_too_large_a_ratio_says_what_to_do():
    with pytest.raises(ConfigError, match=r"0\.7 needs 105\.0% of every FFN.*stay below 0\.666 .*scope='ffn'"):
        ffn_ratios(0.7, "overall", LAYERS, {})


def test_overrides_beyond_the_ratio():
    with pytest.raises(ConfigError, match=r"layer_ratios alone leave out 24\.0%, more than .* 0\.1"):
        ffn_ratios(0.1, "overall", LAYERS, {2: 0.9})


@pytest.mark.parametrize("scope", ["overall", "ffn"])
def test_unknown_layers(scope):
    with pytest.raises(ConfigError, match=r"layer_ratios names layers \[7, 9\]; .* prunable FFN: 0 to 2"):
        ffn_ratios(0.2, scope, LAYERS, {9: 0.1, 1: 0.1, 7: 0.1})


def test_a_layer_without_ffn_cannot_be_overridden_but_counts():
    layers = {**LAYERS, 1: LayerWeights(40, 0)}
    with pytest.raises(ConfigError, match=r"names layers \[1\]; layers with a prunable FFN: 0, 2"):
        ffn_ratios(0.2, "overall", layers, {1: 0.1})
    assert overall(ffn_ratios(0.2, "overall", layers, {0: 0.1}), layers) == pytest.approx(0.2)


# layer 1 has no FFN; 0.1 of 60 and 0.3 of 80 weights are 0.125 of all 240
ALL = ({**LAYERS, 1: LayerWeights(40, 0)}, {0: 0.1, 2: 0.3})


@pytest.mark.parametrize("ratio", [0.125, 0.1254])
def test_overrides_of_every_ffn_may_give_the_overall_ratio_themselves(ratio):
    layers, overrides = ALL
    assert {layer: ffn_ratios(ratio, "overall", layers, overrides)[layer] for layer in overrides} == overrides


@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.15, 0.9])
def test_overrides_of_every_ffn_that_give_another_overall_ratio_are_refused(ratio):
    with pytest.raises(ConfigError, match=rf"every FFN.* 12\.5% .* {ratio:g}.*ratio=0\.125.*scope='ffn'"):
        ffn_ratios(ratio, "overall", *ALL)
    assert {layer: ffn_ratios(ratio, "ffn", *ALL)[layer] for layer in ALL[1]} == ALL[1]


def test_overrides_that_give_the_overall_ratio_leave_nothing_to_the_others():
    ratios = ffn_ratios(60 * 0.21 / 300, "overall", LAYERS, {0: 0.21})  # in floats, a little less than the 0.21
    assert ratios == pytest.approx({0: 0.21, 1: 0.0, 2: 0.0}, abs=1e-12)
    assert min(ratios.values()) >= 0
