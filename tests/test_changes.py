"""What changes in a model while a session lasts, or between two: followed exactly, or refused with what to do."""

import copy
import functools
import io
import pickle

import accelerate
import pytest
import torch
from torch import nn
from torch.nn.utils.prune import l1_unstructured
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, LlamaRMSNorm

from helpers.modes import BACKENDS, STEPS, backends, fresh, generate, pruned
from helpers.observe import partitions, prompt, same_afterwards, standing
from helpers.reference import down_projections
from helpers.tiny_models import tiny
from pop_mm import SessionError, prune

FAMILIES = ("llama", "mixtral")
families = pytest.mark.parametrize("family", FAMILIES)


SESSIONS = {
    "inplace": lambda model: pruned(model, "auto"),
    "compiled": lambda model: pruned(model, "auto", kernels="auto"),
    "rows": lambda model: prune(model, budget=0.6),
}


def random(shape, seed=3):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 0.3


def experts(model, layer):
    return model.model.layers[layer].mlp.experts


def replaced(path, name):
    """A change: another Parameter in the place of one."""

    def change(model):
        module = model.get_submodule(path)
        setattr(module, name, nn.Parameter(random(getattr(module, name).shape)))

    return change


def other_data(path, name):
    def change(model):
        parameter = getattr(model.get_submodule(path), name)
        parameter.data = random(parameter.shape)

    return change


def loaded(model, **settings):
    other = fresh(model.config.model_type, seed=7)
    model.load_state_dict(other.state_dict(), **settings)


def other_module(path):
    def change(model):
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, fresh(model.config.model_type, seed=7).get_submodule(path))

    return change


def other_activation(path):
    return lambda model: setattr(model.get_submodule(path), "act_fn", nn.GELU())


MLP, EXPERTS = "model.layers.1.mlp", "model.layers.1.mlp.experts"


class DoubledLinear(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def other_class(path):
    def change(model):
        model.get_submodule(path).__class__ = DoubledLinear

    return change


CHANGES = {
    ("llama", "gate"): replaced(f"{MLP}.gate_proj", "weight"),
    ("llama", "up"): replaced(f"{MLP}.up_proj", "weight"),
    ("llama", "down"): replaced(f"{MLP}.down_proj", "weight"),
    ("llama", "data of gate"): other_data(f"{MLP}.gate_proj", "weight"),
    ("llama", "data of down"): other_data(f"{MLP}.down_proj", "weight"),
    ("starcoder2", "bias"): replaced(f"{MLP}.c_fc", "bias"),
    ("starcoder2", "data of bias"): other_data(f"{MLP}.c_fc", "bias"),
    ("starcoder2", "bias of down"): replaced(f"{MLP}.c_proj", "bias"),
    ("llama", "activation"): other_activation(MLP),
    ("llama", "projection"): other_module(f"{MLP}.down_proj"),
    ("llama", "class of down"): other_class(f"{MLP}.down_proj"),
    ("llama", "mlp"): other_module(MLP),
    ("llama", "layer"): other_module("model.layers.1"),
    ("llama", "assigned"): lambda model: loaded(model, assign=True),
    ("llama", "dtype"): lambda model: model.float().double(),
    ("mixtral", "gate and up"): replaced(EXPERTS, "gate_up_proj"),
    ("mixtral", "down"): replaced(EXPERTS, "down_proj"),
    ("mixtral", "data of down"): other_data(EXPERTS, "down_proj"),
    ("mixtral", "activation"): other_activation(EXPERTS),
    ("mixtral", "experts"): other_module(EXPERTS),
    ("mixtral", "assigned"): lambda model: loaded(model, assign=True),
    ("mixtral", "dtype"): lambda model: model.float().double(),
    ("gpt_oss", "bias"): replaced(EXPERTS, "gate_up_proj_bias"),
}


def same_weights(model, other):
    for (name, a), (_, b) in zip(model.state_dict().items(), other.state_dict().items(), strict=True):
        assert torch.equal(a, b), name


@backends
@pytest.mark.parametrize(("family", "what"), CHANGES)
def test_a_change_inside_a_session_is_followed(family, what, backend):
    twin, model = fresh(family), fresh(family)
    CHANGES[family, what](twin)
    with pruned(twin) as other:
        expected = generate(twin, prompt())
    with pruned(model, backend) as session:
        before = generate(model, prompt(1, 12, seed=5))
        CHANGES[family, what](model)
        found = generate(model, prompt())
        assert partitions(session) == partitions(other)
        again = generate(model, prompt(1, 12, seed=5))
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1], rtol=0, atol=1e-9)
    assert not torch.allclose(again[1], before[1], rtol=0, atol=1e-9) or what == "dtype"
    same_weights(model, twin)


@backends
@pytest.mark.parametrize(("family", "what"), CHANGES)
def test_a_change_that_no_forward_followed_stays_when_the_session_ends(family, what, backend):
    twin, model = fresh(family), fresh(family)
    CHANGES[family, what](twin)
    with pruned(model, backend):
        generate(model, prompt(1, 12, seed=5))
        CHANGES[family, what](model)
    same_weights(model, twin)


@backends
@families
def test_a_weight_that_was_replaced_gets_its_own_order_back(family, backend):
    model = fresh(family)
    down = down_projections(model)[-1] if family == "llama" else experts(model, 1)
    name = "weight" if family == "llama" else "down_proj"
    own = getattr(down, name)
    bits = own.detach().clone()
    with pruned(model, backend):
        expected = generate(model, prompt(1, 12, seed=5))[1]
        setattr(down, name, nn.Parameter(random(own.shape)))
        generate(model, prompt())
        assert torch.equal(own, bits)
        setattr(down, name, own)
        torch.testing.assert_close(generate(model, prompt(1, 12, seed=5))[1], expected, rtol=0, atol=1e-9)
    assert torch.equal(own, bits)


@backends
@families
def test_the_running_prompt_keeps_its_channels(family, backend):
    model = fresh(family)
    with pruned(model, backend) as session, torch.no_grad():
        out = model(prompt(), use_cache=True)
        token = out.logits[:, -1].argmax(-1, keepdim=True)
        model(token, past_key_values=out.past_key_values)
        before = partitions(session)
        CHANGES[family, "down"](model)
        model(token, past_key_values=out.past_key_values)
        assert partitions(session) == before


# --- writing in place -----------------------------------------------------------------------------------------------


def weight_of(model):
    return experts(model, 1).down_proj if model.config.model_type == "mixtral" else down_projections(model)[1].weight


@torch.no_grad()
def multiplied(model):
    weight = weight_of(model)
    weight.mul_(torch.linspace(0.2, 3, weight.shape[-1], dtype=weight.dtype).flip(0))


def multiplied_behind_autograd(model):
    weight = weight_of(model)
    weight.data.copy_(random(weight.shape))


def written(which):
    def write(model):
        if model.config.model_type == "mixtral":
            weight = experts(model, 1).gate_up_proj
            size = weight.shape[1] // 2
            half = slice(size, None) if which == "up_proj" else slice(size)
            weight.data[:, half].copy_(random(weight[:, half].shape))
        else:
            weight = getattr(model.model.layers[1].mlp, which).weight
            weight.data.copy_(random(weight.shape))

    write.__name__ = which
    return write


def one_channel_of_up(model):
    weight = experts(model, 1).gate_up_proj[2] if model.config.model_type == "mixtral" else None
    weight = model.model.layers[1].mlp.up_proj.weight if weight is None else weight
    weight.data[-3] *= 1.5


WRITINGS = pytest.mark.parametrize(
    "write", [multiplied, multiplied_behind_autograd, written("gate_proj"), written("up_proj"), one_channel_of_up]
)


@WRITINGS
@backends
@families
def test_writing_while_no_channels_are_moved_counts(family, backend, write):
    model, twin = fresh(family), fresh(family)
    write(twin)
    with pruned(twin):
        expected = generate(twin, prompt())
    with pruned(model, backend):
        if backend == "masked":
            generate(model, prompt(1, 12, seed=5))
        write(model)
        found = generate(model, prompt())
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1], rtol=0, atol=1e-9)
    same_weights(model, twin)


@WRITINGS
@families
def test_writing_to_moved_channels_is_refused(family, write):
    model = fresh(family)
    session = pruned(model, "inplace").attach()
    generate(model, prompt(1, 12, seed=5))
    write(model)
    for _ in range(2):
        with pytest.raises(SessionError, match=r"was written to inside the session.*Leave the session"):
            generate(model, prompt())
    with pytest.warns(UserWarning, match="written to inside the session"):
        session.detach()


def test_a_write_to_moved_channels_that_no_forward_saw_is_told_at_the_end():
    model = fresh()
    session = pruned(model, "inplace").attach()
    generate(model, prompt())
    with torch.no_grad():
        down_projections(model)[0].weight.add_(1)
    with pytest.warns(UserWarning, match="written to inside the session"):
        session.detach()
    twin = fresh()
    with torch.no_grad():
        down_projections(twin)[0].weight.add_(1)
    same_weights(model, twin)


@pytest.mark.parametrize("write", [multiplied_behind_autograd, written("gate_proj"), written("up_proj")])
@families
def test_writing_to_moved_channels_between_two_steps_is_refused(family, write):
    model = fresh(family)
    session = pruned(model, "inplace").attach()
    with torch.no_grad():
        cache = model(prompt(), use_cache=True).past_key_values
        model(prompt()[:, :1], past_key_values=cache)
        write(model)
        with pytest.raises(SessionError, match=r"was written to inside the session.*Leave the session"):
            model(prompt()[:, :1], past_key_values=cache)
    with pytest.warns(UserWarning, match="written to inside the session"):
        session.detach()


@WRITINGS
@families
def test_writing_to_moved_channels_just_before_the_end_is_told(family, write):
    model = fresh(family)
    session = pruned(model, "inplace").attach()
    generate(model, prompt())
    write(model)
    with pytest.warns(UserWarning, match="written to inside the session"):
        session.detach()


# --- weights made of moved ones -------------------------------------------------------------------------------------


def tripled(weight):
    return nn.Parameter(3 * weight.detach())


def cloned(weight):
    return nn.Parameter(weight.detach().clone())


def noisy(weight):
    return nn.Parameter(weight.detach() + 0.1 * weight.detach().std() * random(weight.shape))


def absolute(weight):
    return nn.Parameter(weight.detach().abs())


def replace_weights(model, make):
    """Every weight of an FFN, and what they are then in the original order."""
    for layer in model.model.layers:
        if model.config.model_type == "mixtral":
            for name in ("gate_up_proj", "down_proj"):
                setattr(layer.mlp.experts, name, make(getattr(layer.mlp.experts, name)))
        else:
            for name in ("gate_proj", "up_proj", "down_proj"):
                getattr(layer.mlp, name).weight = make(getattr(layer.mlp, name).weight)


@pytest.mark.parametrize("make", [tripled, cloned])
@families
def test_multiples_of_moved_weights_are_followed(family, make):
    twin, model = fresh(family), fresh(family)
    replace_weights(twin, make)
    with pruned(twin):
        expected = generate(twin, prompt())[1]
    with pruned(model, "inplace"):
        generate(model, prompt(1, 12, seed=5))
        replace_weights(model, make)
        torch.testing.assert_close(generate(model, prompt())[1], expected, rtol=0, atol=1e-9)
    same_weights(model, twin)


@pytest.mark.parametrize("make", [noisy, absolute])
@families
def test_what_else_is_made_of_moved_weights_is_refused(family, make):
    model = fresh(family)
    session = pruned(model, "inplace").attach()
    generate(model, prompt(1, 12, seed=5))
    replace_weights(model, make)
    for _ in range(2):
        with pytest.raises(SessionError, match=r"another weight was made of it.*Load the model again"):
            generate(model, prompt())
    with pytest.warns(UserWarning, match="another weight was made of it"):
        session.detach()


# --- between sessions -----------------------------------------------------------------------------------------------


def packed(linear):
    torchao = pytest.importorskip("torchao.quantization")
    torchao.quantize_(linear, torchao.Int8WeightOnlyConfig())


def weight_normed(linear):
    nn.utils.parametrizations.weight_norm(linear)


def unstructured(linear):
    l1_unstructured(linear, "weight", 0.5)


@pytest.mark.parametrize("do", [packed, weight_normed, unstructured])
@pytest.mark.parametrize("which", ["up_proj", "down_proj"])
@pytest.mark.parametrize("family", ["llama", "qwen2_moe"])
def test_what_is_made_of_moved_weights_is_refused(family, which, do):
    model = fresh(family).float()  # torchao packs no float64
    ffn = model.model.layers[-1].mlp
    ffn = getattr(ffn, "shared_expert", ffn)
    session = pruned(model, "auto").attach()
    generate(model, prompt())
    do(getattr(ffn, which))
    for _ in range(2):
        with pytest.raises(SessionError, match=rf"{which}\.weight was packed.*before the session"):
            generate(model, prompt())
    with pytest.warns(UserWarning, match=rf"{which}\.weight was packed.*Load the model again"):
        session.detach()


@pytest.mark.parametrize("do", [packed, weight_normed, unstructured])
def test_what_is_made_of_weights_that_are_masked_is_followed(do):
    twin, model = fresh().float(), fresh().float()
    do(twin.model.layers[0].mlp.down_proj)
    with pruned(twin):
        expected = generate(twin, prompt())[1]
    with pruned(model):
        generate(model, prompt())
        do(model.model.layers[0].mlp.down_proj)
        torch.testing.assert_close(generate(model, prompt())[1], expected, rtol=0, atol=1e-4)


def test_experts_of_another_dtype_are_refused_as_often_as_they_are_asked():
    model = fresh("mixtral")
    with pruned(model, gamma=0.3):
        generate(model, prompt())
        model.bfloat16()
        for _ in range(2):
            with pytest.raises(SessionError, match=r"depends on the dtype.*start a new one"):
                generate(model, prompt())


def doubled(module):
    module.forward = lambda x: 2 * type(module).forward(module, x)


@pytest.mark.parametrize("which", ["up_proj", "down_proj"])
@backends
def test_another_forward_inside_a_session_is_followed_or_refused(which, backend):
    twin, model = fresh(), fresh()
    doubled(getattr(twin.model.layers[0].mlp, which))
    with pruned(twin):
        expected = generate(twin, prompt())[1]
    with pruned(model, "auto" if backend == "inplace" else backend):
        generate(model, prompt())
        doubled(getattr(model.model.layers[0].mlp, which))
        if backend == "masked":
            torch.testing.assert_close(generate(model, prompt())[1], expected, rtol=0, atol=1e-9)
            return
        for _ in range(2):
            with pytest.raises(SessionError, match=r"forward of a Linear was replaced.*start a new session"):
                generate(model, prompt())


def wrapped_forward(module):
    own = module.forward

    @functools.wraps(own)
    def forward(*args, **kwargs):
        return 2 * own(*args, **kwargs)

    module.forward = forward


@pytest.mark.parametrize("kind", SESSIONS)
@pytest.mark.parametrize("path", ["mlp", "mlp.up_proj", "mlp.down_proj", "self_attn.o_proj", "input_layernorm"])
def test_a_forward_that_is_wrapped_inside_a_session_is_followed_or_refused(path, kind):
    session_of = SESSIONS[kind]
    refused = path in ("mlp.up_proj", "mlp.down_proj") or (path, kind) == ("self_attn.o_proj", "rows")
    twin, model = fresh(), fresh()
    changed = twin.model.layers[1].get_submodule("mlp.down_proj" if path == "mlp" else path)
    for parameter in changed.parameters():
        parameter.data *= 2
    with session_of(twin):
        expected = generate(twin, prompt())
    with session_of(model):
        generate(model, prompt(1, 12, seed=5))
        wrapped_forward(model.model.layers[1].get_submodule(path))
        if refused:
            for _ in range(2):
                with pytest.raises(SessionError, match=r"was replaced inside the session.*start a new session"):
                    generate(model, prompt())
        else:
            found = generate(model, prompt())
            assert torch.equal(found[0], expected[0])
            torch.testing.assert_close(found[1], expected[1], rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", ["compiled", "rows"])
@pytest.mark.parametrize(
    "path", ["self_attn.q_proj", "self_attn.o_proj", "input_layernorm", "post_attention_layernorm"]
)
def test_a_wrapped_part_of_a_layer_is_called_in_float32(path, kind):
    """There norms and whole layers are the library's, which reads past their modules."""
    if "proj" in path and kind == "rows":
        pytest.skip("refused: read by rows")
    twin, model = (tiny("llama", torch.float32) for _ in range(2))
    for parameter in twin.model.layers[1].get_submodule(path).parameters():
        parameter.data *= 2
    with SESSIONS[kind](twin):
        expected = generate(twin, prompt())
    with SESSIONS[kind](model):
        generate(model, prompt(1, 12, seed=5))
        wrapped_forward(model.model.layers[1].get_submodule(path))
        found = generate(model, prompt())
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1], rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", SESSIONS)
def test_a_wrapped_attention_is_called(kind):
    model, calls = fresh(), []
    with SESSIONS[kind](model):
        generate(model, prompt())
        attention = model.model.layers[1].self_attn
        own = attention.forward
        attention.forward = functools.wraps(own)(lambda *args, **kwargs: calls.append(1) or own(*args, **kwargs))
        generate(model, prompt(), 4)
    assert len(calls) == 4


@backends
@families
def test_a_session_attached_again_takes_the_weights_of_now(family, backend):
    model, twin = fresh(family), fresh(family, seed=7)
    with pruned(twin):
        expected = generate(twin, prompt())[1]
    session = pruned(model, backend)
    with session:
        generate(model, prompt())
    loaded(model)
    with same_afterwards(model), session:
        torch.testing.assert_close(generate(model, prompt())[1], expected, rtol=0, atol=1e-9)


def test_a_session_plans_again_when_it_is_attached():
    peft = pytest.importorskip("peft")
    model = fresh()
    session = prune(model, ratio=0.4, scope="ffn", kernels="stock")
    assert {plan.backend for plan in session.plans} == {"inplace"}
    expected = lora_logits(adapted(peft, fresh(), ["down_proj"]))
    adapted(peft, model, ["down_proj"])
    with session:
        assert {plan.backend for plan in session.plans} == {"masked"}
        torch.testing.assert_close(generate(model, prompt())[1], expected, rtol=0, atol=1e-9)


# --- adapters -------------------------------------------------------------------------------------------------------


def adapted(peft, model, targets, seed=0):
    """A model with LoRA adapters, injected into it."""
    config = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return peft.get_peft_model(model, config).eval()


def lora_logits(model):
    merged = copy.deepcopy(model).merge_and_unload().eval()
    with pruned(merged):
        return generate(merged, prompt())[1]


@backends
@pytest.mark.parametrize("targets", [["down_proj"], ["gate_proj", "up_proj"], ["gate_proj", "up_proj", "down_proj"]])
def test_adapters_come_and_go_inside_a_session(backend, targets):
    peft = pytest.importorskip("peft")
    model = fresh()
    expected = [lora_logits(adapted(peft, fresh(), targets, seed)) for seed in (0, 1)]
    with pruned(model, "auto" if backend == "inplace" else backend):
        plain = generate(model, prompt())[1]

        def check(wanted):
            torch.testing.assert_close(generate(model, prompt())[1], wanted, rtol=0, atol=1e-9)

        wrapper = adapted(peft, model, targets)
        check(expected[0])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            config = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
            wrapper.add_adapter("other", config)
        wrapper.eval()
        check(expected[0])
        wrapper.set_adapter("other")
        check(expected[1])
        wrapper.merge_adapter()
        check(expected[1])
        wrapper.unmerge_adapter()
        wrapper.set_adapter("default")
        check(expected[0])
        with wrapper.disable_adapter():
            check(plain)
        wrapper.unload()
        check(plain)
    torch.testing.assert_close(
        torch.cat([t.flatten() for t in model.state_dict().values()]),
        torch.cat([t.flatten() for t in fresh().state_dict().values()]),
        rtol=0,
        atol=1e-12,
    )


@backends
def test_an_adapter_for_each_row_is_refused(backend):
    peft = pytest.importorskip("peft")
    model = fresh()
    wrapper = adapted(peft, model, ["down_proj"])
    with pruned(wrapper, "auto" if backend == "inplace" else backend, batch="per_sequence") as session:
        expected = generate(wrapper, prompt(2))
        for _ in range(2):
            with pytest.raises(SessionError, match=r"settings of an adapter changed|the model was changed"):
                generate(wrapper, prompt(2), adapter_names=["default", "__base__"])
            found = generate(
                wrapper, prompt(2)
            )  # of the adapter that is active, without peft's hooks of the call before
            assert torch.equal(found[1], expected[1])
        assert session.attached
    assert not any(module._forward_pre_hooks for module in model.modules())


@backends
def test_an_adapter_named_for_the_only_row_counts(backend):
    peft = pytest.importorskip("peft")
    model = fresh()
    wrapper = adapted(peft, model, ["down_proj"])
    twin = fresh()
    with pruned(twin):
        plain = generate(twin, prompt())[1]
    with pruned(wrapper, "auto" if backend == "inplace" else backend):
        found = generate(wrapper, prompt(), adapter_names=["__base__"])[1]
        torch.testing.assert_close(found, plain, rtol=0, atol=1e-9)
        adapted_ones = generate(wrapper, prompt())[1]
    torch.testing.assert_close(adapted_ones, lora_logits(wrapper), rtol=0, atol=1e-9)


# --- forwards of classes --------------------------------------------------------------------------------------------

CLASSES = {  # of a Llama -> whose weights doubled give the same as its results doubled
    "linear": (nn.Linear, ""),
    "norm": (LlamaRMSNorm, ""),
    "attention": (LlamaAttention, "o_proj"),
    "mlp": (LlamaMLP, "down_proj"),
}


def doubling(own):
    def forward(self, *args, **kwargs):
        found = own(self, *args, **kwargs)
        return (2 * found[0], *found[1:]) if isinstance(found, tuple) else 2 * found

    return forward


@pytest.mark.parametrize("when", ["before", "inside"])
@pytest.mark.parametrize("session_of", SESSIONS.values(), ids=SESSIONS)
@pytest.mark.parametrize("which", CLASSES)
def test_a_forward_that_somebody_gives_a_class_counts(which, session_of, when, monkeypatch):
    (kind, part), twin, model = CLASSES[which], fresh(), fresh()
    for module in (module.get_submodule(part) for module in twin.modules() if type(module) is kind):
        for parameter in module.parameters(False):
            parameter.data *= 2
    with session_of(twin):
        expected = generate(twin, prompt())
    if when == "before":
        monkeypatch.setattr(kind, "forward", doubling(kind.forward))
    with same_afterwards(model), session_of(model) as session:
        generate(model, prompt(1, 12, seed=5))
        if when == "inside":
            monkeypatch.setattr(kind, "forward", doubling(kind.forward))
        found = generate(model, prompt())
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1], rtol=0, atol=1e-9)
    if which == "linear":
        assert {plan.backend for plan in session.plans} == {"masked"}
        assert "the forward of" in session.plans[0].reason


# --- autocast -------------------------------------------------------------------------------------------------------


@families
def test_casts_that_autocast_keeps_follow_the_channels(family):
    model, ids = tiny(family), prompt()
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False), pruned(model, "inplace") as session:
        generate(model, ids)
        wanted = partitions(session)
    dense = generate(model, ids)[1]
    with torch.autocast("cpu", torch.bfloat16):
        before = generate(model, ids)[1]
        with pruned(model, "inplace") as session:
            generate(model, prompt(1, 12, seed=5))
            generate(model, ids)
            assert partitions(session) == wanted
        assert torch.equal(generate(model, ids)[1], before)
    assert torch.equal(generate(model, ids)[1], dense)


# --- offloaded ------------------------------------------------------------------------------------------------------


def _to_cpu(model, folder):
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))


def _to_disk(model, folder):
    accelerate.disk_offload(model, folder, execution_device=torch.device("cpu"))


@pytest.mark.parametrize("follow", [True, False])
@pytest.mark.parametrize("offload", [_to_cpu, _to_disk])
@pytest.mark.parametrize("session_of", SESSIONS.values(), ids=SESSIONS)
@families
def test_a_model_that_is_offloaded_inside_a_session_is_followed(family, session_of, offload, follow, tmp_path):
    model = fresh(family)
    dense = generate(model, prompt())[1]
    with session_of(fresh(family)) as other:
        expected = generate(other.model, prompt())
    with session_of(model) as session:
        generate(model, prompt(1, 12, seed=5))
        offload(model, tmp_path)
        if follow:
            found = generate(model, prompt())
            assert torch.equal(found[0], expected[0])
            torch.testing.assert_close(found[1], expected[1], rtol=0, atol=1e-9)
            assert {plan.backend for plan in session.plans} == {"masked"}
    assert all(p.device.type == "meta" for p in model.parameters())
    assert torch.equal(generate(model, prompt())[1], dense)


# --- gradients ------------------------------------------------------------------------------------------------------


def loss(model, ids):
    """Of decode steps: the prompt's own forward has no part in the gradients."""
    with torch.no_grad():
        out = model(ids, use_cache=True)
        model(ids[:, :1], past_key_values=out.past_key_values)
    return model(ids[:, :2], past_key_values=out.past_key_values).logits.square().mean()


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@families
@pytest.mark.parametrize("attach_in", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_gradients_are_in_the_original_order_after_the_session(family, attach_in):
    found = []
    for backend in BACKENDS:
        model = fresh(family)
        with attach_in():
            session = pruned(model, backend).attach()
            generate(model, prompt(1, 8, seed=9))
        loss(model, prompt()).backward()
        loss(model, prompt(1, 12, seed=5)).backward()  # on top, while other channels are in front
        if backend == "inplace":
            assert any(
                not torch.equal(p, q)
                for p, q in zip(standing(model).values(), standing(fresh(family)).values(), strict=True)
            )
        session.detach()
        found.append(gradients(model))
        same_weights(model, fresh(family))
    assert found[0].keys() == found[1].keys()
    assert len(found[0]) > 8
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad, rtol=0, atol=1e-9)


@families
def test_gradients_that_were_there_before_the_session_stay(family):
    model = fresh(family)
    model(prompt()).logits.square().mean().backward()
    before = gradients(model)
    with same_afterwards(model), pruned(model, "inplace"):
        generate(model, prompt())
        generate(model, prompt(1, 12, seed=5))
    assert all(torch.equal(p.grad, before[name]) for name, p in model.named_parameters() if p.grad is not None)


@families
def test_differentiating_a_forward_whose_channels_have_moved_is_an_error(family):
    model = fresh(family)
    with pruned(model, "inplace"):
        late = loss(model, prompt())
        generate(model, prompt(1, 12, seed=5))
        with pytest.raises((SessionError, RuntimeError), match=r"have moved since the forward|modified by an inplace"):
            late.backward()


def test_gradients_of_frozen_inputs_are_refused_too_when_channels_have_moved():
    model = fresh().requires_grad_(False)
    down_projections(model)[-1].weight.requires_grad_(True)
    with pruned(model, "inplace"):
        late = loss(model, prompt())
        generate(model, prompt(1, 12, seed=5))
        with pytest.raises(SessionError, match="backward"):
            late.backward()


# --- copies ---------------------------------------------------------------------------------------------------------


@backends
@families
@pytest.mark.parametrize("take", [copy.deepcopy, pickle.dumps, lambda module: torch.save(module, io.BytesIO())])
def test_copies_inside_a_session_are_refused(load, family, backend, take):
    model = load(family)
    with pruned(model, backend):
        generate(model, prompt())
        for module in (model, model.model.layers[0].mlp):
            with pytest.raises(SessionError, match=r"Leave the session first.*state_dict"):
                take(module)
        generate(model, prompt())
    assert torch.equal(generate(copy.deepcopy(model), prompt())[1], generate(model, prompt())[1])


@families
def test_decode_steps_are_counted_on_through_a_change(family):
    model = fresh(family)
    with pruned(model, "inplace") as session:
        generate(model, prompt(), STEPS)
        moved = session.report.moved_channels
        CHANGES[family, "down"](model)
        generate(model, prompt(), STEPS)
        assert session.report.moved_channels > moved
