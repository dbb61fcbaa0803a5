"""Thresholds from the prompt on dense models: the reference, and the invariants over every model type and way to decode."""

import copy
import warnings
from functools import cache

import pytest
import torch
from test_invariants import NAN_IN_FLOAT64

from helpers.modes import LENGTH, MODES, STEPS, dense_run, generate, in_modes, in_turn, left_padded, simple
from helpers.observe import prompt, same_afterwards
from helpers.reference_thresholds import FEWEST, Thresholds
from helpers.tiny_models import DENSE_MODELS, tiny
from pop_mm import NonFiniteError, SessionError, prune
from pop_mm.methods.thresholds import MIN_PROMPT_TOKENS, threshold
from pop_mm.ops.histogram import BINS, bin_edges, histogram

BUDGET = 0.6
LAYOUTS = ("llama", "phi3", "gpt2", "opt", "gpt_neox", "falcon", "lfm2", "minicpm3", "mpt")


def thresholds(model, budget=BUDGET, **settings):
    return prune(model, budget=budget, **settings)


def shares(session):
    return next(plan.shares for plan in session.plans if "h" in plan.shares and plan.backend != "dense")


@pytest.fixture
def any_model(request, load):
    return load(request.param)


# what a type's own caches, masks and positions do to a forward is no method's matter: POP's invariants are over every type
@pytest.fixture(params=LAYOUTS)
def layout(request, load):
    overflows = request.param in NAN_IN_FLOAT64 and "padd" in request.node.name
    return load(request.param, torch.float32 if overflows else torch.float64)


@cache
def greedy_run(model, rows):
    with thresholds(model):
        return simple(rows)(model)


def same(found, expected, atol=1e-5):
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1], rtol=0, atol=atol)


# the reference ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("any_model", "scope"), in_turn(DENSE_MODELS, LAYOUTS, ("overall", "ffn")), indirect=["any_model"]
)
def test_greedy_equals_the_reference(any_model, scope):
    ids = prompt(2, LENGTH)
    with thresholds(any_model, scope=scope) as session:
        found = generate(any_model, ids)
        report = session.report
    own = shares(session)
    with Thresholds(any_model, own["x"], own["h"], attention=scope == "overall") as reference:
        expected = reference.greedy(ids, STEPS)
    assert not torch.allclose(found[1], dense_run("greedy", any_model)[1]), (
        "nothing was left out: the test sees nothing"
    )
    same(found, (expected, torch.stack(reference.logits)))
    for row in range(2):
        mine = sorted({inputs.thresholds[row] for inputs in report.inputs})
        assert mine == sorted({bound for (_, of), bound in reference.thresholds.items() if of == row})


def test_what_is_left_out_of_each_step(model):
    ids = prompt(1, LENGTH)
    seen = {}
    with thresholds(model) as session:
        handles = [
            module.register_forward_pre_hook(lambda _, args, n=name: seen.setdefault(n, []).append(args[0][0].clone()))
            for name, module in model.named_modules()
            if name.split(".")[-1] in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
        ]
        generate(model, ids)
    for handle in handles:
        handle.remove()
    own = shares(session)
    with Thresholds(model, own["x"], own["h"]) as reference:
        reference.greedy(ids, STEPS)
    assert len(seen) == 2 * 7
    for name, inputs in seen.items():
        assert inputs[0].all()  # the prompt runs dense
        for step, (_, out) in zip(inputs[1:], reference.left_out[name], strict=True):
            assert (step[0] == 0).nonzero().flatten().tolist() == out


# invariants ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("layout", "mode"), list(in_modes(LAYOUTS, ("llama",))), indirect=["layout"])
def test_budget_1_is_dense_bit_for_bit(layout, mode):
    tokens, logits = dense_run(mode, layout)
    with thresholds(layout, 1) as session:
        assert all(not module._forward_pre_hooks for module in layout.modules() if module is not layout)
        again = MODES[mode][0](layout)
    assert {plan.backend for plan in session.plans} == {"dense"}
    assert torch.equal(again[0], tokens) and torch.equal(again[1], logits)


@pytest.mark.parametrize(
    "mode", [mode for mode, (_, rows) in MODES.items() if rows and mode not in ("greedy", "single")]
)
def test_every_exact_mode_equals_greedy(layout, mode):
    rows = MODES[mode][1]
    found = dense_run(mode, layout)
    dense = dense_run("greedy" if rows == 2 else "single", layout)
    if not (torch.equal(found[0], dense[0]) and torch.allclose(found[1], dense[1], rtol=0, atol=1e-5)):
        pytest.skip("transformers: not equal to greedy on the dense model")
    expected = greedy_run(layout, rows)
    with thresholds(layout):
        same(MODES[mode][0](layout), expected)


def test_a_padded_batch_equals_each_row_alone(layout):
    ids, mask = left_padded(prompt(2, LENGTH))

    def runs():
        alone = [generate(layout, ids[row : row + 1, mask[row].bool()]) for row in range(2)]
        joined = torch.cat([one[0] for one in alone]), torch.cat([one[1] for one in alone], 1)
        return joined, generate(layout, ids, attention_mask=mask)

    alone, together = runs()
    if not torch.allclose(together[1], alone[1], rtol=0, atol=1e-5):
        pytest.skip("transformers: padding changes the dense model")
    with thresholds(layout):
        alone, together = runs()
    same(together, alone)


def test_padding_never_changes_the_thresholds(layout):
    ids, mask = left_padded(prompt(2, LENGTH))
    found = []
    with thresholds(layout) as session:
        for padding in (0, 77):
            layout.generate(ids.where(mask.bool(), padding), attention_mask=mask, max_new_tokens=2)
            found.append([inputs.thresholds for inputs in session.report.inputs])
    assert found[0] == found[1]


def test_the_model_is_restored_exactly(layout):
    with same_afterwards(layout), thresholds(layout):
        generate(layout, prompt(2, LENGTH))


def test_rows_of_a_batch_do_not_change_each_other(layout):
    first, second = prompt(1, LENGTH), prompt(1, LENGTH, seed=5)
    with thresholds(layout):
        together = generate(layout, torch.cat([first, second]))
        alone = [generate(layout, ids) for ids in (first, second)]
    same(together, (torch.cat([one[0] for one in alone]), torch.cat([one[1] for one in alone], 1)))


# prompts and caches -------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_second_turn_adds_to_the_first(layout):
    first, second = prompt(1, LENGTH), prompt(1, LENGTH, seed=3)
    with thresholds(layout) as session:
        out = layout(first, use_cache=True)
        token = out.logits[:, -1:].argmax(-1)
        out = layout(token, past_key_values=out.past_key_values)
        before = [inputs.thresholds for inputs in session.report.inputs]
        out = layout(second, past_key_values=out.past_key_values)
        token = out.logits[:, -1:].argmax(-1)
        logits = layout(token, past_key_values=out.past_key_values).logits
        after = [inputs.thresholds for inputs in session.report.inputs]
    own = shares(session)
    with Thresholds(layout, own["x"], own["h"]) as reference:
        reference.own_positions = True
        one = reference.prefill(first)[:, -1:].argmax(-1)
        reference.step(one)
        two = reference.prefill(second)[:, -1:].argmax(-1)
        expected = reference.step(two)
    assert before != after
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_split_forward_equals_prefill_and_steps(layout):
    ids = prompt(2, LENGTH + 4)
    if layout.config.model_type == "lfm2":
        pytest.skip("its convolution has no steps of several tokens")
    with thresholds(layout) as session:
        with session.split(LENGTH):
            whole = layout(ids, use_cache=False).logits
        with session.split(torch.tensor([LENGTH, LENGTH - 2])):
            uneven = layout(ids, use_cache=False).logits
        out = layout(ids[:, :LENGTH], use_cache=True)
        steps = [
            layout(ids[:, i : i + 1], past_key_values=out.past_key_values).logits for i in range(LENGTH, LENGTH + 4)
        ]
        short = layout(ids[1:, : LENGTH - 2], use_cache=True)
        last = [
            layout(ids[1:, i : i + 1], past_key_values=short.past_key_values).logits
            for i in range(LENGTH - 2, LENGTH + 4)
        ]
    torch.testing.assert_close(whole[:, LENGTH:], torch.cat(steps, 1), rtol=0, atol=1e-5)
    torch.testing.assert_close(uneven[:1], whole[:1], rtol=0, atol=1e-5)
    torch.testing.assert_close(uneven[1:, LENGTH - 2 :], torch.cat(last, 1), rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_step_of_several_tokens_equals_single_steps(model):
    ids, more = prompt(2, LENGTH), prompt(2, 4, seed=7)
    with thresholds(model) as session:
        out = model(ids, use_cache=True)
        twin = copy.deepcopy(out.past_key_values)
        session.adopt(twin, out.past_key_values)
        with session.split(LENGTH):
            together = model(more, past_key_values=out.past_key_values).logits
        single = [model(more[:, i : i + 1], past_key_values=twin).logits for i in range(4)]
    torch.testing.assert_close(together, torch.cat(single, 1), rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_copy_of_a_cache_goes_on_by_itself(model):
    ids = prompt(1, LENGTH)
    with thresholds(model) as session:
        out = model(ids, use_cache=True)
        twin = copy.deepcopy(out.past_key_values)
        session.adopt(twin, out.past_key_values)
        expected = model(torch.tensor([[5]]), past_key_values=out.past_key_values).logits
        model(prompt(1, LENGTH, seed=9), past_key_values=out.past_key_values)  # a second turn of the original
        found = model(torch.tensor([[5]]), past_key_values=twin).logits
    assert torch.equal(found, expected)


@torch.no_grad()
def test_beams_take_their_thresholds_along(layout):
    """Rows of a cache are exchanged: each goes on with the thresholds of the prompt that it has."""
    rows = torch.cat([prompt(1, LENGTH), prompt(1, LENGTH, seed=5)])
    token = torch.tensor([[5], [5]])
    if layout.config.model_type == "mpt":
        pytest.skip("its cache is made elsewhere")
    with thresholds(layout):
        out = layout(rows, use_cache=True)
        plain = layout(token, past_key_values=out.past_key_values).logits
        out = layout(rows, use_cache=True)
        out.past_key_values.reorder_cache(torch.tensor([1, 0]))
        moved = layout(token, past_key_values=out.past_key_values).logits
    torch.testing.assert_close(moved, plain.flip(0), rtol=0, atol=1e-5)


@torch.no_grad()
def test_one_prompt_goes_on_in_several_rows(model):
    with thresholds(model):
        out = model(prompt(1, LENGTH), use_cache=True)
        expected = model(torch.tensor([[5]]), past_key_values=out.past_key_values).logits
        out = model(prompt(1, LENGTH), use_cache=True)
        out.past_key_values.batch_repeat_interleave(3)
        found = model(torch.tensor([[5], [5], [6]]), past_key_values=out.past_key_values).logits
    torch.testing.assert_close(found[:2], expected.expand(2, -1, -1), rtol=0, atol=1e-5)


@torch.no_grad()
def test_rows_that_nobody_prefilled_are_an_error(model):
    with thresholds(model):
        out = model(prompt(2, LENGTH), use_cache=True)
        out.past_key_values.batch_repeat_interleave(2)
        with pytest.raises(SessionError, match="2 rows and is continued with 4"):
            model(torch.tensor([[5]] * 4), past_key_values=out.past_key_values)


def test_a_short_prompt_decodes_dense(model):
    assert MIN_PROMPT_TOKENS == FEWEST
    short, long = prompt(1, FEWEST - 1), prompt(1, FEWEST)
    dense = [generate(model, ids)[1] for ids in (short, long)]
    with thresholds(model) as session:
        found = [generate(model, short)[1]]
        assert "decoded dense" in " ".join(str(session.report).split())
        found.append(generate(model, long)[1])
    assert torch.equal(found[0], dense[0])
    assert not torch.allclose(found[1], dense[1])


def test_a_short_row_decodes_dense_beside_a_long_one(model):
    ids, mask = left_padded(prompt(2, LENGTH), (LENGTH - 3, 0))
    dense = generate(model, ids, attention_mask=mask)[1]
    with thresholds(model):
        found = generate(model, ids, attention_mask=mask)[1]
    assert torch.equal(found[:, 0], dense[:, 0])
    assert not torch.allclose(found[1:, 1], dense[1:, 1])


def test_thresholds_of_many_inputs_are_those_of_each_alone():
    generator = torch.Generator().manual_seed(0)
    magnitudes = [torch.randn(2, 3, 50, generator=generator).abs() * 4**k for k in range(6)]
    magnitudes[3][1], magnitudes[4] = 0, torch.ones(2, 3, 50)
    counts = torch.zeros(6, 2, 3, BINS, dtype=torch.int64)  # input, modality, sequence
    for place in torch.cartesian_prod(torch.arange(6), torch.arange(2), torch.arange(3)).tolist():
        k, modality, row = place
        histogram(magnitudes[k][modality, row].view(1, -1), counts[k, modality, row])
    counts[5, :, 2] = 0
    tokens, shares = {0: torch.tensor([9, 3, 9]), 1: torch.tensor([9, 9, 0])}, [0.0, 0.3, 0.5, 0.7, 0.9, 1.0]
    together = threshold({m: counts[:, m] for m in tokens}, tokens, shares)
    for k, share in enumerate(shares):
        alone = threshold({m: counts[k : k + 1, m] for m in tokens}, tokens, [share])
        assert torch.equal(together[k], alone[0])
        for row, modalities in enumerate(([0], [0, 1], [0])):  # the second has too little text
            own = counts[k, modalities, row].sum(0)
            expected = quantile_by_hand(own.tolist(), share) if own.sum() else -1.0
            assert together[k, row].item() == expected


def quantile_by_hand(counts, share):
    """Bin by bin."""
    edges, target, before = [*bin_edges().tolist(), 0.0], (1 - share) * sum(counts), 0
    for place, inside in enumerate(counts):
        if before + inside >= target:
            part = (target - before) / max(inside, 1)
            value = edges[place] + part * (edges[place + 1] - edges[place])
            return torch.tensor(value, dtype=torch.float64).float().item()
        before += inside
    raise AssertionError


# odd models ---------------------------------------------------------------------------------------------------------


def test_activations_that_are_not_finite_are_an_error():
    model = tiny("llama", torch.float32)
    model.model.layers[1].mlp.gate_proj.weight.data[3] = float("nan")
    with thresholds(model), pytest.raises(NonFiniteError, match=r"layers\.1\.mlp.*NaN"):
        generate(model, prompt(1, LENGTH))


@pytest.mark.parametrize("name", ["mlp", "self_attn.o_proj"])
def test_a_module_that_layers_share_is_as_if_each_had_its_own(name):
    model = tiny("llama", torch.float64, num_hidden_layers=3)
    holder, _, last = name.rpartition(".")
    first, third = (model.model.layers[layer].get_submodule(holder) for layer in (0, 2))
    setattr(third, last, getattr(first, last))
    apart = copy.deepcopy(model)
    setattr(apart.model.layers[2].get_submodule(holder), last, copy.deepcopy(getattr(first, last)))
    found = []
    for one in (model, apart):
        with thresholds(one) as session:
            found.append((generate(one, prompt(1, LENGTH)), [inputs.thresholds for inputs in session.report.inputs]))
    same(found[0][0], found[1][0], 1e-9)
    assert found[0][1] == found[1][1]


def test_an_attention_module_that_was_compiled_is_masked_too():
    model, twin = tiny("llama", torch.float64), tiny("llama", torch.float64)
    model.model.layers[0].self_attn.o_proj.compile(backend="eager")
    model.model.layers[1].self_attn.q_proj = torch.compile(model.model.layers[1].self_attn.q_proj, backend="eager")
    generate(model, prompt(1, LENGTH))
    found = []
    for one in (model, twin):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with thresholds(one):
                found.append(generate(one, prompt(1, LENGTH)))
    same(found[0], found[1], 1e-9)


def test_a_module_that_is_replaced_inside_the_session_is_masked_too(model):
    layer = model.model.layers[0].self_attn
    before, other = layer.v_proj, copy.deepcopy(layer.v_proj)
    with thresholds(model):
        expected = generate(model, prompt(1, LENGTH))
        layer.v_proj = other
        found = generate(model, prompt(1, LENGTH))
        layer.v_proj = before
        generate(model, prompt(1, LENGTH))
    same(found, expected, 1e-9)


@torch.no_grad()
def test_what_is_cropped_off_a_cache_is_forgotten(model):
    first, second, third = (prompt(1, LENGTH, seed=seed) for seed in (0, 3, 4))
    with thresholds(model):
        out = model(first, use_cache=True)
        model(second, past_key_values=out.past_key_values)
        out.past_key_values.crop(-LENGTH)
        model(third, past_key_values=out.past_key_values)
        found = model(torch.tensor([[5]]), past_key_values=out.past_key_values).logits
        out = model(first, use_cache=True)
        model(third, past_key_values=out.past_key_values)
        expected = model(torch.tensor([[5]]), past_key_values=out.past_key_values).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_other_dtypes_keep_the_share(dtype):
    model = tiny("llama", dtype)
    with thresholds(model, 0.5) as session:
        generate(model, prompt(1, 64))
    for inputs in session.report.inputs:
        assert abs(inputs.prompt_share["text"] - inputs.share) < 1e-3
