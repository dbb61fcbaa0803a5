"""A cache that got shorter: what was cropped off it must not choose channels. The right value is a session that never saw it."""

import copy

import pytest
import torch
from test_modality import session_of, vlm
from transformers import DynamicCache, StaticCache

from helpers.modes import LENGTH, STEPS, alone, backends, generate, pruned, with_experts
from helpers.observe import partitions, prompt
from helpers.tiny_models import tiny
from helpers.tiny_vlms import image_inputs
from pop_mm import PhaseError
from pop_mm.adapters import adapter_for

A, B, C = prompt(1, LENGTH), prompt(1, 6, seed=1), prompt(1, 5, seed=2)
both_kinds = pytest.mark.parametrize("model_type", ["llama", "mixtral"])
batches = pytest.mark.parametrize("batch", ["shared", "per_sequence"])
WAIT = {"min_tokens": 4}  # some experts get no partition from a short prompt: they learn while decoding


@pytest.fixture
def model(load, model_type):
    return load() if model_type == "llama" else with_experts(load, model_type)


def new_cache(model):
    return DynamicCache(config=model.config)


def feed(model, cache, ids):
    """One forward: prefill, or a decode step if it is one token. Its last logits."""
    return model(ids, past_key_values=cache).logits[:, -1]


def decode(model, cache, logits, steps=STEPS):
    """Logits of greedy steps [steps + 1, B, V]."""
    found = [logits]
    for _ in range(steps):
        found.append(feed(model, cache, found[-1].argmax(-1, keepdim=True)))
    return torch.stack(found)


def seen(session):
    """What the session knows of the latest prompt: partitions, statistics, counts of tokens."""
    statistics = {name: energy.clone() for name, energy in session.statistics().items()}
    return partitions(session), statistics, session.report.prompt_tokens


def same(found, expected):
    assert found[0] == expected[0]
    assert found[1].keys() == expected[1].keys()
    for name, energy in expected[1].items():
        torch.testing.assert_close(found[1][name], energy, rtol=1e-9, atol=1e-12)
    assert found[2] == expected[2]


def near(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)  # some norms of mixtral compute in float32


@both_kinds
@backends
@batches
@pytest.mark.parametrize("settings", [{}, WAIT, {"prefill": "partition"}])
@torch.no_grad()
def test_a_prompt_cropped_where_a_prefill_began_is_forgotten(model, backend, batch, settings):
    if batch == "per_sequence" and backend == "inplace":
        pytest.skip("refused")
    settings = {"batch": batch, **settings}
    with pruned(model, backend, **settings) as session:
        cache = new_cache(model)
        feed(model, cache, A)
        expected = decode(model, cache, feed(model, cache, C)), seen(session)
    with pruned(model, backend, **settings) as session:
        cache = new_cache(model)
        feed(model, cache, A)
        decode(model, cache, feed(model, cache, B))  # decoded tokens behind it go with it
        cache.crop(LENGTH - cache.get_seq_length())
        found = decode(model, cache, feed(model, cache, C)), seen(session)
    near(found[0], expected[0])
    same(found[1], expected[1])


@both_kinds
@backends
@pytest.mark.parametrize("left", [0, 2, STEPS])
@pytest.mark.parametrize("settings", [{}, WAIT])
@torch.no_grad()
def test_a_crop_may_go_into_the_tokens_decoded_between_two_prompts(model, backend, left, settings):
    """And the next forward may be a decode step, on what the first prompt alone chose."""
    with pruned(model, backend, **settings) as session:
        cache = new_cache(model)
        first = decode(model, cache, feed(model, cache, A), left)
        expected = decode(model, cache, first[-1]), seen(session)
    with pruned(model, backend, **settings) as session:
        cache = new_cache(model)
        decode(model, cache, feed(model, cache, A))
        decode(model, cache, feed(model, cache, B))
        cache.crop(LENGTH + left - cache.get_seq_length())
        found = decode(model, cache, first[-1]), seen(session)
    near(found[0], expected[0])
    same(found[1], expected[1])


@both_kinds
@backends
@torch.no_grad()
def test_a_crop_through_generate_is_forgotten_too(model, backend):
    ids = torch.cat([A, C], 1)
    with pruned(model, backend) as session:
        cache = new_cache(model)
        feed(model, cache, A)
        expected, known = generate(model, ids, past_key_values=cache), seen(session)
    with pruned(model, backend) as session:
        cache = new_cache(model)
        feed(model, cache, A)
        generate(model, torch.cat([A, B], 1), past_key_values=cache)
        cache.crop(LENGTH - cache.get_seq_length())
        found = generate(model, ids, past_key_values=cache)
        same(seen(session), known)
    assert torch.equal(found[0], expected[0])
    near(found[1], expected[1])


@both_kinds
@backends
@pytest.mark.parametrize("through_generate", [True, False])
@torch.no_grad()
def test_a_crop_inside_a_prefill_is_refused_and_adopting_the_prefix_is_not(model, backend, through_generate):
    both, ids = torch.cat([A, B], 1), torch.cat([A, C], 1)
    expected = alone(model, ids)
    with pruned(model, backend) as session:
        cache = new_cache(model)
        if through_generate:
            generate(model, both, past_key_values=cache)
        else:
            feed(model, cache, both)
        known = seen(session)
        cache.crop(LENGTH - cache.get_seq_length())
        for again in (C, C[:, :1]):
            with pytest.raises(PhaseError, match=rf"cropped to {LENGTH} .* 0 to {LENGTH + 6}.*adopt"):
                feed(model, cache, again)
            assert cache.get_seq_length() == LENGTH, "the forward has begun"
        with pytest.raises(PhaseError, match="adopt"):
            generate(model, ids, past_key_values=cache)
        same(seen(session), known)
        prefix = new_cache(model)
        feed(model, prefix, A)
        for suffix in (B, C):
            twin = copy.deepcopy(prefix)
            session.adopt(twin, prefix)
            found = decode(model, twin, feed(model, twin, suffix), STEPS - 1)
    assert torch.equal(found[:, 0].argmax(-1), expected[0])


@both_kinds
@backends
@torch.no_grad()
def test_a_copy_may_be_cropped_while_the_original_goes_on(model, backend):
    with pruned(model, backend):
        whole, part = new_cache(model), new_cache(model)
        for cache in (whole, part):
            last = feed(model, cache, A)
        expected = [decode(model, whole, feed(model, whole, B)), decode(model, part, last)]
    with pruned(model, backend) as session:
        cache = new_cache(model)
        feed(model, cache, A)
        after = feed(model, cache, B)
        twin = copy.deepcopy(cache)
        session.adopt(twin, cache)
        twin.crop(-B.shape[1])
        found = [[after], [last]]
        for _ in range(STEPS):
            for own, one in zip(found, (cache, twin), strict=True):
                own.append(feed(model, one, own[-1].argmax(-1, keepdim=True)))
    for own, other in zip(found, expected, strict=True):
        near(torch.stack(own), other)


@both_kinds
@torch.no_grad()
def test_rows_that_were_exchanged_since_take_what_was_known_along(model):
    rows, more, order = prompt(2, LENGTH), prompt(2, 6, seed=1), torch.tensor([1, 0])
    with pruned(model, batch="per_sequence") as session:
        cache = new_cache(model)
        last = feed(model, cache, rows[order])
        expected = decode(model, cache, last), seen(session)
    with pruned(model, batch="per_sequence") as session:
        cache = new_cache(model)
        feed(model, cache, rows)
        feed(model, cache, more)
        cache.reorder_cache(order)
        cache.crop(-6)
        found = decode(model, cache, last), seen(session)
    near(found[0], expected[0])
    same(found[1], expected[1])


@both_kinds
@torch.no_grad()
def test_prompts_long_ago_are_refused_and_late_ones_are_not(model):
    turns = [prompt(1, 3, seed) for seed in range(9)]
    with pruned(model) as session:
        cache, lengths = new_cache(model), [0]
        for ids in turns:
            feed(model, cache, ids)
            lengths.append(cache.get_seq_length())
        old = copy.deepcopy(cache)
        session.adopt(old, cache)
        for turn in (8, 7, 5):  # one after another
            cache.crop(lengths[turn] - cache.get_seq_length())
            feed(model, cache, C)
            assert session.report.prompt_tokens == lengths[turn] + C.shape[1]
        old.crop(lengths[1] - lengths[-1])
        with pytest.raises(PhaseError, match="cropped to 3 tokens"):
            feed(model, old, C)


@both_kinds
@torch.no_grad()
def test_the_beginning_of_a_prompt_outlives_the_chunks_that_generate_makes_of_it(model):
    ids = torch.cat([A, prompt(1, 24, seed=3)], 1)
    with pruned(model) as session:
        cache = new_cache(model)
        last = feed(model, cache, A)
        known = seen(session)
        generate(model, ids, past_key_values=cache, prefill_chunk_size=2)
        cache.crop(LENGTH - cache.get_seq_length())
        feed(model, cache, last.argmax(-1, keepdim=True))
        same(seen(session), known)


@both_kinds
@backends
@torch.no_grad()
def test_a_static_cache_that_was_reset_begins_anew(model, backend):
    with pruned(model, backend) as session:
        cache = StaticCache(model.config, max_cache_len=40)
        for ids in (A, B):
            cache.reset()
            found = decode(model, cache, feed(model, cache, ids))
            assert session.report.prompt_tokens == ids.shape[1]
    with pruned(model, backend):
        cache = StaticCache(model.config, max_cache_len=40)
        near(found, decode(model, cache, feed(model, cache, B)))


@backends
@pytest.mark.parametrize("recorded", [True, False])
@torch.no_grad()
def test_a_sliding_cache_may_be_cropped(load, backend, recorded):
    model = load("mistral", sliding_window=12 if recorded else 64)
    with pruned(model, backend) as session:
        cache = new_cache(model)
        feed(model, cache, A)
        expected = decode(model, cache, feed(model, cache, C)), seen(session)
    with pruned(model, backend) as session:
        cache = new_cache(model)
        feed(model, cache, A)
        if recorded:
            cache.activate_past_recording()
        feed(model, cache, B)
        cache.crop(-B.shape[1])
        found = decode(model, cache, feed(model, cache, C)), seen(session)
    near(found[0], expected[0])
    same(found[1], expected[1])


# decode steps ---------------------------------------------------------------------------------------------------------


@both_kinds
@backends
@batches
@pytest.mark.parametrize("wrong", [1, 3, 80])
@torch.no_grad()
def test_cropped_steps_teach_nothing(model, backend, batch, wrong):
    """Not even experts that still wait for their partition."""
    if batch == "per_sequence" and backend == "inplace":
        pytest.skip("refused")
    ids, settings = prompt(1, 2, seed=2), {"batch": batch, "min_tokens": 8}
    with pruned(model, backend, **settings) as session:
        cache = new_cache(model)
        expected = decode(model, cache, decode(model, cache, feed(model, cache, ids), 2)[-1], 12), seen(session)
    with pruned(model, backend, **settings) as session:
        cache = new_cache(model)
        first = decode(model, cache, feed(model, cache, ids), 2)[-1]
        for token in prompt(1, wrong, seed=5)[0]:
            feed(model, cache, token.view(1, 1))
        cache.crop(-wrong)
        found = decode(model, cache, first, 12), seen(session)
    near(found[0], expected[0])
    same(found[1], expected[1])


@pytest.mark.parametrize("model_type", ["mixtral"])
@backends
@torch.no_grad()
def test_a_long_answer_that_is_cropped_off_as_a_whole_taught_nothing(model, backend):
    """However many of its steps taught something: what was known before the first of them is kept."""
    ids, settings = prompt(1, 2, seed=2), {"min_tokens": 200}
    with pruned(model, backend, **settings) as session:
        cache = new_cache(model)
        first = feed(model, cache, ids)
        expected = decode(model, cache, first, 4), seen(session)
        feed(model, cache, ids[:, :1])
        for token in prompt(1, 99, seed=5)[0]:
            feed(model, cache, token.view(1, 1))
        cache.crop(-104)
        assert cache.get_seq_length() == 2
        found = decode(model, cache, first, 4), seen(session)
        near(found[0], expected[0])
        same(found[1], expected[1])
        for token in prompt(1, 99, seed=5)[0]:
            feed(model, cache, token.view(1, 1))
        cache.crop(-60)
        with pytest.raises(PhaseError, match=r"can only be forgotten from token \d+ on"):
            feed(model, cache, ids[:, :1])


@pytest.mark.parametrize("model_type", ["mixtral"])
@backends
@torch.no_grad()
def test_experts_placed_by_cropped_steps_are_placed_anew(model, backend):
    """A partition learned from cropped steps has been used in place before it is unlearned."""
    ids, settings = prompt(1, 2, seed=2), {"min_tokens": 2}
    with pruned(model, "masked", **settings):
        cache = new_cache(model)
        expected = decode(model, cache, feed(model, cache, ids), 16)
    with pruned(model, backend, **settings):
        cache = new_cache(model)
        first = feed(model, cache, ids)
        for token in prompt(1, 20, seed=5)[0]:
            feed(model, cache, token.view(1, 1))
        cache.crop(-20)
        near(decode(model, cache, first, 16), expected)


@both_kinds
@backends
@pytest.mark.parametrize("length", [1, 2, 12])
def test_a_pruned_draft_is_fed_again_what_is_cropped_off_its_prompt(model, backend, length, model_type):
    """Assisted decoding crops the draft's cache into its prompt when nothing was accepted."""
    assistant, ids = tiny(model_type, torch.float64, seed=1), prompt(1, length)
    expected = alone(model, ids)
    with pruned(model, backend), pruned(assistant, backend, **WAIT):
        found = generate(model, ids, assistant_model=assistant)[0]
    assert torch.equal(found, expected)


# modalities -----------------------------------------------------------------------------------------------------------


@backends
@pytest.mark.parametrize("model_type", ["llava", "aria"])
@torch.no_grad()
def test_the_picture_of_a_cropped_turn_is_forgotten(backend, model_type):
    model = vlm(model_type)
    text, picture = prompt(1, LENGTH), image_inputs(model_type, model, images=[1], text_len=[5])
    image = adapter_for(model).modality_token_ids(model)["image"]
    assert int((picture["input_ids"] == image).sum())
    settings = {"modality_weights": {"image": 4.0}}
    with session_of(model, backend, **settings) as session:
        cache = new_cache(model.model.language_model)
        logits = feed(model, cache, text)
        expected = decode(model, cache, logits), seen(session), session.report.modality_tokens
    with session_of(model, backend, **settings) as session:
        cache = new_cache(model.model.language_model)
        feed(model, cache, text)
        picture["attention_mask"] = torch.ones(1, LENGTH + picture["input_ids"].shape[1], dtype=torch.long)
        model(**picture, past_key_values=cache)
        assert session.report.modality_tokens["image"]
        cache.crop(-picture["input_ids"].shape[1])
        found = decode(model, cache, logits), seen(session), session.report.modality_tokens
    near(found[0], expected[0])
    same(found[1], expected[1])
    assert found[2] == expected[2]
