"""The contract of an adapter: what breaks it is refused, what keeps it passes, and a probe leaves no trace."""

import json
import re
from importlib import metadata
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from helpers.modes import EXPERT_LAYOUTS, LAYOUTS, fresh, pruned, with_experts
from helpers.observe import Wrapped, prompt, same_afterwards
from helpers.tiny_folder import save
from helpers.tiny_models import tiny
from pop_mm import AdapterError, SessionError, prune
from pop_mm.adapters import (
    FFNPaths,
    LlamaAdapter,
    MixtralAdapter,
    Qwen2MoeAdapter,
    adapter_for,
    check,
    register_adapter,
    registered_adapters,
    unregister_adapter,
)

ROOT = Path(__file__).parent.parent
BROKEN = r"channels are not independent|does not run on \d+ of its|not called"


class Own(LlamaAdapter):
    """As the one that ships, by somebody else."""


class OwnMoe(Qwen2MoeAdapter):
    """As the one that ships, by somebody else."""


class OwnExperts(MixtralAdapter):
    """As the one that ships, by somebody else."""


@pytest.fixture(autouse=True)
def _same_registry():
    before = registered_adapters()
    yield
    for name in registered_adapters().keys() - before.keys():
        unregister_adapter(name)


class Odd(nn.Module):
    """A gated FFN with something of its own in front of the down projection."""

    def __init__(self, mlp, between):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj
        self.act_fn = mlp.act_fn
        self.between = between

    def forward(self, x):
        return self.between(self, x, self.act_fn(self.gate_proj(x)), self.up_proj(x))


def after(function):
    """What is done to the channels in front of the down projection."""
    return lambda ffn, x, gate, up: ffn.down_proj(function(gate * up))


def swap_pairs(h):
    return h.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)


def mix(h):
    size = h.shape[-1]
    return h + 0.01 * h @ torch.ones(size, size, dtype=h.dtype) / size


BREAKS = {
    "roll": after(lambda h: h.roll(1, -1)),
    "flip": after(lambda h: h.flip(-1)),
    "pairs swapped": after(swap_pairs),
    "gate against up": lambda ffn, x, gate, up: ffn.down_proj(gate * up.roll(3, -1)),
    "gate against up, in pairs": lambda ffn, x, gate, up: ffn.down_proj(gate * swap_pairs(up)),
    "norm": after(lambda h: h * h.pow(2).mean(-1, keepdim=True).add(1e-6).rsqrt()),
    "centred": after(lambda h: h - h.mean(-1, keepdim=True)),
    "norm over groups": after(lambda h: F.normalize(h.unflatten(-1, (-1, 4)), dim=-1).flatten(-2)),
    "softmax": after(lambda h: h.softmax(-1)),
    "softmax of the gate": lambda ffn, x, gate, up: ffn.down_proj(gate.softmax(-1) * up),
    "top half": after(lambda h: h * (h.abs() >= h.abs().median(-1, keepdim=True)[0])),
    "top 5": after(lambda h: h * (h.abs() >= h.abs().topk(5, -1)[0][..., -1:])),
    "threshold": after(lambda h: h * (h > h.mean(-1, keepdim=True))),
    "clipped at 3 deviations": after(lambda h: h.clamp(max=3 * h.std(-1, keepdim=True))),
    "scaled by the largest": after(lambda h: h / h.abs().amax(-1, keepdim=True).clamp(min=1)),
    "mixing": after(mix),
    "first channel gates": after(lambda h: h * h[..., :1].sigmoid()),
    "by position": after(lambda h: h * torch.linspace(0.5, 1.5, h.shape[-1], dtype=h.dtype)),
    "one scale a channel": after(lambda h: h * torch.ones(48 if h.shape[-1] == 48 else 64, dtype=h.dtype)),
    "gate read past its module": lambda ffn, x, gate, up: ffn.down_proj(
        ffn.act_fn(F.linear(x, ffn.gate_proj.weight.to(x.dtype))) * up
    ),
    "down read past its module": lambda ffn, x, gate, up: F.linear(gate * up, ffn.down_proj.weight.to(x.dtype)),
    "channels go elsewhere too": lambda ffn, x, gate, up: ffn.down_proj(gate * up) + (gate * up).mean(-1, keepdim=True),
    "result is not used": lambda ffn, x, gate, up: ffn.down_proj(gate * up) * 0 + x,
}


def broken(between, dtype=torch.float64):
    model = tiny("llama", dtype)
    for layer in model.model.layers:
        layer.mlp = Odd(layer.mlp, between)
    return model


# broken adapters ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", BREAKS)
def test_a_broken_ffn_is_refused(kind, dtype):
    model = broken(BREAKS[kind], dtype)
    with same_afterwards(model):
        with pytest.raises(AdapterError, match=rf"Own does not fit this Llama.*layers\.0\.mlp .*({BROKEN})"):
            prune(model, ratio=0.4, adapter=Own())
        found = check(model, Own())
    assert not found.ok and re.search(BROKEN, found.groups[0].reason)
    assert {group.status for group in found.groups} == {"refused"} and "contract is broken" in repr(found)


def test_registered_adapters_and_those_of_packages_are_probed(monkeypatch):
    model = broken(BREAKS["norm"])
    model.config.model_type = "my_type"
    register_adapter("my_type")(Own)
    with pytest.raises(AdapterError, match=r"layers\.0\.mlp .* not independent"):
        prune(model, ratio=0.4)
    unregister_adapter("my_type")
    register_adapter("my_type")(LlamaAdapter)  # one that ships, but not for this type
    with pytest.raises(AdapterError, match=r"layers\.0\.mlp .* not independent"):
        prune(model, ratio=0.4)
    unregister_adapter("my_type")
    entry = metadata.EntryPoint("my_type", f"{__name__}:Own", "pop_mm.adapters")
    monkeypatch.setattr("pop_mm.adapters.registry.entry_points", lambda group: [entry])
    with pytest.raises(AdapterError, match=r"layers\.0\.mlp .* not independent"):
        prune(model, ratio=0.4)


def test_one_unusual_layer_is_enough():
    model = broken(after(lambda h: h))
    model.model.layers[1].mlp.cutoff = 0.5
    model.model.layers[1].mlp.between = BREAKS["threshold"]
    with pytest.raises(AdapterError, match=r"layers\.1\.mlp .* not independent"):
        prune(model, ratio=0.4, adapter=Own())
    found = check(model, Own())
    assert [(group.pattern, group.status) for group in found.groups] == [
        ("model.layers.0.mlp", "fast"),
        ("model.layers.1.mlp", "refused"),
    ]


def test_a_layout_that_is_not_as_said_is_refused():
    class Halves(Own):
        ffns = (FFNPaths(gate="", up="gate_proj"),)

    with pytest.raises(AdapterError, match=r"layers\.0\.mlp does not run on 32 of its 64 channels"):
        prune(tiny("llama"), ratio=0.4, adapter=Halves())

    model = tiny("phi3")  # fused, but gate and up take turns
    for layer in model.model.layers:

        def forward(x, mlp=layer.mlp):
            gate, up = mlp.gate_up_proj(x).unflatten(-1, (-1, 2)).unbind(-1)
            return mlp.down_proj(mlp.activation_fn(gate) * up)

        layer.mlp.forward = forward
    with pytest.raises(AdapterError, match=r"layers\.0\.mlp .* not independent"):
        prune(model, ratio=0.4, adapter=type("OwnFused", (type(adapter_for(model)),), {})())


def test_a_module_that_is_not_plain_is_refused():
    class Linear(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    class Plain(Own):
        ffns = (FFNPaths(plain_types=("Linear", Linear)),)

    model = tiny("llama")
    for layer in model.model.layers:
        layer.mlp.up_proj.__class__ = Linear
    with pytest.raises(AdapterError, match=r"up_proj is a Linear.* not x @ W\.T \+ b.*plain_types"):
        prune(model, ratio=0.4, adapter=Plain())


@pytest.mark.parametrize("kind", ["roll", "norm", "top half", "softmax", "mixing"])
def test_a_broken_shared_expert_is_refused(kind):
    model = tiny("qwen2_moe", torch.float64)
    for layer in model.model.layers[1:]:
        layer.mlp.shared_expert = Odd(layer.mlp.shared_expert, BREAKS[kind])
    with (
        same_afterwards(model),
        pytest.raises(AdapterError, match=rf"layers\.1\.mlp\.shared_expert .*({BROKEN})"),
    ):
        prune(model, ratio=0.4, adapter=OwnMoe())
    status = {group.role: group.status for group in check(model, OwnMoe()).groups}
    assert status == {"dense": "fast", "shared_expert": "refused", "expert": "fast"}


EXPERT_BREAKS = {
    "norm": lambda h: F.normalize(h, dim=-1),
    "roll": lambda h: h.roll(1, -1),
    "top half": lambda h: h * (h.abs() >= h.abs().median(-1, keepdim=True)[0]),
    "softmax": lambda h: h.softmax(-1),
    "mixing": mix,
}


@pytest.mark.parametrize("kind", EXPERT_BREAKS)
@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss", "nemotron_h"])
def test_broken_routed_experts_are_refused(model_type, kind):
    model, couple = with_experts(tiny, model_type), EXPERT_BREAKS[kind]
    adapter = type("OwnOfAny", (type(adapter_for(model)),), {})()
    for module in (m for m in model.modules() if hasattr(m, "is_concatenated")):
        if module.has_gate:
            module._apply_gate = lambda x, own=module._apply_gate: couple(own(x))
        else:
            module.act_fn.forward = lambda x, own=module.act_fn.forward: couple(own(x))
    with same_afterwards(model), pytest.raises(AdapterError, match=r"experts .*channels are not independent"):
        prune(model, ratio=0.4, adapter=adapter)
    assert "refused" in {group.status for group in check(model, adapter).groups if group.role == "expert"}


def test_experts_with_a_forward_of_their_own_are_refused():
    model = tiny("mixtral", torch.float64)
    cls = type(model.model.layers[0].mlp.experts)

    class Normed(cls):
        def own(self, hidden, ids, weights):
            return 1.5 * cls.forward.__wrapped__(self, hidden, ids, weights)

        def forward(self, *args):
            return self.own(*args)

        forward.__wrapped__ = own

    for layer in model.model.layers:
        layer.mlp.experts.__class__ = Normed
    with pytest.raises(AdapterError, match=r"layers\.0\.mlp\.experts gives another result by its own forward"):
        prune(model, ratio=0.4, adapter=OwnExperts())


def test_flags_that_are_wrong_are_refused():
    model = tiny("mixtral", torch.float64)
    for layer in model.model.layers:
        layer.mlp.experts.is_concatenated = False  # the gate's rows would be taken for pairs
    with pytest.raises(AdapterError, match=r"layers\.0\.mlp\.experts .* not independent|is_concatenated"):
        prune(model, ratio=0.4, adapter=OwnExperts())


# wrapped and packed projections -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gate_proj", "up_proj", "down_proj"])
def test_wrapped_projections_are_probed_alike(name):
    for between, ok in ((after(lambda h: h), True), (BREAKS["norm"], False)):
        model = broken(between)
        for layer in model.model.layers:
            setattr(layer.mlp, name, Wrapped(getattr(layer.mlp, name)))
        found = check(model, Own())
        assert found.ok is ok
        assert [group.status for group in found.groups] == ["masked" if ok else "refused"]
        assert re.search(rf"{name} is an? .*Wrapped", found.groups[0].reason) or not ok


def test_quantised_projections_are_probed_alike():
    model = tiny("llama", torch.float32)
    torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8, inplace=True)
    from pop_mm.adapters.contract import probe_records

    records = Own().projections(model)
    assert all(probed.broken is probed.skipped is None for probed in probe_records(model, Own(), records).values())
    for layer in model.model.layers:
        layer.mlp = Odd(layer.mlp, BREAKS["norm"])
    records = Own().projections(model)
    assert all("not independent" in probed.broken for probed in probe_records(model, Own(), records).values())


# what keeps the contract --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_type", LAYOUTS + EXPERT_LAYOUTS)
def test_every_layout_passes(model_type, dtype):
    model = tiny(model_type, dtype)
    with same_afterwards(model):
        found = check(model)
        adapter = type("OwnOfAny", (type(adapter_for(model)),), {})()
        prune(model, ratio=0.4, adapter=adapter)  # nor is it refused as somebody else's
    assert found.ok and repr(found).endswith("The contract holds.")
    assert {group.status for group in found.groups} == {"fast"}
    assert sum(len(group.names) for group in found.groups) == len(adapter.projections(model))
    assert all(len(line) <= 100 for line in repr(found).splitlines())


@pytest.mark.parametrize("activation", ["relu", "relu2", "gelu_new", "silu", "sigmoid", "relu6"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_no_activation_is_taken_for_a_coupling(activation, dtype):
    assert check(tiny("llama", dtype, hidden_act=activation, intermediate_size=1000), Own()).ok


def test_steps_in_the_activation_are_no_coupling():
    model = broken(after(lambda h: (8 * h).round() / 8), torch.float32)
    assert check(model, Own()).ok


def test_an_ffn_that_wants_more_arguments_is_run_on_what_the_model_gives_it():
    found = check(tiny("mpt"))
    assert found.ok and all(group.not_probed is None and group.probed for group in found.groups)


def test_an_ffn_that_cannot_be_run_is_not_refused():
    model = tiny("llama", torch.float64)
    for layer in model.model.layers:
        layer.mlp.forward = lambda x, mlp=layer.mlp, **_: type(mlp).forward(mlp, x) if x.shape[1] == 9 else x[None, "?"]
    found = check(model, Own())
    assert found.ok and "does not run" in found.groups[0].not_probed and "not probed" in repr(found)
    with pytest.warns(UserWarning, match=r"relies on Own for model\.layers\.0\.mlp without a probe: .*does not run"):
        prune(model, ratio=0.4, adapter=Own())


@pytest.mark.parametrize("what", ["forward", "module"])
def test_compiled_ffns_are_probed_as_they_are_uncompiled(what):
    for between, ok in ((after(lambda h: h), True), (BREAKS["norm"], False)):
        model = broken(between)
        for layer in model.model.layers:
            if what == "module":
                layer.mlp.compile(backend="eager")
            else:
                layer.mlp.forward = torch.compile(layer.mlp.forward, backend="eager")
        with torch.no_grad():
            dense = model(prompt()).logits
            with same_afterwards(model):
                assert check(model, Own()).ok is ok
            assert torch.equal(model(prompt()).logits, dense)


def test_what_is_said_of_a_model():
    model = tiny("qwen2_moe")
    found = check(model)
    assert (found.model, found.adapter) == ("Qwen2MoeForCausalLM", "Qwen2MoeAdapter")
    assert found.why == "registered for the model type 'qwen2_moe'"
    assert [(g.pattern, g.role, g.size, g.experts, g.status, g.reason) for g in found.groups] == [
        ("model.layers.0.mlp", "dense", 48, None, "fast", "plain weights"),
        ("model.layers.{1-2}.mlp.shared_expert", "shared_expert", 40, None, "fast", "plain weights"),
        ("model.layers.{1-2}.mlp.experts", "expert", 24, 4, "fast", "plain weights"),
    ]
    assert found.attention == ("model.layers.{0-2}.self_attn.{q_proj,k_proj,v_proj,o_proj}",)
    others = {"model.embed_tokens", "model.layers.{1-2}.mlp.{gate,shared_expert_gate}", "lm_head"}
    assert set(found.unpruned) == others
    assert json.loads(json.dumps(found.to_dict()))["ok"] is True
    model.config.model_type = "my_type"
    register_adapter("my_type")(OwnMoe)
    assert check(model).why == f"registered for the model type 'my_type' by {__name__}"
    assert check(model, OwnMoe()).why == "given as adapter="


def test_what_is_masked_says_why():
    model = tiny("llama")
    model.model.layers[1].mlp.up_proj = Wrapped(model.model.layers[1].mlp.up_proj)
    found = check(model)
    assert [group.status for group in found.groups] == ["fast", "masked"]
    assert re.search("up_proj is an? .*Wrapped", found.groups[1].reason)


# when it runs, and what it leaves -----------------------------------------------------------------------------------


def count_calls(model):
    calls = []

    class Counted(nn.Module):
        def forward(self, x):
            calls.append(1)
            return F.silu(x)

    for layer in model.model.layers:
        layer.mlp.act_fn = Counted()
    return calls


def test_adapters_that_ship_are_not_probed_by_a_session():
    model = tiny("llama")
    calls = count_calls(model)
    session = prune(model, ratio=0.4, backend="masked")
    assert not calls
    prune(model, ratio=0.4, adapter=LlamaAdapter())
    assert not calls, "given by hand, it is the same"
    session = prune(model, ratio=0.4, backend="masked", adapter=Own())
    once = len(calls)
    assert once, "somebody else's is"
    with session:
        pass
    assert len(calls) == once, "and once a session"
    tall = tiny("llama", num_hidden_layers=6)
    calls = count_calls(tall)
    prune(tall, ratio=0.4, adapter=Own())
    assert len(calls) == once, "on one FFN of each kind"


def test_a_model_without_weights_is_probed_when_the_session_starts():
    with torch.device("meta"):
        model = broken(BREAKS["norm"])
        found = check(model, Own())
    assert found.ok and "meta device" in found.groups[0].not_probed and "not probed" in repr(found)
    session = prune(model, ratio=0.4, adapter=Own())
    with pytest.raises(SessionError, match="meta device"):
        session.attach()
    model.to_empty(device="cpu")
    torch.nn.init.ones_(model.lm_head.weight)
    with pytest.raises(AdapterError, match=r"layers\.0\.mlp .* not independent"):
        session.attach()
    assert not session.attached
    assert all("forward" not in vars(module) for module in model.modules())


def test_a_probe_leaves_no_trace():
    def between(ffn, x, gate, up):
        ffn.calls = getattr(ffn, "calls", 0) + 1
        ffn.seen.add_(1)
        torch.rand(3)
        return ffn.down_proj(gate * up)

    model = broken(between).train()
    for layer in model.model.layers:
        layer.mlp.register_buffer("seen", torch.zeros(3))
    model.model.layers[1].eval()
    model(prompt()).logits.sum().backward()
    for layer in model.model.layers:
        layer.mlp.down_proj.register_forward_pre_hook(lambda module, args: None)
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    state = torch.get_rng_state()
    with same_afterwards(model):
        assert check(model, Own()).ok
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p.grad, grads[name]) for name, p in model.named_parameters())


def test_a_probe_does_not_mind_the_surroundings():
    model = broken(BREAKS["norm"], torch.float32)
    good = tiny("llama", torch.float32)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16), torch.device("meta"):
            assert check(good, Own()).ok
            assert not check(model, Own()).ok
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_model_that_is_being_pruned_is_not_checked():
    model = fresh()
    with pruned(model), pytest.raises(SessionError, match=r"being pruned; leave the session"):
        check(model)
    with pruned(model):
        session = prune(model, ratio=0.4, adapter=Own())  # probed when it starts
    with session:
        pass


# unknown model types ------------------------------------------------------------------------------------------------


def test_an_unknown_type_names_the_closest_adapter():
    model = tiny("mixtral", torch.float64)
    model.config.model_type = "brand_new"
    with pytest.raises(
        AdapterError, match=r"hold experts.*where (\w+) looks for them.*adapter=pop_mm\.adapters\.\1\(\)"
    ):
        adapter_for(model)
    model.config.model_type = "mixtrall"
    with pytest.raises(AdapterError, match=r"Did you mean 'mixtral'\?") as error:
        adapter_for(model)
    name = re.search(r"pop_mm\.adapters\.(\w+)\(\)", str(error.value))[1]
    import pop_mm.adapters

    with prune(model, ratio=0.4, adapter=getattr(pop_mm.adapters, name)()) as session:
        model.generate(prompt(), max_new_tokens=3)
    assert session.report.backends == {"inplace": 2}


# the documents and the command --------------------------------------------------------------------------------------


def test_the_example_of_the_documents_runs(capsys):
    text = (ROOT / "docs" / "adapters.md").read_text(encoding="utf-8")
    example = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    assert example.count("\n") <= 14
    model = tiny("lfm2", torch.float64)
    model.config.model_type = "my_model"
    exec(example, {"model": model, "__name__": "__main__"})
    out = " ".join(capsys.readouterr().out.split())
    assert "MyAdapter, registered for the model type 'my_model' by __main__" in out
    assert out.endswith("The contract holds.")


def test_inspect_check(call, tmp_path, monkeypatch):
    folder = save(tmp_path, num_hidden_layers=3)
    code, out, _ = call("inspect", "--model", folder, "--ratio", 0.4, "--check")
    assert code == 0 and "The contract holds." in out
    assert "model.layers.{0-2}.mlp: 3 x 64 channels" in out
    rows = json.loads(call("inspect", "--model", folder, "--ratio", 0.4, "--check", "--json")[1])
    plain = json.loads(call("inspect", "--model", folder, "--ratio", 0.4, "--json")[1])
    assert [{k: v for k, v in row.items() if k not in ("contract", "finding")} for row in rows] == plain
    assert {(row["contract"], row["finding"]) for row in rows} == {("holds", None)}
    monkeypatch.setenv("COLUMNS", "80")
    for how in (("--ratio", 0.4), ("--budget", 0.7)):
        out = call("inspect", "--model", folder, *how, "--check")[1]
        assert max(map(len, out.splitlines())) <= 80
        assert "pruned by thresholds alone: model.layers.{0-2}.self_attn" in " ".join(out.split())


def test_inspect_check_of_a_broken_contract(call, tmp_path, monkeypatch):
    folder = save(tmp_path)
    from transformers.models.llama.modeling_llama import LlamaMLP

    own = LlamaMLP.forward
    monkeypatch.setattr(
        LlamaMLP, "forward", lambda mlp, x: mlp.down_proj(F.normalize(mlp.up_proj(x) * mlp.gate_proj(x)))
    )
    code, out, _ = call("inspect", "--model", folder, "--ratio", 0.4, "--check")
    assert code == 0, "a norm over tokens is no business of the contract"
    monkeypatch.setattr(
        LlamaMLP, "forward", lambda mlp, x: mlp.down_proj(F.normalize(mlp.up_proj(x) * mlp.gate_proj(x), dim=-1))
    )
    code, out, err = call("inspect", "--model", folder, "--ratio", 0.4, "--check")
    assert (code, err) == (1, "") and "refused: " in out and "The contract is broken" in out
    code, out, _ = call("inspect", "--model", folder, "--ratio", 0.4, "--check", "--json")
    assert code == 1 and {row["contract"] for row in json.loads(out)} == {"broken"}
    assert all("not independent" in row["finding"] for row in json.loads(out))
    assert call("inspect", "--model", folder)[0] == 0
    assert own is not LlamaMLP.forward
