import re
from functools import cache

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText, Blip2Config, Blip2ForConditionalGeneration

from helpers.channels import IDS, bits, compute, inputs, run, same_bits, swap_everything
from helpers.modes import in_turn
from helpers.observe import differences, fingerprint
from helpers.tiny_vlms import VLM_MODELS, image_inputs, tiny_vlm, video_inputs
from helpers.vlm_images import IMAGE
from pop_mm import AdapterError, prune
from pop_mm.adapters import (
    LlamaAdapter,
    LlavaAdapter,
    VisionLanguageAdapter,
    adapter_for,
    register_adapter,
    registered_adapters,
    support_table,
    unregister_adapter,
)
from pop_mm.methods.ratio import LayerWeights, ffn_ratios
from pop_mm.weights.experts import Experts

TEXT_MODELS = {"idefics2", "idefics3", "smolvlm", "emu3"}
FLAT = {"phi4_multimodal", "chameleon"}
SINGLE = {"emu3", "chameleon"}  # turn images into tokens, which another image may share
# layer, role and size of every FFN where they are not two dense ones of 64 channels
_EXPERTS = [(0, "expert", 24), (1, "expert", 24)]
_SHARED = [(layer, role, size) for layer in (0, 1) for role, size in (("shared_expert", 40), ("expert", 24))]
_DENSE_FIRST = [(0, "dense", 64), (1, "shared_expert", 48), (1, "expert", 24)]
STRUCTURES = {
    "qwen3_vl_moe": _EXPERTS,
    "qwen3_omni_moe_thinker": _EXPERTS,
    "qwen3_5_moe": _SHARED,
    "qwen4_exp": _SHARED,
    "glm4v_moe": _DENSE_FIRST,
    "kimi_k25": _DENSE_FIRST,
    "dots3_note": [(0, "dense", 64), (1, "shared_expert", 40), (1, "expert", 24)],
    "minimax_m3_vl": [(0, "dense", 48), (1, "shared_expert", 40), (1, "expert", 24)],
    "aria": [(layer, role, size) for layer in (0, 1) for role, size in (("shared_expert", 48), ("expert", 24))],
    "mllama": [(layer, "dense", 64) for layer in range(3)],
    "fuyu": [(0, "dense", 64), (1, "dense", 64)],
}
MIXERS = re.compile("attn|attention|conv|hyper_connection")
VIDEOS = (
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
    "qwen3_vl_moe",
    "qwen3_5",
    "qwen3_5_moe",
    "glm4v",
    "glm4v_moe",
    "kimi_k25",
)
VIDEOS += ("exaone4_5", "hyperclovax_vision_v2", "minimax_m3_vl", "dots3_note", "qwen4_exp", "cosmos3_omni", "glm46v")
SINGLE_IMAGES = ("qwen2_vl", "qwen2_5_vl", "llava", "llava_onevision", "gemma3", "idefics3", "mllama", "aria")
BACKENDS = ("masked", "inplace")
# one image; images of two sizes in a padded batch with a row of plain text; nothing but text
PROMPTS = {"image": dict(images=1), "batch": dict(images=[2, 0, 1], text_len=[5, 9, 6]), "text": dict(images=0)}


@cache
def _model(model_type, dtype):
    model = tiny_vlm(model_type, dtype)
    model.generate(**image_inputs(model_type, model), max_new_tokens=2)  # what a model sets up on first use
    return model


@pytest.fixture(params=VLM_MODELS)
def model_type(request):
    return request.param


@pytest.fixture
def double(model_type):
    return _model(model_type, torch.float64)


def tower_name(model_type):
    if model_type in FLAT:
        return "model.layers"
    return "model.text_model" if model_type in TEXT_MODELS else "model.language_model"


def records_of(model):
    return adapter_for(model).projections(model)


@torch.no_grad()
def logits(model, model_type):
    return model(**image_inputs(model_type, model, images=[1, 2])).logits


def generate(model, prompt, steps=4):
    out = model.generate(**prompt, max_new_tokens=steps, return_dict_in_generate=True, output_logits=True)
    return out.sequences, torch.stack(out.logits)


# --- the records ---------------------------------------------------------------------------------------------------


def test_every_registered_type_has_a_tiny_model():
    served = {name for name, cls in registered_adapters().items() if issubclass(cls, VisionLanguageAdapter)}
    assert served == set(VLM_MODELS)
    rows = {row["model_type"]: row for row in support_table()}
    assert all(rows[name]["kind"] == "vlm" for name in VLM_MODELS)
    assert rows["llava"]["layout"] == "as the text model in it"
    assert rows["qwen2_5_vl"]["layout"] == "gate_proj, up_proj, down_proj"
    assert rows["glm4v"]["layout"] == "gate_up_proj (fused), down_proj"


def test_every_ffn_of_the_language_tower_is_found_and_nothing_else(model_type, double):
    records, modules = records_of(double), dict(double.named_modules())
    tower = modules[tower_name(model_type)]
    expected = STRUCTURES.get(model_type, [(0, "dense", 64), (1, "dense", 64)])
    assert [(r.layer, r.role, r.size) for r in records] == expected
    inside = set(tower.modules())
    for record in records:
        assert record.name.startswith(f"{tower_name(model_type)}.") and record.hidden_size == 32
        assert modules[record.name] is (record.module if isinstance(record, Experts) else record.holder)
        assert inside.issuperset(record.modules)
        assert record.why_not_plain() is None
        for p in () if isinstance(record, Experts) else record.projections:
            assert modules[p.name] is p.module
    # in its layers, whatever multiplies by a matrix is attention, an FFN's, or a router's, and one of them only
    adapter = adapter_for(double)
    found = {module for record in records for module in record.modules}
    name, layers = adapter.layers(double)
    assert modules[name] is layers and len(layers) == double.config.get_text_config().num_hidden_layers
    weights = adapter.layer_weights(double, records)
    not_weights = adapter.text_adapter(double).not_weights
    for index, layer in enumerate(layers):
        attention = 0
        for path, module in layer.named_modules():
            matrices = [p for p in module.parameters(recurse=False) if p.dim() >= 2]
            if matrices and "norm" not in path:
                router = any(path == own or path.startswith(f"{own}.") for own in not_weights)
                assert (module in found) + bool(MIXERS.search(path)) + router == 1, path
                attention += bool(MIXERS.search(path)) * sum(p.numel() for p in matrices)
        own = [record for record in records if record.layer == index and record.role != "shared_expert"]
        assert weights[index] == LayerWeights(attention, sum(record.weight_count for record in own))


def test_masking_channels_equals_narrowing(model_type, double):
    records = [record for record in records_of(double) if not isinstance(record, Experts)]
    if not records:
        pytest.skip("experts only")
    dense = logits(double, model_type)

    def mask(half):
        return lambda _, args: (torch.cat([args[0][..., :half], torch.zeros_like(args[0][..., half:])], -1),)

    hooks = [r.down.module.register_forward_pre_hook(mask(r.size // 2)) for r in records]
    masked = logits(double, model_type)
    for hook in hooks:
        hook.remove()
    try:
        for record in records:
            for p in record.projections:
                p.module.forward = p.narrow(record.size // 2)
        narrow = logits(double, model_type)
    finally:
        for record in records:
            for p in record.projections:
                p.module.__dict__.pop("forward", None)
    assert (dense - masked).abs().max() > 0.1, "half of the channels hardly matter: the test sees nothing"
    torch.testing.assert_close(narrow, masked, rtol=0, atol=1e-6)


def test_swapping_channels_changes_nothing(model_type, double):
    dense, before = logits(double, model_type), bits(double)
    records = records_of(double)
    swap_everything(records)
    try:
        assert not same_bits(bits(double), before)
        torch.testing.assert_close(logits(double, model_type), dense, rtol=0, atol=1e-6)
        for record in records:
            if isinstance(record, Experts):
                x = inputs(record)
                torch.testing.assert_close(compute(record, 1, x, record.size), run(record, 1, x))
    finally:
        swap_everything(records)
    assert same_bits(bits(double), before)


def test_on_the_meta_device(model_type, double):
    with torch.device("meta"):
        model = tiny_vlm(model_type, torch.float64)
    shapes = [(r.name, r.role, r.size, r.weight_count) for r in records_of(model)]
    assert shapes == [(r.name, r.role, r.size, r.weight_count) for r in records_of(double)]


def test_the_model_without_its_head_and_the_language_tower_alone(model_type, double):
    whole = [record.modules for record in records_of(double)]
    base = double.model
    assert [record.modules for record in records_of(base)] == whole
    modules = dict(base.named_modules())
    assert all(record.name in modules for record in records_of(base))
    if model_type not in FLAT:
        tower = double.get_submodule(tower_name(model_type))
        assert [record.modules for record in records_of(tower)] == whole
        assert adapter_for(tower).modality_token_ids(tower) == {}


# --- placeholders --------------------------------------------------------------------------------------------------


def embeddings(model, model_type, prompt):
    """What the language tower takes, ``[B, S, H]``."""
    tower = model.get_submodule(tower_name(model_type))
    seen = []
    if model_type in FLAT:
        hook = tower[0].register_forward_pre_hook(lambda _, args, kw: seen.append(args[0]), with_kwargs=True)
    else:
        hook = tower.register_forward_pre_hook(lambda _, args, kw: seen.append(kw["inputs_embeds"]), with_kwargs=True)
    with torch.no_grad():
        model(**prompt)
    hook.remove()
    return seen[0]


def changed_by_images(model, model_type, prompt):
    """``[B, S]``: positions at which the language tower sees other pixels."""
    other = dict(prompt)
    for name in prompt:
        if prompt[name].is_floating_point() and "pixel" in name:
            other[name] = -0.7 * prompt[name] + 0.1 * (prompt[name] != 0)  # padding stays 0
    one, two = embeddings(model, model_type, prompt), embeddings(model, model_type, other)
    return (one - two).abs().amax(-1) > 1e-9


def test_the_named_token_stands_where_image_features_go(model_type, double):
    prompt = image_inputs(model_type, double, images=[1, 2])
    ids = adapter_for(double).modality_token_ids(double)
    if model_type == "mllama":
        assert ids == {}
        return
    assert ids["image"] == IMAGE and set(ids) <= {"image", "video"}
    changed = changed_by_images(double, model_type, prompt)
    placeholders = prompt["input_ids"] == ids["image"]
    assert not (changed & ~placeholders).any()
    # what separates rows of patches and images does not depend on them; of few image tokens some are the same
    assert changed.sum() > (0.25 if model_type in SINGLE else 0.6) * placeholders.sum()


@pytest.mark.parametrize("model_type", VIDEOS, indirect=True)
def test_the_named_token_stands_where_video_features_go(model_type, double):
    prompt = video_inputs(model_type, double, images=[1, 1])
    ids = adapter_for(double).modality_token_ids(double)
    assert ("video" in ids) != model_type.startswith("glm")
    placeholders = prompt["input_ids"] == ids.get("video", ids["image"])
    assert placeholders.any() and torch.equal(changed_by_images(double, model_type, prompt), placeholders)


def test_a_text_model_has_no_placeholders():
    assert LlamaAdapter().modality_token_ids(torch.nn.Linear(2, 2)) == {}


# --- sessions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model_type", "name"),
    [(one, name) for one in VLM_MODELS for name in PROMPTS if name == "batch" or one in SINGLE_IMAGES],
    indirect=["model_type"],
)
def test_both_backends_agree_and_leave_no_trace(model_type, double, name):
    prompt = image_inputs(model_type, double, **PROMPTS[name])
    before, inside = fingerprint(double), set(double.get_submodule(tower_name(model_type)).modules())
    beside = [p for module in double.modules() if module not in inside for p in module.parameters(recurse=False)]
    there = [(p.data_ptr(), p.detach().clone()) for p in beside]
    dense, found = generate(double, prompt), {}
    for backend in BACKENDS:
        with prune(double, ratio=0.3, scope="ffn", backend=backend) as session:
            found[backend] = generate(double, prompt)
            assert all(p.data_ptr() == at and torch.equal(p, own) for p, (at, own) in zip(beside, there, strict=True))
            assert {ffn.plan.backend for ffn in session.report.ffns} == {backend}
            check_partitions(session.report)
        after = fingerprint(double)
        assert [key for key in differences(before, after) if "rope_deltas" not in key] == []  # generate() sets them
    assert torch.equal(found["masked"][0], found["inplace"][0])
    torch.testing.assert_close(found["masked"][1], found["inplace"][1], rtol=0, atol=1e-5)
    assert torch.equal(found["masked"][1][0], dense[1][0]), "the prefill is dense"
    change = (found["masked"][1] - dense[1]).nan_to_num(0)  # Chameleon never says image tokens: -inf
    assert change.abs().max() > 0.01, "nothing was pruned: the test sees nothing"


def check_partitions(report):
    """R, C and P are disjoint and complete, and a decode step has exactly ``kept`` active channels."""
    for ffn in report.ffns:
        part, sizes = ffn.partition, ffn.plan.sizes
        every = torch.cat([part.retained, part.candidates, part.pruned], -1).sort(-1).values
        assert torch.equal(every, torch.arange(sizes.channels).expand_as(every))
        if ffn.active_per_step is not None and (ffn.experts is None or not sum(ffn.experts.dense_tokens)):
            assert ffn.active_per_step == sizes.kept


@pytest.mark.parametrize(
    ("model_type", "name"), in_turn(VLM_MODELS, SINGLE_IMAGES, ("text", "batch")), indirect=["model_type"]
)
def test_ratio_0_is_dense_bit_for_bit(model_type, double, name):
    prompt = image_inputs(model_type, double, **PROMPTS[name])
    dense = generate(double, prompt)
    with prune(double, ratio=0.0):
        found = generate(double, prompt)
    assert torch.equal(found[0], dense[0]) and torch.equal(found[1], dense[1])


# --- any text model in it ------------------------------------------------------------------------------------------

_NO_HEAD_DIM = {"head_dim": None}
WRAPPED = {
    "mistral": {},
    "qwen2": _NO_HEAD_DIM,
    "phi3": _NO_HEAD_DIM,
    "gemma": {},
    "gpt_neox": {},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 24},
}


@pytest.mark.parametrize("text", WRAPPED)
def test_llava_over_another_text_model(text):
    settings = {name: value for name, value in WRAPPED[text].items() if value is not None}
    model = tiny_vlm("llava", torch.float64, model_type=text, **settings)
    adapter = adapter_for(model)
    assert isinstance(adapter, LlavaAdapter)
    own = registered_adapters()[text]().projections(model.model.language_model)
    records = adapter.projections(model)
    assert [record.modules for record in records] == [record.modules for record in own]
    assert {record.layout for record in records} == {record.layout for record in own}
    assert all(record.name.startswith("model.language_model.layers.") for record in records)
    prompt = image_inputs("llava", model, images=[2, 0])
    found = []
    for backend in BACKENDS:
        with prune(model, ratio=0.3, scope="ffn", backend=backend):
            found.append(generate(model, prompt))
    assert torch.equal(found[0][0], found[1][0])


def test_an_unregistered_text_model_is_matched_by_structure():
    model = tiny_vlm("llava")
    expected = [record.name for record in records_of(model)]
    model.model.language_model.config.model_type = "brand_new"
    adapter = adapter_for(model)
    records = adapter.projections(model)
    assert [record.name for record in records] == expected
    assert adapter.layer_weights(model, records).keys() == {0, 1}


def test_a_text_model_that_cannot_be_pruned_says_why():
    model = tiny_vlm("llava", model_type="bitnet")
    with pytest.raises(
        AdapterError, match=r"'model\.language_model' of LlavaForConditionalGeneration .*BitNetModel: .*norm over all"
    ):
        records_of(model)
    model = tiny_vlm("llava")
    for layer in model.model.language_model.layers:
        layer.mlp = torch.nn.Identity()
    model.model.language_model.config.model_type = "brand_new"
    with pytest.raises(AdapterError, match=r"'model\.language_model' of Llava.*No adapter is registered .*'brand_new'"):
        records_of(model)


def test_without_a_language_tower():
    with pytest.raises(
        AdapterError, match=r"LlavaAdapter found no language tower at model\.language_model or .*in Linear"
    ):
        LlavaAdapter().projections(torch.nn.Linear(2, 2))


def test_an_unregistered_type_says_what_an_adapter_needs():
    model = tiny_vlm("llava")
    model.config.model_type = "brand_new"
    with pytest.raises(AdapterError, match=r"'brand_new'.*several towers.*VisionLanguageAdapter whose tower"):
        adapter_for(model)

    @register_adapter("brand_new")
    class Mine(VisionLanguageAdapter):
        tower = ("model.language_model",)
        placeholders = {"image": ("no_such_name", "image_token_index"), "video": ("no_such_name",)}

    try:
        assert len(records_of(model)) == 2
        assert adapter_for(model).modality_token_ids(model) == {"image": IMAGE}
    finally:
        unregister_adapter("brand_new")


# --- overall ratio -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["qwen2_vl", "qwen2_5_vl"])
@pytest.mark.parametrize(("ratio", "percent"), [(0.2, 22.9), (0.4, 45.8)])
def test_table_8_of_the_paper(model_type, ratio, percent):
    text = dict(
        hidden_size=3584, intermediate_size=18944, num_attention_heads=28, num_key_value_heads=4, num_hidden_layers=2
    )  # Qwen2-VL-7B and Qwen2.5-VL-7B, but for the number of layers, which are all alike
    config = AutoConfig.for_model(model_type, text_config=text, vision_config={"depth": 2})
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    adapter = adapter_for(model)
    layers = adapter.layer_weights(model, adapter.projections(model))
    found = ffn_ratios(ratio, "overall", layers, {})
    assert found.keys() == {0, 1}
    assert all(abs(100 * value - percent) < 0.1 for value in found.values())


def test_cross_attention_counts_as_attention():
    model = _model("mllama", torch.float64)
    adapter = adapter_for(model)
    found = adapter.layer_weights(model, adapter.projections(model))
    assert found == {layer: LayerWeights(2 * 32 * 32 + 2 * 16 * 32, 3 * 64 * 32) for layer in range(3)}


# --- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("ernie4_5_vl_moe", "cut out of the batch by a mask, so which position an activation belongs to is lost"),
        ("llama4", "every expert runs on every token"),
        ("gemma3n", "mean and deviation of all gate channels"),
        ("kosmos-2", "norm over all channels in front of the down projection"),
        ("kosmos-2.5", "norm over all channels in front of the down projection"),
        ("idefics", "in a list of layers of their own"),
        ("instructblip", r"Prune model\.language_model"),
        ("instructblipvideo", r"Prune model\.language_model"),
    ],
)
def test_refused_types_say_why(model_type, reason):
    model = torch.nn.Module()
    model.config = AutoConfig.for_model(model_type)
    with pytest.raises(AdapterError, match=f"does not prune Module: .*{reason}"):
        records_of(model)


def test_ernie_calls_experts_on_subsets_of_the_positions():
    text = dict(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=128,
        moe_intermediate_size=[24, 24],
        moe_num_experts=4,
        moe_k=2,
        mlp_layer_types=["sparse"],
        rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
    )
    vision = dict(depth=1, hidden_size=16, num_heads=2, patch_size=4, intermediate_size=32)
    config = AutoConfig.for_model("ernie4_5_vl_moe", text_config=text, vision_config=vision, image_token_id=IMAGE)
    model = AutoModelForImageTextToText.from_config(config).eval()
    rows = []
    for path, module in model.named_modules():
        if path.endswith(".experts"):
            module.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    ids = torch.tensor([[3, 4, IMAGE, IMAGE, IMAGE, IMAGE, 5, 6]])
    kinds = (ids == IMAGE).long()
    grid = torch.tensor([[1, 4, 4]])
    with torch.no_grad():
        model(
            input_ids=ids,
            mm_token_type_ids=kinds,
            moe_mm_token_type_ids=kinds,
            pixel_values=torch.randn(16, 48),
            image_grid_thw=grid,
        )
    assert rows == [4, 4]


def test_blip_2_is_pruned_by_its_language_model():
    text = dict(
        model_type="opt",
        vocab_size=128,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        ffn_dim=64,
        word_embed_proj_dim=32,
        eos_token_id=None,
    )
    vision = dict(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8
    )
    former = dict(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, encoder_hidden_size=16
    )
    config = Blip2Config(
        vision_config=vision, qformer_config=former, text_config=text, num_query_tokens=4, image_token_index=IMAGE
    )
    torch.manual_seed(0)
    model = Blip2ForConditionalGeneration(config).eval()
    with pytest.raises(AdapterError, match=r"past the forward of the whole\. Prune model\.language_model"):
        records_of(model)
    prompt = dict(input_ids=torch.tensor([[IMAGE] * 4 + IDS[0, :5].tolist()]), pixel_values=torch.randn(1, 3, 16, 16))
    forwards = []
    model.register_forward_pre_hook(lambda *_: forwards.append("whole"))
    with prune(model.language_model, ratio=0.3, scope="ffn", backend="inplace") as session:
        model.generate(**prompt, max_new_tokens=3)
    assert forwards == [] and session.report.ffns[0].plan.sizes.kept < 64
