"""The lm_head under thresholds: its entries are chosen by the prompt's hidden states, and nothing else of it changes."""

import pytest
import torch

from helpers.modes import LENGTH, MODES, generate, left_padded, simple
from helpers.observe import prompt, same_afterwards
from helpers.tiny_models import DENSE_MODELS, tiny
from pop_mm import AdapterError, ConfigError, PopConfig, SessionError, Thresholds, prune
from pop_mm.adapters import adapter_for
from pop_mm.methods.thresholds import quantile
from pop_mm.ops.histogram import BINS, bin_edges

SHARE = 0.5
HEAD = Thresholds(head_budget=SHARE)


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def model(request):
    return tiny("llama", torch.float64, tie_word_embeddings=request.param)


def head_plan(session):
    return next((plan for plan in session.plans if plan.record.role == "lm_head"), None)


def bound_by_hand(hidden, share):
    """Of the hidden states ``[q, H]`` of one sequence, number by number; its first token does not count."""
    counts, edges = [0] * BINS, bin_edges().tolist()
    for value in hidden[1:].float().abs().flatten().tolist():
        counts[sum(edge <= value for edge in edges[: 255 << 4]) - 1] += 1
    return quantile(torch.tensor(counts), share).item()


@torch.no_grad()
@pytest.mark.parametrize("backend", ["auto", "masked"])
def test_logits_are_those_by_hand(model, backend):
    ids, token = prompt(1, LENGTH), torch.tensor([[5]])
    out = model(ids, use_cache=True, output_hidden_states=True)
    bound = bound_by_hand(out.hidden_states[-1][0], SHARE)
    x = model(token, past_key_values=out.past_key_values, output_hidden_states=True).hidden_states[-1][0, 0]
    left_out = x.float().abs() <= bound
    assert 0 < int(left_out.sum()) < len(x)
    expected = x.masked_fill(left_out, 0) @ model.lm_head.weight.T
    with prune(model, budget=1, method=HEAD, backend=backend) as session:
        out = model(ids, use_cache=True, logits_to_keep=1)
        found = model(token, past_key_values=out.past_key_values).logits
        report = session.report
    torch.testing.assert_close(found[0, 0], expected, rtol=0, atol=1e-9)
    (head,) = [inputs for inputs in report.inputs if inputs.matrix == "lm_head"]
    assert head.thresholds == [pytest.approx(bound)] and head.kept == 1 - int(left_out.sum()) / len(x)
    dense = sum(report.weights_per_token.values())
    assert report.read_weights()[1] == pytest.approx(dense - report.weights_per_token["lm_head"] * (1 - head.kept))
    assert report.scope_share == (1, None)


def test_masked_equals_rows(model):
    ids = prompt(1, LENGTH)
    with prune(model, budget=0.6) as session:
        whole = generate(model, ids)
        share = session.report.scope_share
    with prune(model, budget=0.6, method=HEAD) as session:
        rows = generate(model, ids)
        assert head_plan(session).backend == "rows" and model.lm_head.weight.t().is_contiguous()
        assert session.report.scope_share[0] == share[0]
    with prune(model, budget=0.6, method=HEAD, backend="masked") as session:
        masked = generate(model, ids)
        assert head_plan(session).backend == "masked" and model.lm_head.weight.is_contiguous()
    assert torch.equal(rows[0], masked[0])
    torch.testing.assert_close(rows[1], masked[1], rtol=0, atol=1e-9)
    assert not torch.allclose(rows[1], whole[1])


def test_all_positions_of_the_prompt_count_whatever_logits_are_computed(model):
    ids, found = prompt(2, LENGTH), []
    with prune(model, budget=0.6, method=HEAD) as session, torch.no_grad():
        for keep in (0, 1, 3):
            model(ids, use_cache=True, logits_to_keep=keep)
            found.append([inputs.thresholds for inputs in session.report.inputs if inputs.matrix == "lm_head"])
    assert found[0] == found[1] == found[2] and len(found[0][0]) == 2


@pytest.mark.parametrize("mode", [mode for mode, (_, rows) in MODES.items() if rows])
def test_every_exact_mode_equals_greedy(mode):
    model = tiny("llama", torch.float64)
    with prune(model, budget=0.6, method=HEAD):
        expected, found = simple(MODES[mode][1])(model), MODES[mode][0](model)
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1], rtol=0, atol=1e-5)


def test_padding_never_counts(model):
    ids, mask = left_padded(prompt(2, LENGTH))
    with prune(model, budget=0.6, method=HEAD):
        together = generate(model, ids, attention_mask=mask)
        alone = [generate(model, ids[row : row + 1, mask[row].bool()]) for row in range(2)]
    torch.testing.assert_close(together[1], torch.cat([one[1] for one in alone], 1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("settings", [{"method": Thresholds(head_budget=1)}, {}], ids=["all", "none"])
def test_without_a_budget_of_its_own_it_stays_as_it_is(model, settings):
    with prune(model, budget=0.6, **settings) as session:
        generate(model, prompt(1, LENGTH))
        assert head_plan(session) is None and model.lm_head.weight.is_contiguous()


def test_the_model_is_restored_exactly(model):
    ids = prompt(1, LENGTH)
    words = model.get_input_embeddings().weight
    tied = words is model.lm_head.weight
    with same_afterwards(model), prune(model, budget=0.6, method=HEAD):
        generate(model, ids)
        saved = {name: value.clone() for name, value in model.state_dict().items()}  # turns all back
        assert model.lm_head.weight.is_contiguous()
        generate(model, ids)
        model.to(torch.float64)
        assert words.is_contiguous()
        generate(model, ids)
    assert (model.get_input_embeddings().weight is model.lm_head.weight) is tied
    assert all(torch.equal(value, saved[name]) for name, value in model.state_dict().items())


def test_an_embedding_that_does_more_than_look_up_stays_as_it_is():
    model = tiny("llama", torch.float64, tie_word_embeddings=True)
    model.get_input_embeddings().max_norm = 1e9
    with prune(model, budget=0.6, method=HEAD) as session:
        generate(model, prompt(1, LENGTH))
        assert head_plan(session).backend == "masked" and "shares its weights" in head_plan(session).reason
        assert model.lm_head.weight.is_contiguous()


@pytest.mark.parametrize("name", DENSE_MODELS)
def test_every_model_takes_it(name):
    model = tiny(name, torch.float32)
    with prune(model, budget=0.7, method=HEAD) as session:
        generate(model, prompt(1, LENGTH))
        assert head_plan(session).backend == "rows"
        assert [i.kept for i in session.report.inputs if i.matrix == "lm_head"] != [None]


def test_an_input_that_is_not_the_last_hidden_states_is_refused():
    model = tiny("llama", torch.float64)
    hook = model.lm_head.register_forward_pre_hook(lambda _, args: (args[0] / 2,))
    with hook, prune(model, budget=0.6, method=HEAD), pytest.raises(SessionError, match="Leave head_budget out"):
        generate(model, prompt(1, LENGTH))


def test_an_adapter_that_names_no_head_is_an_error(model, monkeypatch):
    monkeypatch.setattr(type(adapter_for(model)), "head", lambda *_: None)
    with pytest.raises(AdapterError, match=r"head_budget=0\.5 .* names no lm_head"):
        prune(model, method=HEAD)
    assert prune(model) is not None


@pytest.mark.parametrize("value", [0, 1.5, "half", True])
def test_what_is_no_share_is_refused(value):
    with pytest.raises(ConfigError, match="head_budget"):
        Thresholds(head_budget=value)
    with pytest.raises(ConfigError, match=r"head_budget=0\.5 is a setting of method='thresholds'"):
        PopConfig.from_dict({"ratio": 0.4, "method_settings": {"head_budget": 0.5}})
