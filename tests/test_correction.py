"""The slow correction of thresholds: an answer reads what was asked for, whatever computes it and in whichever steps."""

import pytest
import torch
from test_rows_executor import both, by_rows
from test_thresholds import same, thresholds

from helpers.modes import LENGTH, fresh, generate, with_experts
from helpers.observe import prompt
from pop_mm.decoding.correction import BLOCK, Correction

STEPS = 60
MODELS = ["llama", "gpt2", "falcon", "mixtral"]


@pytest.fixture(params=MODELS)
def layout(request, load):
    return with_experts(load, "mixtral") if request.param == "mixtral" else load(request.param)


@pytest.fixture
def short_blocks(monkeypatch):
    monkeypatch.setattr("pop_mm.decoding.correction.BLOCK", 8)


def long_answer(model, rows=1, **settings):
    return generate(model, prompt(rows, LENGTH), steps=STEPS, pad_token_id=0, eos_token_id=None, **settings)


def simulated(drift, tokens=1000, intended=0.65):
    """Mean share over an answer whose share is off by ``drift`` and falls as thresholds rise, as a normal's does."""
    correction, shares = Correction(intended), []
    for position in range(tokens):
        factor = correction.begin(40 + position, 1)
        log = 0.0 if factor is None else float(factor.log())
        shares.append(intended + drift - log / 3)
        correction.end(torch.tensor([[[1000 * shares[-1], 1000.0]]], dtype=torch.float64))
    return sum(shares) / tokens, shares


@pytest.mark.parametrize("drift", [-0.1, -0.03, 0.03, 0.1])
def test_a_constant_drift_is_taken_back(drift):
    mean, shares = simulated(drift)
    assert abs(mean - 0.65) < 0.4 * abs(drift)
    assert max(abs(share - 0.65) for share in shares[-2 * BLOCK :]) < 0.05 * abs(drift)


def test_the_first_two_blocks_have_the_thresholds_of_the_prompt():
    _, shares = simulated(0.05)
    assert set(shares[: 2 * BLOCK]) == {0.65 + 0.05}
    assert shares[2 * BLOCK] != shares[0]


def test_another_prompt_begins_anew():
    correction = Correction(0.65)
    for position in range(3 * BLOCK):
        correction.begin(position, 1)
        correction.end(torch.tensor([[[500.0, 1000.0]]], dtype=torch.float64))
    assert float(correction.begin(3 * BLOCK, 1)) < 1
    correction.restart()
    assert correction.begin(900, 1) is None


def test_rows_correct_as_masked(layout, short_blocks):
    (expected, shares), (found, own), session = both(long_answer, layout)
    same(found, expected, 1e-9)
    assert own == shares and by_rows(session)


def test_an_answer_reads_what_was_asked_for(layout, short_blocks, monkeypatch):
    def off():
        with thresholds(layout, backend="masked") as session:
            long_answer(layout)
        _, kept = session.report.scope_share
        return abs(kept - sum(p.share_intended * sum(p.matrices.values()) for p in session.plans) / whole(session))

    def whole(session):
        return sum(sum(plan.matrices.values()) for plan in session.plans)

    corrected = off()
    monkeypatch.setattr("pop_mm.decoding.correction.BLOCK", 10 * STEPS)
    assert corrected < off()


@pytest.mark.parametrize("how", ["prompt_lookup", "assistant"])
@pytest.mark.parametrize("backend", ["masked", "auto"])
def test_steps_of_several_tokens_find_the_same_thresholds(load, how, backend, short_blocks):
    model = load("llama")
    more = (
        {"prompt_lookup_num_tokens": 3} if how == "prompt_lookup" else {"assistant_model": fresh(num_hidden_layers=1)}
    )
    with thresholds(model, backend=backend):
        expected = long_answer(model)
    with thresholds(model, backend=backend):
        found = long_answer(model, **more)
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1], rtol=0, atol=1e-9)


def test_each_sequence_has_a_correction_of_its_own(layout, short_blocks):
    with thresholds(layout):
        together = long_answer(layout, 2)
    for row in range(2):
        with thresholds(layout):
            alone = generate(layout, prompt(2, LENGTH)[row : row + 1], steps=STEPS, pad_token_id=0, eos_token_id=None)
        torch.testing.assert_close(together[1][:, row], alone[1][:, 0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("backend", ["masked", "auto"])
@torch.no_grad()
def test_tokens_that_are_cropped_off_do_not_count(load, backend, short_blocks):
    model, tokens, others = load("llama"), prompt(1, 40, seed=3)[0], prompt(1, 12, seed=4)[0]

    def decode(cache, some):
        return [model(token.view(1, 1), past_key_values=cache).logits for token in some]

    def logits(detour):
        cache = model(prompt(1, LENGTH), use_cache=True).past_key_values
        found = decode(cache, tokens[:20])
        if detour:
            decode(cache, others)
            cache.crop(-len(others))
        return torch.cat(found + decode(cache, tokens[20:]))

    with thresholds(model, backend=backend):
        expected, found = logits(False), logits(True)
    assert torch.equal(found, expected)


def test_beams_take_their_corrections_along(load, short_blocks):
    model = load("llama")
    (expected, shares), (found, own), _ = both(lambda m: long_answer(m, num_beams=3), model)
    same(found, expected, 1e-9)
    assert own == shares
