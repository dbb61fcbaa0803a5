"""The rows executor: it chooses, counts and generates as the masked one does, and gives every weight back as it was."""

import copy
import signal

import pytest
import torch
from test_thresholds import LAYOUTS, same, thresholds

from helpers.modes import EXPERT_LAYOUTS, IMPLEMENTATIONS, LENGTH, MODES, dense_run, generate, with_experts
from helpers.observe import Wrapped, differences, fingerprint, prompt, same_afterwards, standing
from helpers.tiny_models import tiny
from helpers.tiny_vlms import image_inputs, tiny_vlm
from pop_mm import SessionError
from pop_mm.executors import rows_record
from pop_mm.methods import thresholds as methods
from pop_mm.ops import library
from pop_mm.ops.turn import Turned, is_turned

MOST = ("single", "greedy", "chunked", "assisted", "beams", "static", "no_cache")


@pytest.fixture(params=[*LAYOUTS, *(f"{name}/experts" for name in EXPERT_LAYOUTS)])
def layout(request, load):
    name, _, experts = request.param.partition("/")
    return with_experts(load, name) if experts else load(name)


def kept(session):
    return {(found.plan.record.name, found.which): found.kept for found in session.report.inputs}


def both(run, model, **settings):
    """What a run gives masked and by rows, each with the shares that were kept, and the session by rows."""
    found = []
    for backend in ("masked", "auto"):
        with thresholds(model, backend=backend, **settings) as session:
            found.append((run(model), kept(session)))
    return *found, session


def by_rows(session):
    return {plan.backend for plan in session.plans} == {"rows"}


@pytest.mark.parametrize("mode", MOST)
def test_rows_choose_and_generate_as_masked(layout, mode):
    dense_run(mode, layout)
    (expected, shares), (found, own), session = both(MODES[mode][0], layout)
    same(found, expected, 1e-9)
    assert own == shares
    assert by_rows(session)
    if mode == "single":
        assert session.timings.masked_forwards == 0 and session.moving_seconds > 0


def test_rows_read_only_what_passes(layout):
    """Rows that do not pass are not looked at: NaN there changes nothing, where masked would show it."""
    ids = prompt(1, LENGTH)
    with thresholds(layout) as session:
        expected = generate(layout, ids)
        assert by_rows(session) and session.timings.masked_forwards == 0
    with thresholds(layout, kernels="stock") as session:
        same(generate(layout, ids), expected, 1e-9)
        assert session.timings.masked_forwards == 0
    assert {plan.backend for plan in session.plans} == {"masked"}


@torch.no_grad()
def steps(model):
    """Logits of decode steps of the same tokens, whatever they say."""
    out, logits = model(prompt(1, LENGTH), use_cache=True), []
    for token in prompt(1, 12, seed=8)[0]:
        out = model(token.view(1, 1), past_key_values=out.past_key_values)
        logits.append(out.logits.double())
    return torch.cat(logits)


@pytest.mark.parametrize("dtype", library.OPTIONS)
def test_the_same_input_is_chosen_alike_in_every_dtype(load, dtype):
    """Nothing has been left out in front of the first layer's attention, so both executors are given the same numbers."""
    (_, shares), (_, own), session = both(steps, load("llama", dtype))
    assert by_rows(session)
    first = [key for key in shares if key[0].startswith("model.layers.0.self_attn.{q_proj")]
    assert len(first) == 1 and own[first[0]] == shares[first[0]] and 0 < own[first[0]] < 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "opt", "mixtral", "gpt_oss"])
def test_narrow_floats_are_as_near_float64_as_masked(load, name, dtype):
    """Rounding moves entries across thresholds, in both: so both are held against float64."""
    model, exact = load(name, dtype), load(name, torch.float64)
    with thresholds(exact, backend="masked"):
        expected = steps(exact)
    (masked, shares), (found, own), session = both(steps, model)
    assert by_rows(session)
    scale, errors = expected.abs().mean(), [(one - expected).abs().mean() for one in (masked, found)]
    assert errors[1] < max(1.5 * errors[0], 1e-5 * scale)
    assert own == pytest.approx(shares, abs=0.02)


def test_a_vision_language_model():
    model = tiny_vlm("llava", torch.float64)
    inputs = image_inputs("llava", model, images=[1])

    def run(model):
        out = model.generate(
            **inputs, max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
        return out.sequences, torch.stack(out.logits)

    run(model)  # which sets up what it needs
    before = fingerprint(model)
    (expected, shares), (found, own), session = both(run, model)
    assert by_rows(session) and session.timings.masked_forwards == 0
    same(found, expected, 1e-9)
    assert own == shares
    assert differences(before, fingerprint(model)) == []


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_every_implementation_of_experts_runs_on_turned_weights(load, name, implementation):
    model = with_experts(load, name, implementation)

    def run(model):
        generate(model, prompt(1, LENGTH))
        return generate(model, prompt(2, LENGTH))

    (expected, _), (found, _), session = both(run, model)
    same(found, expected, 1e-3 if implementation == "grouped_mm" else 1e-9)
    assert by_rows(session) and 0 < session.timings.masked_forwards < session.timings.decode_forwards


@torch.no_grad()
def test_prompts_in_turn_and_second_turns(layout):
    if layout.config.model_type == "lfm2":
        pytest.skip("its convolution has no steps of several tokens")
    first, second, token = prompt(1, LENGTH), prompt(1, LENGTH, seed=3), torch.tensor([[5]])

    def run(model):
        one, two = (model(ids, use_cache=True) for ids in (first, second))
        logits = []
        for out in (one, two, one, one, two):
            logits.append(model(token, past_key_values=out.past_key_values).logits)
        logits.append(model(second, past_key_values=one.past_key_values).logits[:, -1:])  # a second turn
        logits += [model(token, past_key_values=out.past_key_values).logits for out in (one, two, one)]
        return torch.cat(logits), torch.cat(logits)

    (expected, shares), (found, own), session = both(run, layout)
    torch.testing.assert_close(found[1], expected[1], rtol=0, atol=1e-9)
    assert own == shares and by_rows(session) and session.timings.masked_forwards == 0


@torch.no_grad()
def test_counts_of_a_copy_of_a_cache(model):
    token = torch.tensor([[5]])

    def run(model):
        session = current[-1]
        out = model(prompt(1, LENGTH), use_cache=True)
        model(token, past_key_values=out.past_key_values)
        twin = copy.deepcopy(out.past_key_values)
        session.adopt(twin, out.past_key_values)
        logits = model(token + 1, past_key_values=out.past_key_values).logits
        before = kept(session)
        return torch.cat([logits, model(token, past_key_values=twin).logits]), before, kept(session)

    current, found = [], []
    for backend in ("masked", "auto"):
        with thresholds(model, backend=backend) as session:
            current.append(session)
            found.append(run(model))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=0, atol=1e-9)
    assert found[0][1:] == found[1][1:]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("weights", [None, 37, (6, 37)], ids=str)
def test_compiled_counts_are_those_of_torch(dtype, weights, monkeypatch):
    generator = torch.Generator().manual_seed(1)
    values = (torch.randn(6, 37, generator=generator) * torch.logspace(-12, 8, 37)).to(dtype)
    weight = None if weights is None else torch.rand(weights, generator=generator, dtype=torch.float64)
    row, counted = torch.tensor([0, 0, 0, 1, 1, 1]), torch.tensor([True, False, True, True, True, False])
    all_of_a_sequence = row == torch.tensor([[0], [1]])
    tokens = (all_of_a_sequence, all_of_a_sequence & counted)
    found = [methods.histogram(values, mask, weight) for mask in tokens]
    monkeypatch.setattr("pop_mm.ops.histogram.library", lambda _: None)
    expected = [methods.histogram(values, mask, weight) for mask in tokens]
    assert [int(counts.sum()) for counts in found] == [6 * 37, 4 * 37]
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


# weights -------------------------------------------------------------------------------------------------------------


def stored(model):
    return {name: (p.stride(), p.detach().clone()) for name, p in standing(model).items()}


def turned(model):
    return sum(not p.is_contiguous() for p in standing(model).values())


def assert_stored(found, expected):
    assert found.keys() == expected.keys()
    for name, (stride, value) in expected.items():
        assert found[name][0] == stride and torch.equal(found[name][1], value), name


def test_everything_is_as_it_was_after_leaving(layout):
    with same_afterwards(layout), thresholds(layout):
        generate(layout, prompt(1, LENGTH))


def test_weights_are_turned_by_the_first_step_and_back_by_the_end(model):
    with thresholds(model):
        assert not turned(model)
        generate(model, prompt(2, LENGTH))
        assert not turned(model)
        generate(model, prompt(1, LENGTH))
        assert turned(model) == 2 * 7
    assert not turned(model)


def test_budget_1_turns_nothing(model):
    with thresholds(model, 1):
        generate(model, prompt(1, LENGTH))
        assert not turned(model)


def test_an_exception_in_a_step(model):
    def fail(*_):
        raise ZeroDivisionError

    def run():
        with thresholds(model):
            generate(model, prompt(1, LENGTH))
            handle = model.model.layers[1].register_forward_hook(fail)
            try:
                generate(model, prompt(1, LENGTH))
            finally:
                handle.remove()

    with same_afterwards(model), pytest.raises(ZeroDivisionError):
        run()


def test_a_state_dict_has_the_models_own_storage(layout):
    before = stored(layout)
    with thresholds(layout) as session:
        expected = generate(layout, prompt(1, LENGTH))
        own = layout.state_dict()
        assert_stored({name: (own[name].stride(), own[name]) for name in before}, before)
        assert_stored(stored(layout), before)
        same(generate(layout, prompt(1, LENGTH)), expected, 1e-9)
        assert session.timings.masked_forwards == 0


def changed(model, change):
    """Tokens and logits of a session in which the model changes, and of a fresh one of the changed model."""
    with thresholds(model):
        generate(model, prompt(1, LENGTH))
        change(model)
        found = generate(model, prompt(1, LENGTH))
    assert not turned(model)
    with thresholds(model, backend="masked"):
        return found, generate(model, prompt(1, LENGTH))


@torch.no_grad()
def replace_data(model):
    weight = model.model.layers[0].mlp.up_proj.weight
    weight.data = weight.detach().mul(0.5).contiguous()


def replace_parameter(model):
    module = model.model.layers[1].self_attn.q_proj
    module.weight = torch.nn.Parameter(module.weight.detach().mul(0.5).contiguous())


@torch.no_grad()
def write(model):
    model.model.layers[0].mlp.down_proj.weight[3].mul_(2)


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.load_state_dict(tiny("llama", torch.float64, seed=1).state_dict()),
        lambda model: model.load_state_dict(tiny("llama", torch.float64, seed=1).state_dict(), assign=True),
        replace_data,
        replace_parameter,
        write,
    ],
    ids=["load", "assign", "data", "parameter", "write"],
)
def test_changed_weights_are_followed(change):
    found, expected = changed(tiny("llama", torch.float64), change)
    same(found, expected, 1e-9)


def test_a_move_to_another_dtype():
    model = tiny("llama", torch.float32)
    found, expected = changed(model, lambda model: model.to(torch.float64))
    same(found, expected, 1e-9)
    assert {p.dtype for p in model.parameters()} == {torch.float64}


def test_a_weight_that_another_module_uses_is_masked():
    model = tiny("llama", torch.float64)
    first, second = (layer.mlp.up_proj for layer in model.model.layers)
    second.weight = first.weight
    (expected, shares), (found, own), session = both(lambda model: generate(model, prompt(1, LENGTH)), model)
    same(found, expected, 1e-9)
    assert own == shares
    assert [p.backend for p in session.plans if "mlp" in p.record.name] == ["masked"] * 2
    assert {p.backend for p in session.plans if "attn" in p.record.name} == {"rows"}
    assert "shares its weights" in " ".join(str(session.report).split())


def test_what_is_not_plain_is_masked():
    model = tiny("llama", torch.float64)
    layer = model.model.layers[1]
    layer.mlp.up_proj, layer.self_attn.o_proj = Wrapped(layer.mlp.up_proj), Wrapped(layer.self_attn.o_proj)
    with same_afterwards(model):
        (expected, shares), (found, own), session = both(lambda model: generate(model, prompt(1, LENGTH)), model)
    same(found, expected, 1e-9)
    assert own == shares
    masked = [plan.record.name for plan in session.plans if plan.backend == "masked"]
    assert masked == ["model.layers.1.self_attn.o_proj", "model.layers.1.mlp"]


def test_a_weight_of_another_model_is_masked():
    model, other = tiny("llama", torch.float64), torch.nn.Linear(1, 1)
    other.weight = model.model.layers[0].self_attn.o_proj.weight
    (expected, _), (found, _), session = both(lambda model: generate(model, prompt(1, LENGTH)), model)
    same(found, expected, 1e-9)
    assert [p.record.name for p in session.plans if p.backend == "masked"] == ["model.layers.0.self_attn.o_proj"]
    del other


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.k_proj", "model.layers.1.mlp.down_proj"])
def test_hooks_of_others_are_respected(model, name):
    seen = []

    def run(model):
        module = model.get_submodule(name)
        handle = module.register_forward_pre_hook(lambda _, args: seen.append(int((args[0] == 0).sum())))
        try:
            return generate(model, prompt(1, LENGTH))
        finally:
            handle.remove()

    (expected, shares), (found, own), session = both(run, model)
    same(found, expected, 1e-9)
    assert own == shares and by_rows(session)
    half = len(seen) // 2
    assert seen[:half] == seen[half:] and any(seen)


def test_without_a_compiler_it_is_masked(model, monkeypatch):
    monkeypatch.setattr(library, "_library", lambda *_: "none was found")
    with thresholds(model) as session:
        generate(model, prompt(1, LENGTH))
        assert not turned(model)
        assert "no compiled kernels: none was found" in " ".join(str(session.report).split())


def test_the_report_says_what_ran_masked(model):
    with thresholds(model) as session:
        generate(model, prompt(2, LENGTH))
        assert session.timings.masked_forwards == session.timings.decode_forwards > 0
        assert "decode steps ran masked" in " ".join(str(session.report).split())
        assert session.report.backends == {"rows": len(session.plans)}
        assert session.report.to_dict()["kernels"] == "compiled"


def test_gradients_reach_the_weights(model):
    ids, token = prompt(1, LENGTH), torch.tensor([[5]])
    grads = []
    for backend in ("masked", "auto"):
        with thresholds(model, backend=backend):
            generate(model, ids)
            with torch.no_grad():
                out = model(ids, use_cache=True)
            model(token, past_key_values=out.past_key_values).logits.square().sum().backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        strides = {name: p.grad.stride() == p.stride() for name, p in model.named_parameters() if p.grad is not None}
        assert all(strides.values())
        model.zero_grad()
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=0, atol=1e-9)


def test_control_c_while_weights_are_turned(model, failing_turn, interruptible):
    failing_turn(lambda: signal.raise_signal(signal.SIGINT))
    goes_on_after(KeyboardInterrupt, model)


def test_no_memory_while_weights_are_turned(model, failing_turn):
    def fail():
        raise MemoryError

    failing_turn(fail)
    goes_on_after(MemoryError, model)


@pytest.fixture
def failing_turn(monkeypatch):
    """Have something happen when the ninth weight is turned."""

    def install(happen):
        calls, own = [], rows_record.turn

        def turn(parameter):
            calls.append(parameter)
            if len(calls) == 9:
                happen()
            return own(parameter)

        monkeypatch.setattr(rows_record, "turn", turn)

    return install


def goes_on_after(error, model):
    ids = prompt(1, LENGTH)
    with same_afterwards(model), thresholds(model) as session:
        with pytest.raises(error):
            generate(model, ids)
        assert 0 < turned(model) < 2 * 7
        found = generate(model, ids)
        assert turned(model) == 2 * 7
        assert session.timings.masked_forwards <= 1
    with thresholds(model, backend="masked"):
        same(found, generate(model, ids), 1e-9)


def test_no_memory_to_turn_a_weight_back(model, monkeypatch):
    ids, own = prompt(1, LENGTH), Turned.back
    expected = generate(model, ids)
    wanting = model.model.layers[0].self_attn.o_proj.weight

    failed = []

    def back(self):
        if self.parameter is wanting:
            failed.append(self)
            raise MemoryError
        own(self)

    session = thresholds(model).attach()
    generate(model, ids)
    monkeypatch.setattr(Turned, "back", back)
    with pytest.raises(MemoryError):
        session.detach()
    assert turned(model) == 1 and is_turned(wanting)  # the right numbers, in another order
    same(generate(model, ids), expected, 1e-12)
    own(failed[0])


def test_two_threads_at_once_are_refused(model):
    import threading

    refused, inside, go = [], threading.Event(), threading.Event()

    def wait(*_):
        inside.set()
        go.wait(10)

    def run():
        try:
            generate(model, prompt(1, LENGTH))
        except SessionError as error:
            refused.append(error)

    with thresholds(model):
        handle = model.model.layers[0].register_forward_hook(wait)
        other = threading.Thread(target=run)
        other.start()
        inside.wait(10)
        handle.remove()
        with pytest.raises(SessionError, match="Two threads"):
            generate(model, prompt(1, LENGTH))
        go.set()
        other.join()
    assert not refused
