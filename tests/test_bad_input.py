"""What a user can get wrong: a clear error that says what to do, and a model that is bit for bit what it was."""

import pytest
import torch

import pop_mm
from helpers.modes import LENGTH, backends, config_of, generate, pruned
from helpers.observe import differences, fingerprint, prompt, same_afterwards
from helpers.tiny_models import tiny
from pop_mm import AdapterError, ConfigError, NonFiniteError, PhaseError, PopConfig, PopError, SessionError, prune
from pop_mm.methods.scoring import Scorer

SETTINGS = [
    ({"ratio": -0.1}, r"ratio must lie in \[0, 1\); got -0.1"),
    ({"ratio": 1.0}, r"ratio must lie in \[0, 1\); got 1"),
    ({"ratio": float("nan")}, r"ratio must be a number"),
    ({"ratio": "0.4"}, r"ratio must be a number.*'0.4'"),
    ({"ratio": True}, r"ratio must be a number"),
    ({"ratio": 0.4, "budget": 0.6}, "ratio=0.4 and budget=0.6 were both given. Give one"),
    ({"ratio": 0.4, "gamma": -0.1}, r"gamma must lie in \[0, 1\]; got -0.1"),
    ({"ratio": 0.4, "gamma": 1.1}, r"gamma must lie in \[0, 1\]; got 1.1"),
    ({"ratio": 0.4, "backend": "gpu"}, "backend must be one of 'auto', 'masked', 'inplace'; got 'gpu'"),
    ({"ratio": 0.4, "scorer": "wandaa"}, "Unknown scorer 'wandaa'.*Did you mean 'wanda'"),
    ({"ratio": 0.4, "gama": 0.1}, "Unknown setting 'gama'.*Did you mean 'gamma'"),
    ({"ratio": 0.4, "batch": "per_sequence", "backend": "inplace"}, "per_sequence.*Use backend='auto' or 'masked'"),
    ({"ratio": 0.4, "layer_ratios": {7: 0.2}}, r"layer_ratios names layers \[7\]; layers with a prunable FFN: 0 to 1"),
    ({"ratio": 1 - 1e-12, "scope": "ffn"}, "none of an FFN's 64 channels; it must not exceed 0.984375"),
    ({"ratio": 0.4, "scope": "ffn", "layer_ratios": {1: 1 - 1e-12}}, "none of an FFN's 64 channels"),
    ({"ratio": 0.4, "layer_ratios": {0: 0.3, 1: 0.3}}, r"every FFN.* 20\.0% .* 0\.4\. .*ratio=0\.200.*scope='ffn'"),
    ({"ratio": 0.9}, r"overall ratio of 0.9 needs .*must stay below 0\.\d+ for this model; or set scope='ffn'"),
]


@backends
@pytest.mark.parametrize(("settings", "says"), SETTINGS)
def test_a_setting_that_makes_no_sense_is_refused_before_anything_changes(model, backend, settings, says):
    before = fingerprint(model)
    with pytest.raises(ConfigError, match=f"(?s){says}"):
        prune(model, config_of(**{"backend": backend, **settings}))
    assert differences(before, fingerprint(model)) == []


def test_the_maximum_that_the_error_names_is_the_maximum(model):
    with pytest.raises(ConfigError) as error:
        prune(model, ratio=0.95)
    largest = float(str(error.value).split("must stay below ")[1].split(" ")[0])
    prune(model, ratio=largest - 0.001)
    with pytest.raises(ConfigError):
        prune(model, ratio=largest + 0.001)


def test_a_ratio_given_twice_is_refused(model):
    with pytest.raises(ConfigError, match="twice"):
        prune(model, 0.4, ratio=0.4)
    with pytest.raises(ConfigError, match="not both"):
        prune(model, PopConfig(0.4), method="static")


@pytest.mark.parametrize("adapter", ["llama", object(), int])
def test_an_adapter_that_is_none_is_refused(model, adapter):
    with pytest.raises(AdapterError, match="adapter"):
        prune(model, 0.4, adapter=adapter)


@pytest.mark.parametrize("thing", [torch.nn.Linear(4, 4), "model", None, 3])
def test_a_thing_that_is_no_model_is_refused(thing):
    with pytest.raises(PopError, match=r"transformers|model"):
        prune(thing, 0.4)


class Broken(Scorer):
    """Fails on the second FFN."""

    name = "tests_broken"

    def channel_weight(self, ffn):
        return torch.ones(ffn.size, dtype=torch.float64) * (1 // (1 - ffn.layer))


@backends
def test_an_error_while_attaching_leaves_no_trace(model, backend):
    session = pruned(model, backend, scorer=Broken())
    with same_afterwards(model):
        for _ in range(2):
            with pytest.raises(ZeroDivisionError):
                session.attach()
            assert not session.attached
    with pruned(model, backend):  # the model does not count as pruned
        generate(model, prompt())


@backends
def test_a_model_in_training_mode_is_refused(backend):
    model = tiny("llama", torch.float64).train()
    with same_afterwards(model), pytest.raises(SessionError, match=r"model\.eval\(\)"), pruned(model, backend):
        pass


@backends
def test_a_model_put_in_training_mode_inside_is_refused(backend):
    model = tiny("llama", torch.float64)
    model.generate(prompt(), max_new_tokens=1)
    with same_afterwards(model), pruned(model, backend):
        model.train()
        with pytest.raises(SessionError, match=r"model\.eval\(\)"):
            model(prompt())
        model.eval()
        model.generate(prompt(), max_new_tokens=2)


def test_a_model_on_the_meta_device_is_refused():
    with torch.device("meta"):
        model = tiny("llama")
    with pytest.raises(SessionError, match=r"meta device.*load"), prune(model, 0.4):
        pass


@backends
@pytest.mark.parametrize(
    ("ids", "mask"),
    [
        (torch.zeros(1, 0, dtype=torch.long), None),
        (torch.zeros(0, 4, dtype=torch.long), None),
        (torch.full((1, 4), 5), torch.zeros(1, 4, dtype=torch.long)),
        (torch.full((2, 4), 5), torch.zeros(2, 4, dtype=torch.long)),
    ],
    ids=["no columns", "no rows", "one padded row", "two padded rows"],
)
def test_an_empty_prompt_is_refused(model, backend, ids, mask):
    def prompt_and_step():
        out = model(ids, attention_mask=mask, use_cache=True)
        model(torch.full((len(ids), 1), 5), past_key_values=out.past_key_values)

    with pruned(model, backend), torch.no_grad(), pytest.raises(PhaseError, match="empty"):
        prompt_and_step()


def test_an_empty_row_is_refused_per_sequence(model):
    ids, mask = prompt(2, LENGTH), torch.ones(2, LENGTH, dtype=torch.long)
    mask[1] = 0
    with pruned(model, batch="per_sequence"), pytest.raises(PhaseError, match=r"Row 1 .*empty"):
        model.generate(ids, attention_mask=mask, max_new_tokens=3)


@backends
def test_generate_with_an_empty_prompt_is_refused(model, backend):
    with pruned(model, backend), pytest.raises((PhaseError, ValueError), match=r"(?i)empty|non-empty|at least"):
        model.generate(torch.zeros(1, 0, dtype=torch.long), max_new_tokens=2)


@backends
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", ["weight", "input"])
@pytest.mark.parametrize("prefill", ["dense", "partition"])
def test_activations_that_are_not_finite_are_refused_in_prefill(backend, value, where, prefill):
    model = tiny("llama", torch.float64)
    model.generate(prompt(), max_new_tokens=1)
    if where == "weight":
        model.model.layers[1].mlp.up_proj.weight.data[3, 2] = value
    embeds = model.get_input_embeddings()(prompt(1, LENGTH)).detach()
    if where == "input":
        embeds[0, 2] = value
    before = fingerprint(model)
    with pruned(model, backend, prefill=prefill):
        with pytest.raises(NonFiniteError, match=r"layers\.\d\.mlp"):
            model.generate(inputs_embeds=embeds, max_new_tokens=3)
        if where == "input":  # and the session goes on
            generate(model, prompt())
    assert differences(before, fingerprint(model)) == []


@backends
def test_padding_may_hold_anything(model, backend):
    embeds = model.get_input_embeddings()(prompt(2, LENGTH)).detach()
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[0, :3] = 0
    with pruned(model, backend):
        expected = model.generate(inputs_embeds=embeds, attention_mask=mask, max_new_tokens=4)
        embeds[0, :3] = 1e6
        found = model.generate(inputs_embeds=embeds, attention_mask=mask, max_new_tokens=4)
    assert torch.equal(found, expected)


@backends
def test_decode_activations_that_are_not_finite_rank_last(model, backend):
    with pruned(model, backend), torch.no_grad():
        out = model(prompt(1, LENGTH), use_cache=True)
        bad = torch.full((1, 1, model.config.hidden_size), float("nan"), dtype=torch.float64)
        assert model(inputs_embeds=bad, past_key_values=out.past_key_values).logits.isnan().all()
        generate(model, prompt())


@backends
@pytest.mark.parametrize(
    "inputs",
    [
        {"input_ids": torch.full((1, 4), 5.0)},
        {"input_ids": torch.full((1, 4), 96)},
        {"inputs_embeds": torch.zeros(1, 4, 7, dtype=torch.float64)},
        {"inputs_embeds": torch.zeros(1, 4, 32), "input_ids": torch.full((1, 4), 5)},
        {},
    ],
    ids=["float ids", "unknown id", "wrong width", "two kinds", "nothing"],
)
def test_input_of_a_wrong_kind_is_an_error_and_the_session_goes_on(model, backend, inputs):
    with pruned(model, backend):
        expected = generate(model, prompt())[0]
        with pytest.raises((RuntimeError, ValueError, IndexError, PopError)):
            model(**inputs)
        assert torch.equal(generate(model, prompt())[0], expected)


@backends
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_input_of_another_float_dtype_is_what_the_dense_model_makes_of_it(model, backend, dtype):
    embeds = model.get_input_embeddings()(prompt()).detach().to(dtype)
    expected = model(inputs_embeds=embeds).logits
    with pruned(model, backend):
        assert torch.equal(model(inputs_embeds=embeds).logits, expected)
        model.generate(inputs_embeds=embeds, max_new_tokens=3)


@backends
def test_legacy_tuples_as_a_cache_are_refused(model, backend):
    with pruned(model, backend), pytest.raises(PhaseError, match="Cache"):
        model(prompt(), past_key_values=((torch.zeros(1), torch.zeros(1)),))


@backends
def test_a_part_of_the_model_called_alone_is_refused(model, backend):
    with pruned(model, backend), pytest.raises(PhaseError, match="outside a forward of the pruned model"):
        model.model(prompt())


def test_other_rows_on_a_per_sequence_cache_are_refused(model):
    with pruned(model, batch="per_sequence"), torch.no_grad():
        out = model(prompt(2, LENGTH), use_cache=True)
        out.past_key_values.batch_repeat_interleave(2)
        with pytest.raises(PopError, match=r"2 rows.*continued with 4"):
            model(prompt(4, 1), past_key_values=out.past_key_values)


def test_a_cache_that_is_not_from_here_cannot_be_adopted(model):
    with pruned(model) as session:
        cache = model(prompt(), use_cache=True).past_key_values
        with pytest.raises(PhaseError, match="was not prefilled in this session"):
            session.adopt(cache, type(cache)())


def test_every_error_is_a_pop_error():
    errors = [getattr(pop_mm, name) for name in pop_mm.__all__ if name.endswith("Error")]
    assert all(issubclass(error, PopError) for error in errors)
