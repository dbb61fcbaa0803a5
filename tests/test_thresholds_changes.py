"""The method thresholds on models as people have them: changed inside a session, wrapped, packed, offloaded.

What is right is what a session that masks gives on a plain twin.
"""

import copy
import io
import pickle
from contextlib import nullcontext

import pytest
import torch
from test_changes import CHANGES, adapted, doubled, experts, packed, random, same_weights, unstructured, weight_normed
from test_wrapped_weights import COMMON, OFFLOADS, small

from helpers.compatibility import ADAPTERS, TORCHAO
from helpers.modes import fresh, generate
from helpers.observe import prompt, same_afterwards
from helpers.reference import down_projections
from helpers.tiny_models import tiny
from pop_mm import SessionError, prune

FAMILIES = ("llama", "mixtral", "qwen2_moe")
families = pytest.mark.parametrize("family", FAMILIES)
backends = pytest.mark.parametrize("backend", ["auto", "masked"])
FIRST = prompt(1, 12, seed=5)


def thresholds(model, backend="auto", **settings):
    return prune(model, budget=0.6, backend=backend, **settings)


def masked(twin, ids=None, run=generate, **settings):
    """What is right."""
    with thresholds(twin, "masked", **settings):
        return run(twin, prompt() if ids is None else ids)


def same(found, expected, tolerance=1e-9):
    torch.testing.assert_close(found[1], expected[1], rtol=0, atol=tolerance)
    assert torch.equal(found[0], expected[0])


def by_rows(session):
    return "rows" in {plan.backend for plan in session.plans}


# --- changes inside a session ---------------------------------------------------------------------------------------


def of_attention(name, do):
    def change(model):
        do(getattr(model.model.layers[1].self_attn, name))

    return change


@torch.no_grad()
def scaled(module):
    module.weight.mul_(torch.linspace(0.2, 3, module.weight.shape[-1], dtype=module.weight.dtype))


def scaled_behind_autograd(module):
    scaled(type("Data", (), {"weight": module.weight.data}))


def replaced(module):
    module.weight = torch.nn.Parameter(random(module.weight.shape))


def other_data(module):
    module.weight.data = random(module.weight.shape)


def of_ffn(name, do):
    return lambda model: do(getattr(model.model.layers[1].mlp, name))


DOINGS = (scaled, scaled_behind_autograd, replaced, other_data)
OURS = {
    **CHANGES,
    **{("llama", f"{name} {do.__name__}"): of_attention(name, do) for name in ("q_proj", "o_proj") for do in DOINGS},
    **{("llama", f"{name} {do.__name__}"): of_ffn(name, do) for name in ("up_proj", "down_proj") for do in DOINGS},
}


# by rows; masked, what POP's session does not know: the inputs of attention
@pytest.mark.parametrize(
    ("family", "what", "backend"),
    [(*case, "auto") for case in OURS] + [(*case, "masked") for case in OURS if case not in CHANGES],
)
def test_a_change_inside_a_session_is_followed(family, what, backend):
    twin, model = fresh(family), fresh(family)
    OURS[family, what](twin)
    expected = masked(twin)
    with thresholds(model, backend) as session:
        before = generate(model, FIRST)
        OURS[family, what](model)
        same(generate(model, prompt()), expected)
        again = generate(model, FIRST)
        assert by_rows(session) == (backend == "auto")
    assert not torch.allclose(again[1], before[1], rtol=0, atol=1e-9) or what == "dtype"
    same_weights(model, twin)


@pytest.mark.parametrize(("family", "what"), OURS)
def test_a_change_that_no_forward_followed_stays_when_the_session_ends(family, what):
    twin, model = fresh(family), fresh(family)
    OURS[family, what](twin)
    with thresholds(model):
        generate(model, FIRST)
        OURS[family, what](model)
    same_weights(model, twin)


@backends
@families
def test_the_weights_of_experts_written_in_place(family, backend):
    if family == "llama":
        pytest.skip("has none")
    for name in ("gate_up_proj", "down_proj"):
        twin, model = fresh(family), fresh(family)
        for one in (twin, model):
            one.written = getattr(experts(one, 1), name).data
        twin.written.copy_(random(twin.written.shape))
        with thresholds(model, backend):
            generate(model, FIRST)
            model.written = getattr(experts(model, 1), name).data
            model.written.copy_(random(model.written.shape))
            same(generate(model, prompt()), masked(twin))
        same_weights(model, twin)


@pytest.mark.parametrize("targets", [["q_proj", "o_proj"], ["down_proj"], ["gate_proj", "up_proj", "v_proj"]])
@backends
def test_adapters_come_and_go_inside_a_session(targets, backend):
    peft = pytest.importorskip("peft")
    model = fresh()
    expected = []
    for seed in (0, 1):
        expected.append(masked(adapted(peft, fresh(), targets, seed).merge_and_unload().eval()))
    with thresholds(model, backend):
        plain = generate(model, prompt())
        wrapper = adapted(peft, model, targets)
        same(generate(model, prompt()), expected[0])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            wrapper.add_adapter("other", peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
        wrapper.eval()
        same(generate(model, prompt()), expected[0])
        wrapper.set_adapter("other")
        same(generate(model, prompt()), expected[1])
        wrapper.merge_adapter()
        same(generate(model, prompt()), expected[1])
        wrapper.unmerge_adapter()
        with wrapper.disable_adapter():
            same(generate(model, prompt()), plain)
        wrapper.unload()
        same(generate(model, prompt()), plain)


@pytest.mark.parametrize("do", [packed, weight_normed])
@pytest.mark.parametrize("path", ["self_attn.q_proj", "mlp.up_proj", "mlp.down_proj"])
def test_what_is_made_of_weights_inside_a_session_is_followed(path, do):
    twin, model = fresh().float(), fresh().float()
    do(twin.model.layers[0].get_submodule(path))
    expected = masked(twin)
    with thresholds(model) as session:
        generate(model, FIRST)
        assert by_rows(session)
        do(model.model.layers[0].get_submodule(path))
        same(generate(model, prompt()), expected, 1e-4)
    same(generate(model, prompt()), generate(twin, prompt()), 1e-4)


@pytest.mark.parametrize("path", ["self_attn.q_proj", "mlp.down_proj"])
def test_what_needs_contiguous_weights_fails_and_changes_nothing(path):
    model = fresh()
    with same_afterwards(model), thresholds(model):
        expected = generate(model, prompt())
        with pytest.raises(
            RuntimeError, match="view size is not compatible"
        ):  # torch's own words: the weight is turned
            unstructured(model.model.layers[0].get_submodule(path))
        same(generate(model, prompt()), expected)


@pytest.mark.parametrize("path", ["self_attn.q_proj", "mlp.up_proj", "mlp.down_proj"])
@backends
def test_another_forward_inside_a_session_is_followed_or_refused(path, backend):
    twin, model = fresh(), fresh()
    doubled(twin.model.layers[0].get_submodule(path))
    expected = masked(twin)
    with thresholds(model, backend):
        generate(model, prompt())
        doubled(model.model.layers[0].get_submodule(path))
        if backend == "masked":
            same(generate(model, prompt()), expected)
            return
        for _ in range(2):
            with pytest.raises(SessionError, match=r"forward of a Linear was replaced.*start a new session"):
                generate(model, prompt())


@families
def test_gradients_are_those_of_masked_and_lie_as_their_weights(family):
    found = []
    for backend in ("masked", "auto"):
        model = fresh(family)
        with thresholds(model, backend):
            generate(model, FIRST)
            with torch.no_grad():
                out = model(prompt(), use_cache=True)
            model(prompt()[:, :1], past_key_values=out.past_key_values).logits.square().mean().backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        same_weights(model, fresh(family))
    assert found[0].keys() == found[1].keys() and len(found[0]) > 8
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad, rtol=0, atol=1e-9)


@backends
@pytest.mark.parametrize("take", [copy.deepcopy, pickle.dumps, lambda module: torch.save(module, io.BytesIO())])
def test_copies_inside_a_session_are_refused(backend, take):
    model = fresh()
    with thresholds(model, backend):
        expected = generate(model, prompt())
        for module in (model, model.model.layers[0].mlp, model.model.layers[0].self_attn):
            with pytest.raises(SessionError, match=r"Leave the session first.*state_dict"):
                take(module)
        same(generate(model, prompt()), expected)


@families
def test_what_is_saved_inside_a_session_is_the_model(family, tmp_path):
    model, plain = fresh(family), fresh(family)
    with thresholds(model):
        expected = generate(model, prompt())
        found = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        model.save_pretrained(tmp_path)
        same(generate(model, prompt()), expected)
    assert all(torch.equal(found[name], tensor) for name, tensor in plain.state_dict().items())
    same_weights(type(model).from_pretrained(tmp_path, dtype=torch.float64), plain)


@families
@pytest.mark.parametrize("moves", [lambda m: m.bfloat16(), lambda m: m.float(), lambda m: m.bfloat16().double()])
def test_dtypes_that_change_inside_a_session(family, moves):
    twin, model = moves(fresh(family)), fresh(family)
    expected = masked(twin)
    narrow = {torch.bfloat16: 3 * 2**-7, torch.float32: 5e-5, torch.float64: 1e-9}[twin.dtype]  # of the largest logit
    with thresholds(model):
        generate(model, FIRST)
        moves(model)
        found = generate(model, prompt())
    if twin.dtype != torch.bfloat16 or family == "llama":  # a router's choice hangs on the last bit
        bound = narrow * float(expected[1][:2].abs().max())
        torch.testing.assert_close(found[1][:2], expected[1][:2], rtol=0, atol=bound)
    same_weights(model, twin)


# --- wrapped, packed, offloaded -------------------------------------------------------------------------------------


@backends
def test_through_a_pipeline(backend):
    from test_wrappers import pipeline

    pipe = pipeline()
    text = " ".join(["a"] * 9)
    dense = pipe(text, max_new_tokens=4, return_tensors=True)
    with thresholds(pipe.model, "masked"):
        expected = pipe(text, max_new_tokens=4, return_tensors=True)
    with thresholds(pipe.model, backend) as session:
        assert pipe(text, max_new_tokens=4, return_tensors=True) == expected
        assert session.report.timings.decode_forwards == 3
    assert pipe(text, max_new_tokens=4, return_tensors=True) == dense


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("offload", "model_type"), [(offload, "llama") for offload in OFFLOADS] + [("device map", "qwen2_moe")]
)
def test_offloaded_weights_give_what_plain_ones_give(offload, model_type, tmp_path):
    pytest.importorskip("accelerate")
    model, twin = small(model_type, None), small(model_type, None)
    model = OFFLOADS[offload](model, tmp_path)
    expected, dense = masked(twin), generate(model, prompt())
    for backend in ("masked", "auto"):
        with same_afterwards(model) if offload == "hook" else nullcontext(), thresholds(model, backend):
            same(generate(model, prompt()), expected)
    same(generate(model, prompt()), dense, 0)


TARGETS = [("q_proj", "o_proj"), ("gate_proj",), ("down_proj",), ("q_proj", "gate_proj", "up_proj", "down_proj")]
# that a weight is not plain, and what its columns weigh, is told of every tuner in test_wrapped_weights.py
WRAPPED = [(row, TARGETS[-1]) for row in ADAPTERS if row.name in COMMON]
WRAPPED += [(row, targets) for row in ADAPTERS if row.name in ("LoRA", "IA3") for targets in TARGETS[:-1]]


@pytest.mark.parametrize(("row", "targets"), WRAPPED, ids=lambda of: "-".join(of) if isinstance(of, tuple) else of.name)
def test_an_adapter_gives_what_the_merged_model_gives(row, targets):
    wrapped = row.make(small("llama", row.options["dtype"]), targets)
    expected = masked(row.twin(wrapped))
    model = wrapped.get_base_model()
    with same_afterwards(model), thresholds(wrapped):  # what is wrapped runs masked here too
        same(generate(model, prompt()), expected, row.options["tolerance"])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("projections", TARGETS, ids="-".join)
@pytest.mark.parametrize("row", [row for row in TORCHAO if row.options["exact"]], ids=lambda row: row.name)
def test_packed_weights_give_what_plain_ones_give(row, projections):
    sizes = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
    model = row.make(tiny("llama", **sizes), projections)
    twin = tiny("llama", **sizes)
    with torch.no_grad():
        for name, module in twin.named_modules():
            if name.split(".")[-1] in projections:
                module.weight.copy_(model.get_submodule(name).weight.dequantize())
    generate(model, prompt(), 2)
    expected = masked(twin)
    for backend in ("masked", "auto"):
        with same_afterwards(model), thresholds(model, backend):
            same(generate(model, prompt()), expected, 2e-5)


def test_the_default_method_is_this_one():
    model = fresh()
    with prune(model) as session:
        found = generate(model, prompt())
    assert session.config.chosen_method == "thresholds"
    with prune(model, budget=0.65, backend="masked"):
        same(found, generate(model, prompt()))
    assert len(down_projections(model)) == 2
