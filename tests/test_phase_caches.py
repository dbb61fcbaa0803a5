"""Which part of a generation a plain forward belongs to: hand-written loops, and the caches that they bring."""

import copy
from types import SimpleNamespace

import pytest
import torch
from transformers import DynamicCache, LlamaForCausalLM, StaticCache
from transformers.cache_utils import DynamicLayer

from helpers.modes import LENGTH, RATIO, STEPS, alone, backends, generate, loop, pruned
from helpers.observe import partitions, prompt
from helpers.reference import Pop
from pop_mm import ConfigError, PhaseError


@backends
@torch.no_grad()
def test_a_plain_forward_is_pure_prefill(model, backend):
    dense = model(prompt(2, LENGTH)).logits
    with pruned(model, backend) as session:
        assert torch.equal(model(prompt(2, LENGTH)).logits, dense)
        assert torch.equal(model(prompt(2, LENGTH), use_cache=False).logits, dense)
        assert session.report.prompt_tokens == 2 * LENGTH


@backends
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_a_hand_written_loop_may_bring_its_own_cache(model, backend, cache):
    ids = prompt(1, LENGTH)
    expected = alone(model, ids)
    with pruned(model, backend), torch.no_grad():
        own = DynamicCache(config=model.config) if cache == "dynamic" else StaticCache(model.config, max_cache_len=32)
        token, tokens = ids, []
        for _ in range(STEPS):
            token = model(token, past_key_values=own).logits[:, -1].argmax(-1, keepdim=True)
            tokens.append(token)
    assert torch.equal(torch.cat(tokens, 1), expected)


class WithNewNames(LlamaForCausalLM):
    """As in transformers from 5.24 on, in what the cache is called."""

    def forward(self, input_ids=None, cache=None, **kwargs):
        found = super().forward(input_ids, past_key_values=cache, **kwargs)
        return SimpleNamespace(logits=found.logits, cache=found.past_key_values)


@backends
@pytest.mark.parametrize("brings", [True, False])
@torch.no_grad()
def test_a_cache_may_be_called_by_its_new_name(model, backend, brings, monkeypatch):
    ids = prompt(1, LENGTH)
    expected = alone(model, ids)
    monkeypatch.setattr(model, "__class__", WithNewNames)
    with pruned(model, backend) as session:
        token, tokens, cache = ids, [], DynamicCache(config=model.config) if brings else None
        for _ in range(STEPS):
            found = model(token, cache=cache)
            token, cache = found.logits[:, -1].argmax(-1, keepdim=True), found.cache
            tokens.append(token)
        assert session.live_prompts == 1
    assert torch.equal(torch.cat(tokens, 1), expected)


@backends
@torch.no_grad()
def test_two_caches_in_turn_do_not_mix(model, backend):
    prompts = [prompt(1, LENGTH, seed) for seed in (0, 1)]
    expected = [alone(model, ids) for ids in prompts]
    with pruned(model, backend) as session:
        caches = [DynamicCache(config=model.config) for _ in prompts]
        tokens = [[], []]
        for step in range(STEPS):
            for turn, cache in enumerate(caches):
                ids = tokens[turn][-1] if step else prompts[turn]
                tokens[turn].append(model(ids, past_key_values=cache).logits[:, -1].argmax(-1, keepdim=True))
        for turn in range(2):
            assert torch.equal(torch.cat(tokens[turn], 1), expected[turn])
        assert bool(session.timings.masked_forwards) == (backend == "inplace")


@backends
@torch.no_grad()
def test_a_copied_cache_is_refused_until_it_is_adopted(model, backend):
    ids = prompt(1, LENGTH)
    with pruned(model, backend):
        expected = loop(model, 1)[0]
    with pruned(model, backend) as session:
        cache = DynamicCache(config=model.config)
        token = model(ids, past_key_values=cache).logits[:, -1].argmax(-1, keepdim=True)
        twin = copy.deepcopy(cache)
        with pytest.raises(PhaseError, match="adopt"):
            model(token, past_key_values=twin)
        session.adopt(twin, cache)
        for own in (cache, twin):
            tokens = [token]
            for _ in range(STEPS - 1):
                tokens.append(model(tokens[-1], past_key_values=own).logits[:, -1].argmax(-1, keepdim=True))
            assert torch.equal(torch.cat(tokens, 1), expected)


@backends
@torch.no_grad()
def test_a_cache_that_was_filled_outside_is_refused(model, backend):
    cache = model(prompt(1, LENGTH), use_cache=True).past_key_values
    with pruned(model, backend):
        with pytest.raises(PhaseError, match="has not seen"):
            model(prompt(1, 1), past_key_values=cache)
        with pytest.raises(PhaseError, match="has not seen"):
            model.generate(prompt(1, LENGTH + 1), past_key_values=cache, max_new_tokens=2)


@backends
@torch.no_grad()
def test_a_reset_cache_starts_a_new_prompt(model, backend):
    with pruned(model, backend) as session:
        cache = DynamicCache(config=model.config)
        for seed in (0, 1):
            cache.reset()
            token = model(prompt(1, LENGTH, seed), past_key_values=cache).logits[:, -1].argmax(-1, keepdim=True)
            tokens = [token]
            for _ in range(STEPS - 1):
                tokens.append(model(tokens[-1], past_key_values=cache).logits[:, -1].argmax(-1, keepdim=True))
            found = torch.cat(tokens, 1)
            assert session.report.prompt_tokens == LENGTH
    assert torch.equal(found, alone(model, prompt(1, LENGTH, 1)))


@backends
@torch.no_grad()
def test_cropped_steps_are_forgotten(model, backend):
    ids = prompt(1, LENGTH)
    expected = alone(model, ids)
    with pruned(model, backend):
        cache = DynamicCache(config=model.config)
        tokens = [model(ids, past_key_values=cache).logits[:, -1].argmax(-1, keepdim=True)]
        for wrong in (7, 8):
            model(torch.tensor([[wrong]]), past_key_values=cache)
        cache.crop(-2)
        for _ in range(STEPS - 1):
            tokens.append(model(tokens[-1], past_key_values=cache).logits[:, -1].argmax(-1, keepdim=True))
    assert torch.equal(torch.cat(tokens, 1), expected)


@backends
@pytest.mark.parametrize("guards", [(torch.inference_mode, torch.no_grad), (torch.no_grad, torch.inference_mode)])
def test_inference_mode_and_no_grad_may_alternate(model, backend, guards):
    expected = alone(model, prompt(1, LENGTH))
    with pruned(model, backend):
        for guard in guards:
            with guard():
                assert torch.equal(generate(model, prompt(1, LENGTH))[0], expected)


@backends
def test_a_forward_with_gradients_enabled_runs(model, backend):
    with pruned(model, backend):
        expected = loop(model, 1)[1][:2]
        out = model(prompt(1, LENGTH), use_cache=True)
        token = out.logits[:, -1].argmax(-1, keepdim=True)
        step = model(token, past_key_values=out.past_key_values).logits
    torch.testing.assert_close(step[:, -1].detach(), expected[1], rtol=0, atol=1e-8)


@backends
def test_partition_prefill_refuses_chunks(model, backend):
    with pruned(model, backend, prefill="partition"):
        with pytest.raises(ConfigError, match="prefill_chunk_size"):
            model.generate(prompt(1, LENGTH), max_new_tokens=2, prefill_chunk_size=4)
        assert generate(model, prompt(1, LENGTH))[0].shape == (1, STEPS)


@backends
def test_partition_prefill_works_in_a_second_turn(model, backend):
    first, second = prompt(1, LENGTH), prompt(1, 4, seed=1)
    with Pop(model, RATIO, prefill="partition") as reference:
        one = reference.greedy(first, STEPS)
        expected = reference.prefill(torch.cat([one[:, -1:], second], 1))[:, -1].argmax(-1)
    with pruned(model, backend, prefill="partition") as session:
        out = model.generate(first, max_new_tokens=STEPS, return_dict_in_generate=True)
        ids = torch.cat([out.sequences, second], 1)
        out = model.generate(ids, past_key_values=out.past_key_values, max_new_tokens=1)
    assert torch.equal(out[:, -1], expected)
    assert partitions(session) == reference.parts


@backends
@torch.no_grad()
def test_inputs_that_were_prepared_but_never_run_say_nothing_about_another_cache(model, backend):
    ids = prompt(1, LENGTH)
    expected = alone(model, ids)
    with pruned(model, backend):
        cache = DynamicCache(config=model.config)
        tokens = [model(ids, past_key_values=cache).logits[:, -1].argmax(-1, keepdim=True)]
        for _ in range(STEPS - 1):
            other = DynamicCache(config=model.config)
            model.prepare_inputs_for_generation(ids, past_key_values=other, is_first_iteration=True)
            tokens.append(model(tokens[-1], past_key_values=cache).logits[:, -1].argmax(-1, keepdim=True))
    assert torch.equal(torch.cat(tokens, 1), expected)


@backends
@torch.no_grad()
def test_a_cache_does_not_outlive_its_session(model, backend):
    session = pruned(model, backend)
    with session:
        cache = model(prompt(1, LENGTH), use_cache=True).past_key_values
    with session, pytest.raises(PhaseError, match="has not seen"):
        model(prompt(1, 1), past_key_values=cache)


@pytest.mark.parametrize("select", [[1, 0], [0], [1], [1, 1]])
@torch.no_grad()
def test_rows_of_a_cache_that_are_selected_by_hand_take_their_partitions_along(model, select):
    rows = [prompt(1, LENGTH, seed) for seed in (0, 1)]
    expected = torch.cat([alone(model, rows[row]) for row in select])
    with pruned(model, batch="per_sequence"):
        for name in ("reorder_cache", "batch_select_indices"):
            out = model(torch.cat(rows), use_cache=True)
            tokens = [out.logits[select, -1].argmax(-1, keepdim=True)]
            getattr(out.past_key_values, name)(torch.tensor(select))
            for _ in range(STEPS - 1):
                logits = model(tokens[-1], past_key_values=out.past_key_values).logits
                tokens.append(logits[:, -1].argmax(-1, keepdim=True))
            assert torch.equal(torch.cat(tokens, 1), expected)


# caches that drop tokens by themselves ------------------------------------------------------------------------------


class Sink(DynamicLayer):
    """Keeps the first tokens and the latest, as caches of other packages do; may count those that it has dropped too."""

    first, latest, counts_all = 3, 8, False

    def __init__(self):
        super().__init__()
        self.seen = 0

    def update(self, key_states, value_states, *args, **kwargs):
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        self.seen += key_states.shape[-2]
        if keys.shape[-2] > self.first + self.latest:
            self.keys, self.values = (
                torch.cat([t[..., : self.first, :], t[..., -self.latest :, :]], -2) for t in (keys, values)
            )
        return keys, values

    def get_seq_length(self):
        return self.seen if self.counts_all else super().get_seq_length()

    def get_mask_sizes(self, query_length):
        return super().get_seq_length() + query_length, 0


class CountingSink(Sink):
    counts_all = True


def steps_of(model, kind, count=12, rows=1):
    """Logits of a prompt and of single steps, positions counted by hand, and the cache."""
    cache, logits, ids = DynamicCache(), [], prompt(rows, LENGTH)
    cache.layer_class_to_replicate = kind
    more = prompt(rows, count, seed=3)
    logits.append(model(ids, past_key_values=cache).logits[:, -1])
    for step in range(count):
        place = torch.full((rows, 1), LENGTH + step)
        out = model(more[:, step : step + 1], past_key_values=cache, position_ids=place)
        logits.append(out.logits[:, -1])
    return torch.stack(logits), cache


@backends
@pytest.mark.parametrize("batch", ["shared", "per_sequence"])
@pytest.mark.parametrize("family", ["llama", "mixtral"])
@torch.no_grad()
def test_a_cache_that_drops_tokens_is_not_taken_for_a_cropped_one(load, family, backend, batch):
    model = load(family, torch.float64)
    settings = {"batch": batch, "min_tokens": 4, "gamma": 0.3}  # experts wait for their partitions and learn meanwhile
    found = []
    for kind in (CountingSink, Sink):
        with pruned(model, "auto" if backend == "inplace" else backend, **settings) as session:
            logits, cache = steps_of(model, kind)
            found.append((logits, partitions(session)))
            assert cache.layers[0].keys.shape[-2] == 11
    assert found[0][1] == found[1][1]
    torch.testing.assert_close(found[1][0], found[0][0], rtol=0, atol=1e-9)


@torch.no_grad()
def test_a_window_smaller_than_the_prompt(load):
    model = load("mixtral", torch.float64)

    class Small(Sink):
        first, latest = 1, 4

    class CountingSmall(Small):
        counts_all = True

    found = []
    for kind in (CountingSmall, Small):
        with pruned(model, min_tokens=4) as session:
            found.append((steps_of(model, kind)[0], partitions(session)))
    assert found[0][1] == found[1][1]
    torch.testing.assert_close(found[1][0], found[0][0], rtol=0, atol=1e-9)


@pytest.mark.parametrize("family", ["llama", "mixtral"])
@torch.no_grad()
def test_a_cache_that_drops_tokens_and_was_cropped_is_refused(load, family):
    model = load(family, torch.float64)
    with pruned(model, min_tokens=4):
        _, cache = steps_of(model, Sink)
        cache.crop(-2)
        for _ in range(2):
            with pytest.raises(PhaseError, match=r"holds 9 tokens and held 11.*drops tokens by itself"):
                model(prompt()[:, :1], past_key_values=cache)
        cache.reset()
        model(prompt(), past_key_values=cache)  # a new prompt


@backends
@torch.no_grad()
def test_a_sliding_window_gives_what_a_masked_one_gives(load, backend):
    model = load("mistral", torch.float64, sliding_window=6)
    found = []
    for settings in ({}, {"use_cache": False}, {"cache_implementation": "static", "disable_compile": True}):
        with pruned(model, backend):
            found.append(generate(model, prompt(1, LENGTH), steps=8, **settings))
    for tokens, logits in found[1:]:
        assert torch.equal(tokens, found[0][0])
        torch.testing.assert_close(logits, found[0][1], rtol=0, atol=1e-6)
