"""Attention modules that share an input: what the adapters name, over every model type."""

import pytest
import torch

from helpers.observe import prompt
from helpers.tiny_models import DENSE_MODELS, MOE_MODELS
from helpers.tiny_vlms import VLM_MODELS, image_inputs, tiny_vlm
from pop_mm.adapters import Adapter, FFNPaths, InputPaths, adapter_for
from pop_mm.weights.groups import linear_features

# model types of which some attention stays dense, and the share of its weights that is named
PARTLY = {
    **dict.fromkeys(("minicpm3", "youtu", "deepseek_v2", "deepseek_v3", "glm4_moe_lite", "mistral4", "axk1"), 0.53),
    **{
        "deepseek_v32": 0.47,
        "glm_moe_dsa": 0.47,
        "dots3_note_text": 0.46,
        "hy_v4": 0.37,
        "axk2": 0.33,
    },  # and an indexer
    **{"deepseek_v4": 0.07, "kimi_linear": 0.75, "bailing_hybrid": 0.66, "minimax": 0.88},
    **{
        "lfm2": 0.42,
        "lfm2_moe": 0.27,
        "jamba": 0.17,
        "granitemoehybrid": 0.30,
        "nemotron_h": 0.41,
    },  # Mamba, convolutions
    **{"qwen3_next": 0.31, "qwen3_5_moe_text": 0.47, "qwen4_exp_text": 0.21},  # linear attention
    **{"beam": 0.75, "afmoe": 0.75, "laguna": 0.96, "doge": 0.99},  # gates
}


def inputs_of(groups, run):
    """Group -> what its modules were given, in one forward."""
    seen = {group: [] for group in groups}
    handles = [
        module.register_forward_pre_hook(lambda _, args, group=group: seen[group].append(args[0]))
        for group in groups
        for module in group.modules
    ]
    with torch.no_grad():
        run()
    for handle in handles:
        handle.remove()
    return seen


def check(groups, run, tokens):
    for group, given in inputs_of(groups, run).items():
        assert len(given) == len(group.modules), f"{group.name} was not called, or twice"
        assert all(torch.equal(one, given[0]) for one in given), group.name
        assert given[0].shape[-1] == group.size and given[0].numel() == tokens * group.size
        assert group.weight_count == sum(p.weight.numel() for p in group.modules)


@pytest.mark.parametrize("model_type", [*DENSE_MODELS, *MOE_MODELS])
def test_modules_of_a_group_are_given_the_same(load, model_type):
    model = load(model_type)
    adapter = adapter_for(model)
    groups = adapter.input_groups(model)
    check(groups, lambda: model(prompt(2, 5)), 10)
    attention = sum(w.attention for w in adapter.layer_weights(model, adapter.projections(model)).values())
    named = sum(group.weight_count for group in groups) / attention
    assert named == pytest.approx(PARTLY.get(model_type, 1), abs=0.006)
    assert len({module for group in groups for module in group.modules}) == sum(len(group.modules) for group in groups)


@pytest.mark.parametrize("model_type", VLM_MODELS)
def test_of_a_vision_language_model_only_the_tower(model_type):
    model = tiny_vlm(model_type, torch.float32)
    adapter = adapter_for(model)
    groups = adapter.input_groups(model)
    tower = adapter.find_tower(model)[0]
    assert groups and all(group.name.startswith(tower) for group in groups)
    inputs = image_inputs(model_type, model, images=[1])
    check(groups, lambda: model(**inputs), inputs["input_ids"].numel())


def test_an_own_adapter_names_its_own(load):
    class Mine(Adapter):
        ffns = (FFNPaths(),)
        inputs = (InputPaths("attention_in", ("self_attn",), ("q_proj",)),)

    names = [group.name for group in Mine().input_groups(load("llama"))]
    assert names == [f"model.layers.{layer}.self_attn.q_proj" for layer in range(2)]


def test_a_class_that_is_only_named_conv1d_is_no_linear_module():
    class Conv1D(torch.nn.Module):
        weight = torch.zeros(3, 4)

    assert linear_features(Conv1D()) is None
