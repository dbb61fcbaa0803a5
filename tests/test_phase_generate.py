"""However ``generate`` is called, and whatever it is given: which forward is which, and whose rows count."""

import functools

import pytest
import torch
from transformers import GenerationConfig, GenerationMixin, StoppingCriteria

from helpers.covering import covers
from helpers.modes import BACKENDS, LENGTH, STEPS, backends, generate, pruned, with_experts
from helpers.observe import partitions, prompt
from helpers.tiny_models import tiny
from pop_mm import PhaseError

both_kinds = pytest.mark.parametrize("model_type", ["llama", "mixtral"])


@pytest.fixture
def model(load, model_type):
    return load() if model_type == "llama" else with_experts(load, model_type)


# what is there before the session, and goes past its generate
KEPT = {
    "bound": lambda model: model.generate,
    "partial": lambda model: functools.partial(model.generate),
    "class": lambda model: functools.partial(type(model).generate, model),
    "mixin": lambda model: functools.partial(GenerationMixin.generate, model),
}
kept_ones = pytest.mark.parametrize("kept", KEPT)


class Stop(StoppingCriteria):
    """Ends the first row after so many tokens."""

    def __init__(self, length):
        self.length = length

    def __call__(self, ids, scores, **_):
        return torch.tensor([row == 0 and ids.shape[1] >= self.length for row in range(len(ids))])


def logits_of(out):
    return torch.stack([logits.double() for logits in out.logits])


def near(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)  # some norms of mixtral compute in float32


def ending(model, ids, steps=8):
    """A config with which the first row ends early and the second does not; found in this session."""
    settings = {"max_new_tokens": steps, "pad_token_id": 0, "return_dict_in_generate": True, "output_logits": True}
    free = generate(model, ids, steps)[0]
    eos = int(next(token for token in free[0, :4] if token not in free[1]))
    return GenerationConfig(**settings, do_sample=False, eos_token_id=eos)


# stop ids -------------------------------------------------------------------------------------------------------------


@both_kinds
@backends
def test_stop_ids_are_found_in_a_config_given_by_position(model, backend):
    ids = prompt(2, LENGTH)
    with pruned(model, backend):
        config = ending(model, ids)
        expected = model.generate(ids, generation_config=config)
        found = model.generate(ids, config)
    assert (expected.sequences[0] == 0).any(), "no row has ended early"
    near(logits_of(found), logits_of(expected))


@both_kinds
@backends
@kept_ones
def test_stop_ids_are_found_by_a_generate_from_before_the_session(model, backend, kept):
    ids, call = prompt(2, LENGTH), KEPT[kept](model)
    with pruned(model, backend):
        config = ending(model, ids)
        expected = logits_of(model.generate(ids, generation_config=config))
        near(logits_of(call(ids, generation_config=config)), expected)
        near(logits_of(call(ids, config)), expected)
        settings = {key: value for key, value in config.to_diff_dict().items() if key != "transformers_version"}
        near(logits_of(call(ids, **settings)), expected)
        own, model.generation_config = model.generation_config, config
        near(logits_of(call(ids)), expected)
        model.generation_config = own


@both_kinds
@backends
@kept_ones
def test_rows_that_other_criteria_end_do_not_count(model, backend, kept):
    """Their tokens are pads from then on."""
    ids, call, criteria = prompt(2, LENGTH), KEPT[kept](model), [Stop(LENGTH + 2)]
    never = {"eos_token_id": 91, "pad_token_id": 0, "max_new_tokens": 6}
    settings = {**never, "return_dict_in_generate": True, "output_logits": True}
    with pruned(model, backend):
        expected = model.generate(ids, stopping_criteria=criteria, **settings)
        for one in (model.generate, call):
            near(logits_of(one(ids, None, None, criteria, **settings)), logits_of(expected))
    assert (expected.sequences[0, LENGTH + 2 :] == 0).all()


@backends
@pytest.mark.parametrize("model_type", ["llama"])
def test_finished_rows_do_not_count_when_a_custom_loop_generates_within(model, backend):
    ids = prompt(2, LENGTH)

    def twice(model, input_ids, logits_processor, stopping_criteria, generation_config, **_):
        type(model).generate(model, input_ids, max_new_tokens=3, do_sample=False)  # knows other stop ids
        return type(model).generate(model, input_ids, generation_config)

    with pruned(model, backend):
        config = ending(model, ids)
        expected = model.generate(ids, generation_config=config)
        found = model.generate(ids, config, custom_generate=twice)
        near(logits_of(found), logits_of(expected))
        near(logits_of(model.generate(ids, config)), logits_of(expected))


@both_kinds
@backends
@pytest.mark.parametrize("use_cache", [True, False])
def test_a_finished_row_does_not_count_without_guidance_either(model, backend, use_cache):
    """What it is fed from then on makes no difference to the other row."""
    ids, found = prompt(2, LENGTH), []
    settings = {"max_new_tokens": 8, "guidance_scale": 1.5, "use_cache": use_cache}
    settings |= {"return_dict_in_generate": True, "output_logits": True}
    with pruned(model, backend, gamma=0.5):
        free = model.generate(ids, **settings).sequences[:, LENGTH:]
        eos = int(next(token for token in free[0, :4] if token not in free[1]))
        for pad in (0, 5, 60):
            out = model.generate(ids, eos_token_id=eos, pad_token_id=pad, **settings)
            found.append(logits_of(out)[:, 1])
            assert out.sequences[0, -1] == pad
    for one in found[1:]:
        near(one, found[0])


# without a cache ------------------------------------------------------------------------------------------------------


@both_kinds
@backends
@kept_ones
def test_a_generate_from_before_prunes_without_a_cache(model, backend, kept):
    ids, call = prompt(2, LENGTH), KEPT[kept](model)
    dense = generate(model, ids)[1]
    settings = {"max_new_tokens": STEPS, "return_dict_in_generate": True, "output_logits": True}
    with pruned(model, backend) as session, torch.no_grad():
        expected = generate(model, ids)[1]
        parts = partitions(session)
        near(logits_of(call(ids, use_cache=False, **settings)), expected)
        assert partitions(session) == parts
        near(logits_of(call(ids, GenerationConfig(use_cache=False, **settings))), expected)
        longer = model(torch.cat([ids, ids], 1), use_cache=False).logits  # not of that generation: all prefill
    assert not torch.allclose(expected[1:], dense[1:])
    with torch.no_grad():
        near(longer, model(torch.cat([ids, ids], 1)).logits)


@both_kinds
@kept_ones
def test_a_generate_from_before_that_failed_leaves_nothing_behind(model, kept):
    ids, call = prompt(1, LENGTH), KEPT[kept](model)

    def fails(ids, scores, **_):
        raise KeyError

    with torch.no_grad():
        dense = model(torch.cat([ids, ids], 1)).logits
    with pruned(model), torch.no_grad():
        try:
            call(ids, stopping_criteria=[fails], use_cache=False, max_new_tokens=3)
        except KeyError:
            near(model(torch.cat([ids, ids], 1), use_cache=False).logits, dense)
        else:
            pytest.fail("it has not failed")


@both_kinds
@backends
@kept_ones
def test_guidance_through_a_generate_from_before(model, backend, kept):
    """With a cache each branch has its own; without one nothing tells them apart, so that is refused."""
    ids, call = prompt(1, LENGTH), KEPT[kept](model)
    settings = {"max_new_tokens": STEPS, "guidance_scale": 1.5, "negative_prompt_ids": prompt(1, 5, seed=4)}
    forwards = []
    hook = model.register_forward_pre_hook(lambda *_: forwards.append(1))
    with pruned(model, backend):
        expected = model.generate(ids, **settings)
        assert torch.equal(call(ids, **settings), expected)
        forwards.clear()
        with pytest.raises(PhaseError, match=r"guidance_scale.*Call model.generate"):
            call(ids, use_cache=False, **settings)
        assert not forwards
        assert torch.equal(model.generate(ids, use_cache=False, **settings), expected)
    hook.remove()


@both_kinds
@backends
def test_the_model_has_its_own_methods_back(model, backend):
    before = dict(vars(model))
    with pruned(model, backend):
        model.generate(prompt(1, LENGTH), max_new_tokens=2)
    assert vars(model).keys() == before.keys()


# logits_to_keep -------------------------------------------------------------------------------------------------------


MODES = {
    "greedy": {},
    "sampled": {"do_sample": True, "top_k": 20},
    "beams": {"num_beams": 3},
    "chunked": {"prefill_chunk_size": 4},
    "static": {"cache_implementation": "static", "disable_compile": True},
    "no_cache": {"use_cache": False},
    "lookup": {"prompt_lookup_num_tokens": 3},
    "assisted": {"assistant_model": None},
}


@covers(model_type=("llama", "mixtral"), backend=BACKENDS, mode=MODES)
def test_logits_to_keep_makes_no_token_of_the_prompt_a_decode_step(model, backend, mode, model_type):
    ids, settings = prompt(1, 4).repeat(1, 3), dict(MODES[mode])  # the lookup finds candidates at once
    if mode == "assisted":
        settings["assistant_model"] = tiny(model_type, torch.float64, seed=1)
    with pruned(model, backend) as session:
        torch.manual_seed(0)
        expected = generate(model, ids, 8, **settings)
        parts = partitions(session)
        for keep in (1, 2, 4, 5):
            for call in (model.generate, functools.partial(type(model).generate, model)):
                torch.manual_seed(0)
                out = call(
                    ids,
                    max_new_tokens=8,
                    logits_to_keep=keep,
                    return_dict_in_generate=True,
                    output_logits=True,
                    **settings,
                )
                assert torch.equal(out.sequences[:, ids.shape[1] :], expected[0])
                near(logits_of(out), expected[1])
                assert partitions(session) == parts
                assert session.report.prompt_tokens == ids.numel() * settings.get("num_beams", 1)


@both_kinds
@backends
@torch.no_grad()
def test_a_plain_forward_that_keeps_some_logits_is_all_prompt(model, backend):
    ids = prompt(2, LENGTH)
    dense = model(ids).logits
    with pruned(model, backend) as session:
        model(ids)
        parts = partitions(session)
        for keep in (1, 3, torch.tensor([2, 5])):
            found = model(ids, logits_to_keep=keep, use_cache=True).logits
            near(found, dense[:, -keep:] if isinstance(keep, int) else dense[:, keep])
            assert partitions(session) == parts
            assert session.report.prompt_tokens == 2 * LENGTH
