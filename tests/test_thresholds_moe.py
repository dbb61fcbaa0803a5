"""Thresholds from the prompt for routed experts: the reference, and the invariants over layouts and implementations."""

import pytest
import torch
from test_thresholds import same, shares, thresholds

from helpers.modes import (
    EXPERT_LAYOUTS,
    IMPLEMENTATIONS,
    LENGTH,
    MODES,
    STEPS,
    dense_run,
    generate,
    in_modes,
    left_padded,
    simple,
    with_experts,
)
from helpers.observe import prompt, same_afterwards
from helpers.reference_thresholds import Thresholds
from helpers.tiny_models import MOE_MODELS
from pop_mm import ExpertPolicy, prune

# the reference leaves the routers' own arithmetic alone, so it must be that of the model
REFERENCED = ("mixtral", "qwen2_moe", "gpt_oss", "olmoe", "qwen3_moe", "deepseek_v3", "granitemoeshared")


@pytest.fixture(params=EXPERT_LAYOUTS)
def layout(request, load):
    return with_experts(load, request.param)


@pytest.mark.parametrize("model_type", REFERENCED)
def test_greedy_equals_the_reference(load, model_type):
    model = with_experts(load, model_type)
    ids = prompt(2, LENGTH)
    with thresholds(model) as session:
        found = generate(model, ids)
        report = session.report
    own = shares(session)
    with Thresholds(model, own["x"], own["h"]) as reference:
        expected = reference.greedy(ids, STEPS)
    same(found, (expected, torch.stack(reference.logits)))
    for row in range(2):
        mine = sorted({inputs.thresholds[row] for inputs in report.inputs})
        assert mine == pytest.approx(sorted({b for (_, of), b in reference.thresholds.items() if of == row}), rel=1e-5)


@pytest.mark.parametrize("model_type", MOE_MODELS)
def test_every_type_is_masked_and_restored(load, model_type):
    model = load(model_type, torch.float32)
    ids = prompt(2, LENGTH)
    dense = generate(model, ids, steps=3)
    with same_afterwards(model), thresholds(model, 0.8) as session:  # Mamba and convolutions stay dense
        found = generate(model, ids, steps=3)
    assert not torch.allclose(found[1][1:], dense[1][1:])
    # the prefill is dense; the compiled library may round its norms otherwise
    torch.testing.assert_close(found[1][0], dense[1][0], rtol=0, atol=2e-5)
    with thresholds(model, 0.8, backend="masked"):
        assert torch.equal(generate(model, ids, steps=1)[1][0], dense[1][0])
    for inputs in session.report.inputs:
        assert inputs.kept is not None and 0 < inputs.kept < 1
        assert abs(inputs.prompt_share["text"] - inputs.share) < 0.02


@pytest.mark.parametrize(("layout", "mode"), list(in_modes(EXPERT_LAYOUTS, ("mixtral",))), indirect=["layout"])
def test_budget_1_is_dense_bit_for_bit(layout, mode):
    tokens, logits = dense_run(mode, layout)
    with thresholds(layout, 1):
        again = MODES[mode][0](layout)
    assert torch.equal(again[0], tokens) and torch.equal(again[1], logits)


@pytest.mark.parametrize("mode", ["loop", "chunked", "no_cache", "assisted", "lookup"])
def test_every_exact_mode_equals_greedy(layout, mode):
    rows = MODES[mode][1]
    found = dense_run(mode, layout)
    dense = dense_run("greedy" if rows == 2 else "single", layout)
    if not (torch.equal(found[0], dense[0]) and torch.allclose(found[1], dense[1], rtol=0, atol=1e-5)):
        pytest.skip("transformers: not equal to greedy on the dense model")
    with thresholds(layout):
        same(MODES[mode][0](layout), simple(rows)(layout))


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss"])
def test_every_implementation_of_experts_agrees(load, model_type):
    found = {}
    for implementation in IMPLEMENTATIONS:
        model = with_experts(load, model_type, implementation, torch.float32)
        with thresholds(model):
            found[implementation] = generate(model, prompt(2, LENGTH), steps=3)
    for implementation in IMPLEMENTATIONS[1:]:
        same(found[implementation], found["eager"], 1e-3)


@pytest.mark.parametrize("model_type", ["mixtral", "qwen2_moe", "gpt_oss"])
def test_a_padded_batch_equals_each_row_alone(load, model_type):
    model = with_experts(load, model_type)
    ids, mask = left_padded(prompt(2, LENGTH))
    with thresholds(model):
        alone = [generate(model, ids[row : row + 1, mask[row].bool()]) for row in range(2)]
        together = generate(model, ids, attention_mask=mask)
    same(together, (torch.cat([one[0] for one in alone]), torch.cat([one[1] for one in alone], 1)))


def test_the_router_sees_the_whole_input(load):
    model = with_experts(load, "mixtral")
    router, experts = model.model.layers[0].mlp.gate, model.model.layers[0].mlp.experts
    seen = []
    handle = router.register_forward_pre_hook(lambda _, args: seen.append((args[0] != 0).float().mean().item()))
    with thresholds(model, 0.4) as session:
        generate(model, prompt(1, LENGTH), steps=3)
    handle.remove()
    assert seen == [1.0] * 3
    kept = next(inputs.kept for inputs in session.report.inputs if inputs.plan.record.role == "expert")
    assert kept < 0.8 and experts.down_proj.shape[0] == 4


def test_shared_experts_that_stay_whole_count_as_read(load):
    model = with_experts(load, "qwen2_moe")
    with prune(model, budget=0.7, experts=ExpertPolicy(prune_shared=False)) as session:
        generate(model, prompt(1, LENGTH), steps=3)
    whole = [plan for plan in session.plans if plan.record.role == "shared_expert"]
    assert whole and all(plan.backend == "dense" and set(plan.shares.values()) == {1.0} for plan in whole)
    assert abs(session.report.scope_share[0] - 0.7) < 1e-6
