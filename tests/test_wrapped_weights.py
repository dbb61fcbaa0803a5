"""Weights that are not plain tensors: adapters, packed, parametrised and offloaded ones give what their plain twins give."""

import copy
from contextlib import nullcontext

import pytest
import torch
import torch.nn.utils.parametrize as parametrize
import torch.nn.utils.prune as torch_prune
from torch import nn

import pop_mm
from helpers.compatibility import (
    ADAPTERS,
    PAGE,
    PROJECTIONS,
    REFUSED_ADAPTERS,
    TORCH,
    TORCHAO,
    page,
    peft_model,
    randomise,
)
from helpers.modes import fresh, generate, pruned
from helpers.observe import prompt, same_afterwards
from helpers.tiny_models import tiny
from helpers.wrapped import FEW_WAYS, WAYS, check, check_packed, choice_of_first_layer
from pop_mm import AdapterError, prune
from pop_mm.formats.asking import asking

WITHOUT_BIASES = [
    row for row in ADAPTERS if row.name not in ("LoRA with biases", "BEFT")
]  # which the FFNs of the mixture lack
COMMON = ("LoRA", "rsLoRA", "DoRA", "AdaLoRA", "IA3", "VeRA", "LoHa", "LoKr", "OFT", "BOFT")  # run in every way


def cases(rows):
    """Every wrapper on all projections and on one of them in turn; the common ones on each alone."""
    choices = {PROJECTIONS: "all"} | {(name,): name for name in PROJECTIONS}
    for place, row in enumerate(rows):
        in_turn = (PROJECTIONS, (PROJECTIONS[place % len(PROJECTIONS)],))
        for projections in choices if row.name in COMMON else in_turn:
            yield pytest.param(row, projections, id=f"{row.name}-{choices[projections]}")


def every(name):
    return True


def dense(name):
    return "experts" not in name


def small(model_type, dtype):
    model = tiny(model_type, dtype or torch.float64)
    generate(model, prompt(), 2)
    return model


# --- adapters -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("row", "projections"), cases(ADAPTERS))
def test_an_adapter_gives_what_the_merged_model_gives(row, projections):
    original = small("llama", row.options["dtype"])
    wrapped = row.make(copy.deepcopy(original), projections)
    twin = row.twin(wrapped)
    if (row.name, projections) != ("BEFT", ("down_proj",)):  # the bias behind the last product
        assert choice_of_first_layer(twin) != choice_of_first_layer(original)
    ways = WAYS if projections == PROJECTIONS and row.name in COMMON else FEW_WAYS
    check(wrapped.get_base_model(), twin, every, row.options["tolerance"], ways)


@pytest.mark.parametrize("row", WITHOUT_BIASES, ids=lambda row: row.name)
def test_an_adapter_in_a_mixture_gives_what_the_merged_model_gives(row):
    wrapped = row.make(small("qwen2_moe", row.options["dtype"]))
    ways = WAYS if row.name in COMMON else FEW_WAYS[:1]
    check(wrapped.get_base_model(), row.twin(wrapped), dense, row.options["tolerance"], ways)


@pytest.mark.parametrize("state", ["merged", "disabled", "one of two", "two at once", "two at once, merged"])
def test_the_adapters_that_are_active_count(state):
    wrapped = peft_model("LoraConfig", r=4)(small("llama", None))
    import peft

    wrapped.add_adapter("other", peft.LoraConfig(r=2, target_modules=["down_proj"]))
    if "two" in state:
        wrapped.base_model.set_adapter(["default", "other"] if "at once" in state else ["other"])
    randomise(wrapped, seed=1)
    twin = copy.deepcopy(wrapped).merge_and_unload().eval()
    if "merged" in state:
        wrapped.merge_adapter()
    if state == "disabled":
        wrapped.disable_adapter_layers()
        twin = fresh()
    check(wrapped.get_base_model(), twin, dense, ways=FEW_WAYS)


def test_an_adapter_that_was_added_in_training_mode_is_asked_without_dropout_and_stays_as_it_was():
    import peft

    model = peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["down_proj"], lora_dropout=0.5), fresh())
    randomise(model)
    dropout = model.model.layers[0].mlp.down_proj.lora_dropout["default"]
    assert dropout.training
    norms = prune(model, ratio=0.4, scope="ffn").plans[0].ffn.down_column_norms()
    assert dropout.training
    module = model.model.layers[0].mlp.down_proj
    expected = module.base_layer.weight + module.get_delta_weight("default")
    torch.testing.assert_close(norms, expected.norm(dim=0), rtol=1e-9, atol=0)


@pytest.mark.parametrize("kind", ["LoRA", "int8"])
def test_what_a_module_tells_is_what_it_answers_and_is_not_believed_if_not(kind, monkeypatch):
    if kind == "LoRA":
        model = peft_model("LoraConfig", r=4)(fresh()).get_base_model()
        from peft.tuners.lora.layer import Linear as Told
    else:
        model = TORCHAO[0].make(tiny("llama", hidden_size=64, intermediate_size=128, head_dim=16))
        Told = type(model.model.layers[0].mlp.down_proj.weight)
    ffn = prune(model, ratio=0.4, scope="ffn").plans[0].ffn
    with monkeypatch.context() as patch:
        patch.setattr("pop_mm.weights.layout.columns", None)  # it is not asked
        told = [ffn.down_column_norms(), ffn.input_norms()]
    name = "get_delta_weight" if kind == "LoRA" else "dequantize"
    right = getattr(Told, name)
    monkeypatch.setattr(Told, name, lambda *args, **kwargs: right(*args, **kwargs) * 1.5)
    for norms, asked in zip(told, [ffn.down_column_norms(), ffn.input_norms()], strict=True):
        torch.testing.assert_close(norms, asked, rtol=1e-5, atol=0)


def test_gate_and_up_norms_are_those_of_what_the_modules_compute():
    wrapped = peft_model("LoraConfig", r=4)(fresh())
    ffn = prune(wrapped.get_base_model(), ratio=0.4, scope="ffn").plans[1].ffn
    mlp = wrapped.merge_and_unload().model.layers[1].mlp
    expected = torch.hypot(mlp.gate_proj.weight.norm(dim=1), mlp.up_proj.weight.norm(dim=1))
    torch.testing.assert_close(ffn.input_norms(), expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("model_type", ["phi3", "gpt2", "falcon", "opt"])
def test_adapters_on_other_layouts(model_type):
    import peft

    targets = {"phi3": ["gate_up_proj", "down_proj"], "gpt2": ["mlp.c_fc", "mlp.c_proj"], "opt": ["fc1", "fc2"]}
    targets = targets.get(model_type, ["dense_h_to_4h", "dense_4h_to_h"])
    wrapped = peft.get_peft_model(small(model_type, None), peft.LoraConfig(r=4, target_modules=targets)).eval()
    randomise(wrapped)
    twin = copy.deepcopy(wrapped).merge_and_unload().eval()
    check(wrapped.get_base_model(), twin, every, ways=FEW_WAYS)
    before = prune(wrapped.get_base_model(), ratio=0.4, scope="ffn").plans[0].ffn.input_norms()
    torch.testing.assert_close(before, prune(twin, ratio=0.4, scope="ffn").plans[0].ffn.input_norms())


def test_weights_loaded_into_an_adapter_in_a_session_count():
    wrapped = peft_model("LoraConfig", r=4)(fresh())
    other = peft_model("LoraConfig", r=4)(fresh(seed=5))
    randomise(other, seed=7)
    twin = copy.deepcopy(other).merge_and_unload().eval()
    with pruned(twin):
        wanted = generate(twin, prompt())[1]
    model = wrapped.get_base_model()
    with pruned(model, "auto"):
        generate(model, prompt())
        model.load_state_dict(other.get_base_model().state_dict())
        torch.testing.assert_close(generate(model, prompt())[1], wanted, rtol=0, atol=1e-9)
    assert not asking()


def test_what_is_not_linear_is_refused_before_anything_changes():
    row = REFUSED_ADAPTERS[0]
    model = row.make(small("llama", None)).get_base_model()
    with same_afterwards(model), pytest.raises(AdapterError, match=row.options["match"]):
        pruned(model).attach()
    with same_afterwards(model), pruned(model, scorer="activation") as session:
        generate(model, prompt())
    assert {plan.backend for plan in session.plans} == {"masked"}


@pytest.mark.parametrize("settings", [{"ratio": 0.4, "scope": "ffn"}, {"budget": 0.6}])
def test_weights_that_hang_on_the_task_of_a_call_are_refused_before_anything_changes(settings):
    import peft

    config = peft.PolyConfig(target_modules=["down_proj"], n_tasks=2, n_skills=2, task_type="CAUSAL_LM")
    wrapped = peft.get_peft_model(small("llama", None), config).eval()
    with same_afterwards(wrapped.get_base_model()), pytest.raises(AdapterError, match="does not tell its weights"):
        prune(wrapped, **settings).attach()


def test_x_lora_is_refused_before_anything_changes():
    from peft.tuners.xlora.layer import XLoraLayer

    class Scaled(XLoraLayer):
        def __init__(self, target):
            self.target = target

        def forward(self, x, *args, **kwargs):
            return type(self.target).forward(self.target, x) * x.sum(-1, keepdim=True).sigmoid()

    model = peft_model("LoraConfig", r=4)(small("llama", None)).get_base_model()
    for layer in model.model.layers:
        layer.mlp.down_proj.forward = Scaled(layer.mlp.down_proj).forward
    with same_afterwards(model), pytest.raises(AdapterError, match="not linear"):
        pruned(model).attach()


def test_adapters_of_routed_experts_are_refused_before_anything_changes():
    import peft

    config = peft.LoraConfig(target_modules=[], target_parameters=["experts.gate_up_proj", "experts.down_proj"])
    model = peft.get_peft_model(small("mixtral", None), config).eval().get_base_model()
    with same_afterwards(model), pytest.raises(AdapterError, match=REFUSED_ADAPTERS[-1].options["match"]):
        pruned(model)


# --- packed weights -------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("projections", [("gate_proj",), ("down_proj",), PROJECTIONS], ids=["gate", "down", "all"])
@pytest.mark.parametrize("row", [*TORCH, *TORCHAO], ids=lambda row: row.name)
def test_packed_weights_give_what_plain_ones_give(row, projections):
    check_packed(row, projections)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("row", [row for row in (*TORCH, *TORCHAO) if row.options["exact"]], ids=lambda row: row.name)
def test_packed_weights_in_a_mixture_give_what_plain_ones_give(row):
    """Those of its dense FFN and of its shared experts; routed ones are packed in formats of their own."""
    sizes = {"hidden_size": 64, "head_dim": 16, "intermediate_size": 128, "shared_expert_intermediate_size": 96}
    model = row.make(tiny("qwen2_moe", **sizes))
    twin = row.twin(model, tiny("qwen2_moe", **sizes))
    generate(model, prompt(), 2)  # what a format sets up on first use is no change
    check(model, twin, lambda name: row.outcome == "masked" and "experts" not in name, 2e-5)


def test_pruned_biases_run_masked():
    model = fresh()
    for layer in model.model.layers:
        torch_prune.l1_unstructured(layer.mlp.up_proj, "bias", amount=0.5)
    generate(model, prompt(), 2)
    twin = fresh()
    for layer, other in zip(twin.model.layers, model.model.layers, strict=True):
        layer.mlp.up_proj.bias.data = other.mlp.up_proj.bias.detach().clone()
    check(model, twin, every, ways=FEW_WAYS)


def test_a_class_that_is_only_named_linear_is_not_plain():
    class Linear(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.weight, self.bias = base.weight, base.bias

        def forward(self, x):
            return 2 * nn.functional.linear(x, self.weight, self.bias)

    model, twin = fresh(), fresh()
    for layer, other in zip(model.model.layers, twin.model.layers, strict=True):
        layer.mlp.down_proj = Linear(layer.mlp.down_proj)
        other.mlp.down_proj.weight.data *= 2
        other.mlp.down_proj.bias.data *= 2
    check(model, twin, every, ways=FEW_WAYS)


def test_a_module_whose_forward_was_replaced_is_asked():
    model, twin = fresh(), fresh()
    for layer, other in zip(model.model.layers, twin.model.layers, strict=True):
        down = layer.mlp.down_proj
        scale = torch.linspace(0.1, 3, down.in_features, dtype=torch.float64)
        down.forward = lambda x, down=down, scale=scale: nn.functional.linear(x * scale, down.weight, down.bias)
        other.mlp.down_proj.weight.data *= scale
    check(model, twin, every, ways=FEW_WAYS)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "falcon"])
def test_plain_classes_are_still_in_place(model_type):
    assert {p.backend for p in prune(small(model_type, None), ratio=0.4, scope="ffn").plans} == {"inplace"}


def test_float8_linears_are_refused_in_a_sentence_where_they_cannot_run():
    from transformers.integrations.finegrained_fp8 import FP8Linear

    model = fresh()
    for layer in model.model.layers:
        layer.mlp.down_proj = FP8Linear(64, 32, block_size=(32, 32))
    with same_afterwards(model), pytest.raises(AdapterError, match="does not tell its weights"):
        pruned(model).attach()


def test_float8_linears_run_masked_where_their_kernel_runs(monkeypatch):
    from transformers.integrations.finegrained_fp8 import FP8Linear

    def scaled(module):
        scale = module.weight_scale_inv.repeat_interleave(32, 0).repeat_interleave(32, 1)
        return module.weight.to(torch.float32) * scale

    monkeypatch.setattr(FP8Linear, "forward", lambda self, x: nn.functional.linear(x, scaled(self).to(x.dtype)))
    model, twin = tiny("llama", mlp_bias=False), tiny("llama", mlp_bias=False)
    generator = torch.Generator().manual_seed(0)
    for layer, other in zip(model.model.layers, twin.model.layers, strict=True):
        packed = layer.mlp.down_proj = FP8Linear(64, 32, block_size=(32, 32)).eval()
        packed.weight.data = other.mlp.down_proj.weight.detach().to(packed.weight.dtype)
        packed.weight_scale_inv.data = torch.rand(packed.weight_scale_inv.shape, generator=generator) + 0.5
        other.mlp.down_proj.weight.data = scaled(packed)
    check(model, twin, every, 2e-5, FEW_WAYS)


def test_gguf_blocks_run_masked_where_their_kernel_runs(monkeypatch):
    from gguf import GGMLQuantizationType, quants
    from transformers.integrations.gguf.utils import GgufLinear

    kind = GGMLQuantizationType.Q8_0

    def unpacked(module):
        return torch.from_numpy(quants.dequantize(module.weight.numpy(), kind))

    monkeypatch.setattr(GgufLinear, "forward", lambda self, x: x @ unpacked(self).T)
    model, twin = tiny("llama", mlp_bias=False), tiny("llama", mlp_bias=False)
    for layer, other in zip(model.model.layers, twin.model.layers, strict=True):
        for name in PROJECTIONS:
            plain = getattr(other.mlp, name)
            packed = GgufLinear(plain.in_features, plain.out_features, int(kind)).eval()
            packed.weight.data = torch.from_numpy(quants.quantize(plain.weight.detach().numpy(), kind))
            plain.weight.data = unpacked(packed)
            setattr(layer.mlp, name, packed)
    check(model, twin, every, 2e-5, FEW_WAYS)


def test_float8_experts_are_refused():
    model = small("mixtral", None)
    experts = model.model.layers[0].mlp.experts
    experts.down_proj = nn.Parameter(experts.down_proj.detach().to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(AdapterError, match=r"down_proj is torch\.float8_e4m3fn.*Load the model without quantisation"):
        pruned(model)


@pytest.mark.parametrize("unseen", ["dense", "weights"])
def test_parametrised_experts_run_masked(unseen):
    class Doubled(nn.Module):
        def forward(self, weight):
            return 2 * weight

    model, twin = small("mixtral", None), small("mixtral", None)
    for layer, other in zip(model.model.layers, twin.model.layers, strict=True):
        for name in "gate_up_proj", "down_proj":
            parametrize.register_parametrization(layer.mlp.experts, name, Doubled())
            getattr(other.mlp.experts, name).data *= 2
    with pruned(twin, unseen=unseen):
        wanted = generate(twin, prompt())[1]
    for backend in "auto", "masked":
        with same_afterwards(model), pruned(model, backend, unseen=unseen) as session:
            torch.testing.assert_close(generate(model, prompt())[1], wanted, rtol=0, atol=1e-9)
        assert {plan.backend for plan in session.plans} == {"masked"}


# --- offloaded weights ----------------------------------------------------------------------------------------------


def _cpu_offload(model, folder):
    from accelerate import cpu_offload

    return cpu_offload(model, execution_device=torch.device("cpu"))


def _disk_offload(model, folder):
    from accelerate import disk_offload

    return disk_offload(model, folder, execution_device=torch.device("cpu"))


def _device_map(model, folder):
    from accelerate import dispatch_model

    places = {name: "disk" if name.startswith("model.layers.0") else "cpu" for name in _blocks(model)}
    return dispatch_model(model, places, offload_dir=folder, main_device="cpu", force_hooks=True)


def _blocks(model):
    return [*(f"model.{name}" for name, _ in model.model.named_children() if name != "layers"), "lm_head"] + [
        f"model.layers.{i}" for i in range(len(model.model.layers))
    ]


def _with_hook(model, folder):
    from accelerate import cpu_offload_with_hook

    return cpu_offload_with_hook(model, execution_device="cpu")[0]


OFFLOADS = {"cpu": _cpu_offload, "disk": _disk_offload, "device map": _device_map, "hook": _with_hook}


@pytest.mark.parametrize("scorer", ["wanda", "activation"])
@pytest.mark.parametrize("model_type", ["llama", "qwen2_moe"])
@pytest.mark.parametrize("kind", OFFLOADS)
def test_offloaded_models_give_what_loaded_ones_give(kind, model_type, scorer, tmp_path):
    twin = small(model_type, None)
    model = OFFLOADS[kind](small(model_type, None), str(tmp_path))
    with pruned(twin, scorer=scorer):
        wanted = generate(twin, prompt())[1]
    for backend in "auto", "masked":
        with (
            same_afterwards(model) if kind == "hook" else nullcontext(),
            pruned(model, backend, scorer=scorer) as session,
        ):
            torch.testing.assert_close(generate(model, prompt())[1], wanted, rtol=0, atol=1e-9)
        offloaded = {plan.ffn.layer for plan in session.plans if plan.backend == "masked"}
        if kind == "hook" and backend == "auto":
            assert {plan.backend for plan in session.plans} == {"inplace"}
        assert offloaded >= {"cpu": {0, 1}, "disk": {0, 1}, "device map": {0}, "hook": set()}[kind]
    torch.testing.assert_close(generate(model, prompt())[1], generate(twin, prompt())[1], rtol=0, atol=1e-9)


@pytest.mark.parametrize("model_type", ["llama", "qwen2_moe"])
@pytest.mark.parametrize("settings", [{"ratio": 0.4, "scope": "ffn"}, {"budget": 0.6}])
def test_weights_on_disk_stay_there_bit_for_bit(settings, model_type, tmp_path):
    model = _disk_offload(small(model_type, None), str(tmp_path))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    expected = generate(model, prompt())
    assert len(before) > 10 and all(p.device.type == "meta" for p in model.parameters())
    with prune(model, **settings):
        found = generate(model, prompt())
        generate(model, prompt(1, 12, seed=5))
    assert not torch.equal(found[1], expected[1])
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert all(p.device.type == "meta" for p in model.parameters())
    assert torch.equal(generate(model, prompt())[1], expected[1])


def behind(model):
    """Of a model that accelerate offloads to memory: the tensors that its hooks load, and what stands in their places."""
    found = {}
    for name, module in model.named_modules():
        parameters = {key: tensor.device.type for key, tensor in module._parameters.items() if tensor is not None}
        calls = [id(module.__dict__.get(key)) for key in ("forward", "_old_forward", "_hf_hook")]
        found[name] = parameters, calls, list(module._forward_hooks), list(module._forward_pre_hooks)
        weights = getattr(getattr(module, "_hf_hook", None), "weights_map", None)
        for key in parameters if weights is not None else ():
            found[name, key] = weights[key].stride(), weights[key].numpy().tobytes()
    return found


@pytest.mark.parametrize("model_type", ["llama", "qwen2_moe"])
@pytest.mark.parametrize("kind", ["cpu", "device map"])
@pytest.mark.parametrize("settings", [{"ratio": 0.4, "scope": "ffn"}, {"budget": 0.6}])
def test_weights_offloaded_to_memory_stay_what_they_are(settings, kind, model_type, tmp_path):
    model = OFFLOADS[kind](small(model_type, None), str(tmp_path))
    generate(model, prompt(), 2)
    before = behind(model)
    assert sum(isinstance(key, tuple) for key in before) > 10
    with prune(model, **settings):
        generate(model, prompt())
        generate(model, prompt(1, 12, seed=5))
    after = behind(model)
    assert before.keys() == after.keys()
    assert [key for key, value in before.items() if after[key] != value] == []


def test_an_offloaded_adapter_gives_what_the_merged_model_gives(tmp_path):
    wrapped = peft_model("LoraConfig", r=4)(small("llama", None))
    twin = copy.deepcopy(wrapped).merge_and_unload().eval()
    model = _disk_offload(wrapped.get_base_model(), str(tmp_path))
    check(model, twin, every, ways=FEW_WAYS, unchanged=False)


def test_layerwise_casting_gives_what_cast_weights_give():
    from accelerate.big_modeling import attach_layerwise_casting_hooks

    model, twin = tiny("llama"), tiny("llama")
    for layer, other in zip(model.model.layers, twin.model.layers, strict=True):
        attach_layerwise_casting_hooks(layer.mlp, storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
        for parameter in other.mlp.parameters():
            parameter.data = parameter.data.to(torch.float8_e4m3fn).float()
    check(model, twin, every, 2e-5, FEW_WAYS)


def test_a_model_without_weights_is_still_refused():
    with torch.device("meta"):
        model = type(fresh())(fresh().config)
    with pytest.raises(pop_mm.SessionError, match="meta device"):
        pruned(model.eval()).attach()


# --- the list -------------------------------------------------------------------------------------------------------


def test_the_page_is_what_the_list_says():
    assert PAGE.read_text() == page(), "run python tests/helpers/compatibility.py"


def test_a_progress_bar_shows_once_asking_takes_long(monkeypatch):
    import io
    import time

    from pop_mm.formats.asking import with_progress

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    clock = iter(range(0, 100, 2))
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr("sys.stderr", Terminal())
    monkeypatch.setenv("TERM", "xterm")
    import sys

    assert list(with_progress(range(5), 5, "Reading column norms")) == [0, 1, 2, 3, 4]
    assert "Reading column norms" in sys.stderr.getvalue()
