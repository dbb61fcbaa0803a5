"""A narrow ``down`` whose rows lie side by side while one prompt decodes: nothing but the time may show it."""

import copy
import signal

import pytest
import torch

from helpers.modes import MODES, fresh, generate, pruned
from helpers.observe import prompt, same_afterwards
from pop_mm.executors import narrow
from pop_mm.executors.packing import PackedDown
from pop_mm.weights.layout import Projection

AFTER = 2


@pytest.fixture
def packing(monkeypatch):
    """Every ``down`` that can be packed is, from the second step on; counts how often."""
    packs = []
    own = PackedDown.pack
    monkeypatch.setattr(narrow, "_PACK_AFTER", AFTER)
    monkeypatch.setattr(PackedDown, "pays", lambda self: self.fits())
    monkeypatch.setattr(PackedDown, "pack", lambda self: (packs.append(self), own(self)))
    return packs


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("rows", "size", "width"), [(1, 3, 2), (5, 9, 1), (64, 10, 9), (130, 40, 23), (300, 64, 50), (333, 7, 3)]
)
def test_columns_are_put_side_by_side_and_back_bit_for_bit(rows, size, width, dtype):
    module = torch.nn.Linear(size, rows, bias=False, dtype=dtype)
    bits = {torch.bfloat16: torch.int16, torch.float32: torch.int32}[dtype]
    with torch.no_grad():
        module.weight.view(bits).random_()  # NaN of all kinds among them
    before = module.weight.detach().clone()
    down = PackedDown(Projection("down", module, "in"), width)
    assert torch.equal(down.view()[0].t().view(bits), before[:, :width].view(bits))
    down.pack()
    assert torch.equal(down.view()[0].t().view(bits), before[:, :width].view(bits))
    assert down.view()[0].t().is_contiguous()
    assert down.view()[0].data_ptr() == module.weight.data_ptr()
    down.unpack()
    assert torch.equal(module.weight.view(bits), before.view(bits))
    down.unpack()
    assert torch.equal(module.weight.view(bits), before.view(bits))


@pytest.mark.parametrize("mode", ["greedy", "single", "loop", "assisted", "lookup", "static", "padded", "no_cache"])
@pytest.mark.parametrize("model_type", ["llama", "phi3", "opt"])
def test_every_mode_decodes_the_same(packing, model_type, mode):
    model = fresh(model_type)
    with pruned(model, "masked"):
        expected = MODES[mode][0](model)
    session = pruned(model, "inplace")
    with same_afterwards(model), session:
        found = MODES[mode][0](model)
        assert bool(packing) == (mode != "no_cache")
        assert session._inplace._packed == bool(packing) or mode in ("assisted", "lookup")
    with same_afterwards(model), session:
        again = MODES[mode][0](model)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(again[0], expected[0])
    assert torch.allclose(found[1], expected[1], atol=1e-10)


def test_prompts_in_turn(packing):
    """The older one goes on by the reference path, which reads the whole weight."""
    model = fresh()
    texts = [prompt(1, 9), prompt(1, 7).flip(1)]
    expected = []
    with pruned(model, "masked"), torch.no_grad():
        for ids in texts:
            out = model(ids, use_cache=True)
            for _ in range(6):
                out = model(out.logits[:, -1:].argmax(-1), past_key_values=out.past_key_values)
            expected.append(out.logits)
    with pruned(model, "inplace") as session, torch.no_grad():
        outs = [model(ids, use_cache=True) for ids in texts]
        packed = []
        for steps in (1, 3, 2):  # of each, then of the other
            for number, out in enumerate(outs):
                for _ in range(steps):
                    out = model(out.logits[:, -1:].argmax(-1), past_key_values=out.past_key_values)
                    packed.append(session._inplace._packed)
                outs[number] = out
        assert True in packed
        assert packed[-1] is False or packed.count(False) > 6
    for out, logits in zip(outs, expected, strict=True):
        assert torch.allclose(out.logits, logits, atol=1e-10)


def test_a_state_dict_taken_in_between_is_the_models_own(packing):
    model = fresh()
    before = copy.deepcopy(model.state_dict())
    with pruned(model, "inplace") as session:
        expected = generate(model, prompt(1, 9))
        assert session._inplace._packed
        found = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        assert torch.equal(generate(model, prompt(1, 9))[0], expected[0])
    assert all(torch.equal(found[name], before[name]) for name in before)


def test_an_error_in_a_packed_step_leaves_the_weights_as_they_were(packing):
    class Stop(Exception):
        pass

    model = fresh()

    def stop(ids, scores, **_):
        if ids.shape[1] > 9 + AFTER:
            raise Stop
        return torch.zeros(1, dtype=torch.bool)

    with same_afterwards(model), pytest.raises(Stop), pruned(model, "inplace"):
        model.generate(prompt(1, 9), max_new_tokens=9, stopping_criteria=[stop])
    assert packing


def test_the_model_may_change_its_dtype_while_it_is_packed(packing):
    def steps(backend):
        model = fresh().float()
        with pruned(model, backend), torch.no_grad():
            out = model(prompt(1, 9), use_cache=True)
            for step in range(6):
                if step == 3:
                    model.double()
                    for layer in out.past_key_values.layers:
                        layer.keys, layer.values = layer.keys.double(), layer.values.double()
                out = model(torch.tensor([[5]]), past_key_values=out.past_key_values)
        return out.logits

    expected = steps("masked")
    assert not packing
    assert torch.allclose(steps("inplace"), expected, atol=1e-5)
    assert packing


def test_only_torchs_products_of_16_bits_on_avx2_gain(monkeypatch):
    def pays(dtype=torch.bfloat16, width=3, capability="AVX2", **settings):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
        return PackedDown(Projection("down", torch.nn.Linear(8, 4, dtype=dtype), "in", **settings), width).pays()

    assert pays()
    assert pays(torch.float16)
    assert not pays(torch.float32)
    assert not pays(capability="AVX512")
    assert not pays(capability="DEFAULT")
    assert not pays(width=8)
    assert not pays(transposed=True)


def test_compiled_kernels_do_without(packing):
    model = fresh().float()
    with pruned(model, "inplace", kernels="auto") as session:
        generate(model, prompt(1, 9))
        assert bool(packing) == (session._matvec is None)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("method", ["pack", "unpack"])
def test_ctrl_c_waits_until_all_columns_are_moved(monkeypatch, method):
    module = torch.nn.Linear(40, 200, bias=False)
    before = module.weight.detach().clone()
    down = PackedDown(Projection("down", module, "in"), 30)
    if method == "unpack":
        down.pack()
    own, calls = torch.Tensor.clone, []

    def clone(tensor):
        calls.append(tensor)
        if len(calls) == 2:  # some rows have been moved
            signal.raise_signal(signal.SIGINT)
        return own(tensor)

    with monkeypatch.context() as patched:
        patched.setattr(torch.Tensor, "clone", clone)
        with pytest.raises(KeyboardInterrupt):
            getattr(down, method)()
    assert down.packed == (method == "pack")
    assert torch.equal(down.view()[0].t(), before[:, :30])
    down.unpack()
    assert torch.equal(module.weight, before)
