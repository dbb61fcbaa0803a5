"""The invariants of the design over every type with routed experts, the implementations of transformers, and both backends.

Experts need four tokens here before they have a partition, so that a prompt leaves some without: in every mode they wait,
learn and get one while decoding, and what assisted decoding rejects must leave no trace.
"""

import copy
import threading

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from helpers.covering import covers
from helpers.modes import (
    BACKENDS,
    EXPERT_LAYOUTS,
    IMPLEMENTATIONS,
    LENGTH,
    MODES,
    STEPS,
    backends,
    dense_run,
    expert_layouts,
    generate,
    greedy_run,
    implementations,
    in_turn,
    left_padded,
    pruned,
    with_experts,
)
from helpers.observe import ActiveExperts, differences, fingerprint, of_experts, prompt, same_afterwards
from helpers.reference_moe import experts_of
from helpers.tiny_models import MOE_MODELS, tiny

WAIT = {"min_tokens": 4}
every_type = pytest.mark.parametrize("model_type", MOE_MODELS)
# every layout on all implementations, every other type on one of them in turn
every_type_on_implementations = pytest.mark.parametrize(
    ("model_type", "implementation"), in_turn(MOE_MODELS, EXPERT_LAYOUTS, IMPLEMENTATIONS)
)
# each backend and each implementation; that both backends are equal is tested with every layout and implementation
KINDS = [("eager", "masked"), ("eager", "inplace"), ("batched_mm", "inplace"), ("grouped_mm", "masked")]
# how state hangs on prompts and caches is no layout's matter: one layout in each of them, the others in turn
kinds = pytest.mark.parametrize(
    ("model_type", "implementation", "backend"),
    [(model_type, *kind) for model_type, kind in in_turn(EXPERT_LAYOUTS, ("mixtral",), KINDS)],
)
EXACT = [mode for mode, (_, rows) in MODES.items() if rows and mode not in ("greedy", "single")]


def near(found, expected, model):
    """Logits agree as far as the model's dtype lets them: some norms compute in float32 whatever the dtype."""
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 if model.dtype == torch.float64 else 1e-4)


def state_of(session):
    """What the reports say of the experts, as plain values."""
    found = []
    for ffn in of_experts(session):
        p, listed = ffn.partition, ffn.experts.partitioned + ffn.experts.late
        parts = [[t[e].tolist() for t in (p.retained, p.candidates, p.pruned)] for e in sorted(listed)]
        found.append((ffn.experts, parts))
    return found


# over every type --------------------------------------------------------------------------------------------------------


@every_type_on_implementations
def test_ratio_0_is_dense_bit_for_bit(load, model_type, implementation):
    model = with_experts(load, model_type, implementation)
    dense = generate(model, prompt(2, LENGTH), 3)
    for backend in BACKENDS:
        with pruned(model, backend, ratio=0.0):
            again = generate(model, prompt(2, LENGTH), 3)
        assert torch.equal(again[0], dense[0])
        assert torch.equal(again[1], dense[1])


@every_type_on_implementations
def test_inplace_selects_and_decodes_like_masked(load, model_type, implementation):
    model = with_experts(load, model_type, implementation)
    found = {}
    for backend in BACKENDS:
        with pruned(model, backend, **WAIT) as session, ActiveExperts(model) as seen:
            found[backend] = MODES["greedy"][0](model), seen.seen, state_of(session)
    (one, one_seen, one_state), (other, other_seen, other_state) = found.values()
    assert torch.equal(one[0], other[0])
    near(one[1], other[1], model)
    assert one_state == other_state
    assert one_seen == other_seen
    assert any(experts.partitioned or experts.late for experts, _ in one_state)


@every_type
def test_the_prefill_is_the_dense_model(load, model_type):
    """On the implementations that run as they are; eager's sums are taken in another order."""
    ids, fused = prompt(2, LENGTH), ("batched_mm", "grouped_mm")
    place = list(MOE_MODELS).index(model_type) % len(fused)
    for implementation in fused if model_type in EXPERT_LAYOUTS else fused[place : place + 1]:
        model = with_experts(load, model_type, implementation)
        with torch.no_grad():
            dense = model(ids).logits
            for backend in BACKENDS:
                with pruned(model, backend):
                    assert torch.equal(model(ids).logits, dense)


@every_type
def test_every_type_decodes_in_an_exact_mode_like_greedy(load, model_type):
    """Each in the first mode, in turn, that transformers offers it."""
    first = list(MOE_MODELS).index(model_type) % len(EXACT)
    assert exact_modes(with_experts(load, model_type), "inplace", EXACT[first:] + EXACT[:first], enough=1)


@covers(model_type=EXPERT_LAYOUTS, kind=["-".join(kind) for kind in KINDS], mode=EXACT)
def test_every_exact_mode_equals_greedy(load, model_type, kind, mode):
    implementation, backend = kind.split("-")
    if not exact_modes(with_experts(load, model_type, implementation), backend, [mode]):
        pytest.skip("transformers: not offered, or not equal to greedy on the dense model")


def exact_modes(model, backend, modes, enough=None):
    """Those of the modes, up to so many, that are like greedy on the dense model: they are so on the pruned one."""
    checked = []
    for mode in modes:
        if len(checked) == enough:
            break
        rows = MODES[mode][1]
        try:
            dense = dense_run(mode, model), dense_run("greedy" if rows == 2 else "single", model)
        except pytest.skip.Exception:
            continue  # transformers does not offer the mode
        (tokens, logits), expected = dense
        if not (torch.equal(tokens, expected[0]) and torch.allclose(logits, expected[1], rtol=0, atol=1e-5)):
            continue  # nor is it greedy on the dense model
        expected = greedy_run(model, rows, backend, **WAIT)
        with pruned(model, backend, **WAIT):
            found = MODES[mode][0](model)
        assert torch.equal(found[0], expected[0]), mode
        near(found[1], expected[1], model)
        assert not torch.equal(expected[1], dense[1][1]), "nothing was pruned: the test sees nothing"
        checked.append(mode)
    return checked


@every_type
def test_a_padded_batch_equals_each_row_alone_per_sequence(load, model_type):
    plain = with_experts(load, model_type)
    # the indexers of transformers lend places among their best keys to padding; with places for all keys it shows not
    model = with_experts(load, model_type, index_topk=64) if hasattr(plain.config, "index_topk") else plain
    ids, mask = left_padded(prompt(2, LENGTH))

    def alone_and_together():
        alone = [generate(model, ids[row : row + 1, mask[row].bool()]) for row in range(2)]
        return [torch.cat(t, dim) for dim, t in enumerate(zip(*alone, strict=True))], generate(
            model, ids, attention_mask=mask
        )

    alone, together = alone_and_together()
    if not torch.allclose(together[1], alone[1], rtol=0, atol=1e-5):
        pytest.skip("transformers: padding changes the dense model")
    with pruned(model, batch="per_sequence", **WAIT):
        alone, together = alone_and_together()
    assert torch.equal(together[0], alone[0])
    near(together[1], alone[1], model)


@pytest.mark.parametrize(("model_type", "backend"), in_turn(MOE_MODELS, EXPERT_LAYOUTS, BACKENDS))
def test_leaving_restores_the_model_also_in_the_middle_of_generate(load, model_type, backend):
    model = with_experts(load, model_type)
    before, implementation = fingerprint(model), model.get_experts_implementation()
    steps = []

    def stop(ids, scores):
        steps.append(1)
        if len(steps) == 3:
            raise RuntimeError("on purpose")
        return scores

    with pytest.raises(RuntimeError, match="on purpose"), pruned(model, backend):  # noqa: PT012
        assert model.get_experts_implementation() != implementation
        model.generate(prompt(), max_new_tokens=STEPS, logits_processor=[stop])
    assert len(steps) == 3
    assert model.get_experts_implementation() == implementation
    assert not any("_apply_gate" in vars(module) for module in experts_of(model))
    assert differences(before, fingerprint(model)) == []


# over every layout ------------------------------------------------------------------------------------------------------


@covers(
    model_type=EXPERT_LAYOUTS,
    implementation=IMPLEMENTATIONS,
    mode=[mode for mode, (_, rows) in MODES.items() if rows is None],
)
def test_inplace_equals_masked_in_modes_without_an_equal(load, model_type, implementation, mode):
    model = with_experts(load, model_type, implementation)
    dense_run(mode, model)
    found = {}
    for backend in BACKENDS:
        with pruned(model, backend, **WAIT) as session:
            found[backend] = MODES[mode][0](model), state_of(session)
    (one, one_state), (other, other_state) = found.values()
    assert torch.equal(one[0], other[0])
    near(one[1], other[1], model)
    assert one_state == other_state


@expert_layouts
def test_beams_of_two_prompts_equal_each_alone_per_sequence(load, model_type):
    model, ids = with_experts(load, model_type), prompt(2, 4)
    beams = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 6}
    alone = [model.generate(ids[row : row + 1], **beams) for row in range(2)]
    if not torch.equal(model.generate(ids, **beams), torch.cat(alone)):
        pytest.skip("transformers: the batch changes the dense model's beams")
    with pruned(model, batch="per_sequence", **WAIT):
        alone = [model.generate(ids[row : row + 1], **beams) for row in range(2)]
        assert torch.equal(model.generate(ids, **beams), torch.cat(alone))


@covers(model_type=["mixtral", "gpt_oss", "deepseek_v3"], min_tokens=[1, 3, 6], backend=BACKENDS)
def test_what_assisted_decoding_rejects_leaves_no_trace(load, model_type, backend, min_tokens):
    """Experts that the prompt did not reach learn from candidate tokens that may be rejected."""
    model = with_experts(load, model_type)
    assistant = tiny(model_type, model.dtype, seed=1)
    assistant.generation_config.num_assistant_tokens = 4
    assistant.generation_config.assistant_confidence_threshold = 0.0
    lengths = []
    hook = model.register_forward_pre_hook(
        lambda _, __, inputs: lengths.append(inputs["input_ids"].shape[1]), with_kwargs=True
    )
    settings = {"min_tokens": min_tokens}
    ids = prompt(1, 2)
    with pruned(model, backend, **settings) as session:
        expected, states = generate(model, ids, 10), state_of(session)
    lengths.clear()
    with pruned(model, backend, **settings) as session:
        found = generate(model, ids, 10, assistant_model=assistant)
    hook.remove()
    assert torch.equal(found[0], expected[0])
    near(found[1], expected[1], model)
    assert max(lengths[1:]) > 1 and sum(lengths) > 2 + 10, "nothing was rejected"
    for (experts, _), (plain, _) in zip(state_of(session), states, strict=True):
        assert experts.prompt_tokens == plain.prompt_tokens
        assert experts.partitioned == plain.partitioned


@backends
def test_copies_of_a_cache_unlearn_rejected_tokens_apart(load, backend):
    """Two caches that both still have to unlearn the same tokens."""
    model, ids = with_experts(load, "mixtral"), prompt(1, 2, seed=2)
    assistant = tiny("mixtral", torch.float64, seed=1)

    def assisted_turn():
        cache, lengths = DynamicCache(config=model.config), []
        hook = model.register_forward_pre_hook(
            lambda _, __, inputs: lengths.append(inputs["input_ids"].shape[1]), with_kwargs=True
        )
        tokens = generate(model, ids, 4, assistant_model=assistant, past_key_values=cache)[0]
        hook.remove()
        assert lengths[-1] > 1, "the last forward had one step only: it leaves nothing to unlearn"
        cache.crop(-1)
        return cache, tokens[:, -2:-1]

    with pruned(model, backend, min_tokens=6) as session:
        cache, token = assisted_turn()
        expected = continued(model, step(model, token, cache), cache, 8)
        states = [parts for _, parts in state_of(session)]
    with pruned(model, backend, min_tokens=6) as session:
        cache, token = assisted_turn()
        twin = copy.deepcopy(cache)
        session.adopt(twin, cache)
        last, found = [step(model, token, cache), step(model, token, twin)], [[], []]
        for _ in range(8):
            for index, one in enumerate((cache, twin)):
                last[index] = step(model, last[index].argmax(-1, keepdim=True), one)
                found[index].append(last[index])
        assert [parts for _, parts in state_of(session)] == states
    for one in found:
        near(torch.stack(one), expected, model)


# prompts, caches, models ------------------------------------------------------------------------------------------------


@torch.no_grad()
def step(model, token, cache):
    return model(token, past_key_values=cache, use_cache=True).logits[:, -1]


@torch.no_grad()
def start(model, ids):
    out = model(ids, use_cache=True, past_key_values=DynamicCache(config=model.config))
    return out.logits[:, -1], out.past_key_values


def continued(model, logits, cache, steps=STEPS):
    """Logits of greedy steps on a cache."""
    found = []
    for _ in range(steps):
        logits = step(model, logits.argmax(-1, keepdim=True), cache)
        found.append(logits)
    return torch.stack(found)


@kinds
def test_state_never_leaks_between_prompts(load, model_type, implementation, backend):
    model, prompts = with_experts(load, model_type, implementation), [prompt(1, 3, seed) for seed in range(3)]
    alone = []
    for ids in prompts:
        with pruned(model, backend, **WAIT) as session:
            alone.append((generate(model, ids)[1], state_of(session)))
    with pruned(model, backend, **WAIT) as session:
        for index in (0, 1, 2, 1, 0):
            logits = generate(model, prompts[index])[1]
            near(logits, alone[index][0], model)
            assert state_of(session) == alone[index][1]


@kinds
def test_two_caches_in_turn_equal_each_alone(load, model_type, implementation, backend):
    model, prompts = with_experts(load, model_type, implementation), [prompt(1, 3, seed) for seed in range(2)]
    alone = []
    for ids in prompts:
        with pruned(model, backend, **WAIT):
            alone.append(continued(model, *start(model, ids)))
    with pruned(model, backend, **WAIT):
        begun = [start(model, ids) for ids in prompts]
        last, found = [logits for logits, _ in begun], [[], []]
        for _ in range(STEPS):
            for index, (_, cache) in enumerate(begun):
                last[index] = step(model, last[index].argmax(-1, keepdim=True), cache)
                found[index].append(last[index])
    for one, other in zip(found, alone, strict=True):
        near(torch.stack(one), other, model)


def sharing_config():
    """Two models that share one config object."""
    one = tiny("mixtral", torch.float64)
    other = type(one)(one.config).to(torch.float64).eval()
    other.load_state_dict(tiny("mixtral", torch.float64, seed=1).state_dict())
    assert other.config is one.config and experts_of(other)[0].config is experts_of(one)[0].config
    return one, other


@backends
def test_two_models_that_share_a_config(backend):
    one, other = sharing_config()
    ids, dense, alone = prompt(1, 3), [], []
    for model in (one, other):
        dense.append(generate(model, ids)[1])
        with pruned(model, backend, **WAIT):
            alone.append(generate(model, ids)[1])
    with same_afterwards(one), same_afterwards(other):
        with pruned(one, backend, **WAIT):
            near(generate(one, ids)[1], alone[0], one)
            assert torch.equal(generate(other, ids)[1], dense[1]), "the other model is not pruned"
        first, second = pruned(one, backend, **WAIT).attach(), pruned(other, backend, **WAIT).attach()
        near(generate(one, ids)[1], alone[0], one)
        near(generate(other, ids)[1], alone[1], one)
        first.detach()
        assert torch.equal(generate(one, ids)[1], dense[0])
        near(generate(other, ids)[1], alone[1], one)
        second.detach()
        assert one.config._experts_implementation == "eager"


@implementations
def test_two_threads_on_one_masked_model(load, implementation):
    model, prompts = with_experts(load, "qwen2_moe", implementation), [prompt(1, 3, seed) for seed in range(4)]
    alone = []
    for ids in prompts:
        with pruned(model, **WAIT):
            alone.append(generate(model, ids, 10))
    found = [None] * len(prompts)

    def run(index):
        found[index] = generate(model, prompts[index], 10)

    with pruned(model, **WAIT):
        threads = [threading.Thread(target=run, args=(index,)) for index in range(len(prompts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for one, other in zip(found, alone, strict=True):
        assert torch.equal(one[0], other[0])
        near(one[1], other[1], model)


@backends
@expert_layouts
def test_a_session_saves_the_original_order(model_type, backend, tmp_path):
    model, ids = tiny(model_type, torch.float64), prompt(1, LENGTH)  # of its own: save_pretrained notes the dtype
    original = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pruned(model, backend, **WAIT):
        expected = generate(model, ids)[1]
    with pruned(model, backend, **WAIT):
        logits, cache = start(model, ids)
        found = [continued(model, logits, cache, 2)]
        stored = {m: n for n, m in model.named_modules()}  # named_parameters() would put channels back
        moved = {f"{stored[m]}.{key}": p for m in stored for key, p in m._parameters.items() if p is not None}
        if backend == "inplace":
            assert any(not torch.equal(moved[name], original[name]) for name in moved), "nothing had been moved"
        saved = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        model.save_pretrained(tmp_path)
        found.append(continued(model, found[0][-1], cache, STEPS - 3))
    assert saved.keys() == original.keys()
    assert all(torch.equal(saved[name], original[name]) for name in original)
    near(torch.cat(found).double(), expected[1:], model)
    assert "pop_mm" not in "".join(path.read_text() for path in tmp_path.glob("*.json"))
    if type(model).__name__ == "AriaTextForCausalLM":
        again = type(model).from_pretrained(tmp_path, dtype=torch.float64, experts_implementation="eager")
    else:
        again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64, experts_implementation="eager")
    assert torch.equal(generate(again, ids)[1], generate(model, ids)[1])


@backends
def test_weights_loaded_inside_a_session_count(load, backend):
    model, other, ids = tiny("gpt_oss", torch.float64), tiny("gpt_oss", torch.float64, seed=1), prompt(1, 4)
    with pruned(other, backend, **WAIT):
        expected = generate(other, ids)[1]
    with pruned(model, backend, **WAIT):
        generate(model, ids)
        model.load_state_dict(other.state_dict())
        near(generate(model, ids)[1], expected, model)
    assert differences_of_weights(model, other) == []


def differences_of_weights(one, other):
    return [n for (n, a), b in zip(one.named_parameters(), other.parameters(), strict=True) if not torch.equal(a, b)]


@kinds
def test_copies_of_a_cache_go_their_own_ways(load, model_type, implementation, backend):
    model, ids = with_experts(load, model_type, implementation), prompt(1, 3)
    branches = [torch.tensor([[5]]), torch.tensor([[60]])]
    expected = []
    for token in branches:
        with pruned(model, backend, **WAIT):
            logits, cache = start(model, ids)
            logits = continued(model, logits, cache, 1)[-1]
            expected.append(continued(model, step(model, token, cache), cache))
    with pruned(model, backend, **WAIT) as session:
        logits, cache = start(model, ids)
        continued(model, logits, cache, 1)
        copies = [cache, copy.deepcopy(cache)]
        session.adopt(copies[1], cache)
        last = [step(model, token, one) for token, one in zip(branches, copies, strict=True)]
        found = [[], []]
        for _ in range(STEPS):
            for index, one in enumerate(copies):
                last[index] = step(model, last[index].argmax(-1, keepdim=True), one)
                found[index].append(last[index])
    for one, other in zip(found, expected, strict=True):
        near(torch.stack(one), other, model)


@expert_layouts
@pytest.mark.parametrize("method", ["reorder_cache", "batch_select_indices"])
def test_rows_of_a_cache_that_are_exchanged_keep_their_experts(load, model_type, method):
    model, ids, order = with_experts(load, model_type), prompt(3, 3), torch.tensor([2, 0, 1])
    alone = []
    for row in range(3):
        with pruned(model, batch="per_sequence", min_tokens=3) as session:
            logits, cache = start(model, ids[row : row + 1])
            alone.append(continued(model, logits, cache, 8))
            assert any(ffn.experts.late for ffn in of_experts(session))
    with pruned(model, batch="per_sequence", min_tokens=3):
        logits, cache = start(model, ids)
        if not all(hasattr(layer, method) for layer in cache.layers):
            pytest.skip(f"transformers: this cache has no {method}")
        before = continued(model, logits, cache, 1)
        getattr(cache, method)(order)
        after = continued(model, before[-1][order], cache, 7)
    near(torch.cat([before[:, order], after]), torch.cat(alone, 1)[:, order], model)


@backends
@torch.no_grad()
def test_a_prompt_may_begin_in_inference_mode_and_go_on_outside(load, backend):
    model, ids = with_experts(load, "mixtral"), prompt(1, 2)
    with pruned(model, backend, **WAIT):
        expected = continued(model, *start(model, ids))
    with pruned(model, backend, **WAIT):
        with torch.inference_mode():
            logits, cache = start(model, ids)
        found = continued(model, logits, cache, 1)
        with torch.inference_mode():
            found = torch.cat([found, continued(model, found[-1], cache, STEPS - 1)])
    near(found, expected, model)


@backends
def test_a_layer_may_stay_dense(load, backend):
    model, ids = with_experts(load, "mixtral", "batched_mm"), prompt(2, 9)
    with pruned(model, backend, layer_ratios={0: 0.0}) as session, ActiveExperts(model) as seen:
        model.generate(ids, max_new_tokens=3)
    whole, cut = of_experts(session)
    assert (whole.plan.backend, cut.plan.backend) == ("dense", backend)
    assert whole.experts is None and cut.experts.partitioned == [0, 1, 2, 3]
    for first, second in seen.seen[1:]:
        assert {len(channels) for tokens in first.values() for channels in tokens} == {24}
        assert {len(channels) for tokens in second.values() for channels in tokens} == {cut.plan.sizes.kept}
