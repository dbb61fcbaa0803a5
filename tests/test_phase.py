"""Which part of a generation a forward belongs to: every way that ``generate`` calls a model, on a tiny llama."""

import pytest
import torch
from transformers import ContinuousBatchingConfig, DynamicCache, GenerationConfig

from helpers.modes import LENGTH, MODES, RATIO, STEPS, alone, backends, generate, pruned, simple
from helpers.observe import Active, partitions, prompt
from helpers.reference import Pop
from helpers.tiny_models import tiny
from pop_mm import PhaseError


@backends
def test_a_prompt_of_one_token_is_prefill(model, backend):
    ids = prompt(1, 1)
    with Pop(model, RATIO) as reference:
        expected = reference.greedy(ids, STEPS)
    with pruned(model, backend) as session, Active(model) as seen:
        assert torch.equal(model.generate(ids, max_new_tokens=STEPS), expected)
    assert partitions(session) == reference.parts
    assert seen.sets(1) == reference.active


@backends
@pytest.mark.parametrize("chunk", [1, 2, 4, 5, LENGTH])
def test_chunks_of_any_length_are_one_prefill(model, backend, chunk):
    ids = prompt(2, LENGTH)
    with pruned(model, backend) as session:
        expected = model.generate(ids, max_new_tokens=STEPS)
        whole = partitions(session)
        assert torch.equal(model.generate(ids, max_new_tokens=STEPS, prefill_chunk_size=chunk), expected)
        assert partitions(session) == whole
        assert session.report.prompt_tokens == 2 * LENGTH


@backends
@pytest.mark.parametrize("by_name", [True, False])
def test_sampling_with_a_seed_repeats_itself(model, backend, by_name):
    sampled = {"do_sample": True, "top_k": 20}
    with pruned(model, backend):
        torch.manual_seed(3)
        first = simple(**sampled)(model)
        torch.manual_seed(3)
        if by_name:
            out = model.generate(inputs=prompt(2, LENGTH), max_new_tokens=STEPS, **sampled)
        else:
            out = model.generate(prompt(2, LENGTH), max_new_tokens=STEPS, **sampled)
    assert torch.equal(out[:, LENGTH:], first[0])


@backends
def test_num_return_sequences_repeat_the_prompt_and_share_its_partition(model, backend):
    with pruned(model, backend) as session:
        model.generate(prompt(), max_new_tokens=2)
        once = partitions(session)
        torch.manual_seed(0)
        generate(model, prompt(), do_sample=True, num_return_sequences=3)
        assert partitions(session) == once


@backends
def test_inputs_embeds_decode_like_ids(model, backend):
    ids = prompt(1, LENGTH)
    with torch.no_grad():
        embeds = model.get_input_embeddings()(ids)
    with pruned(model, backend):
        out = model.generate(inputs_embeds=embeds, max_new_tokens=STEPS)
    assert torch.equal(out, alone(model, ids))


@backends
@pytest.mark.parametrize("draft", ["dense", "pruned"])
def test_assisted_decoding_gives_the_tokens_of_greedy(model, backend, draft):
    assistant = tiny("llama", torch.float64, seed=0)
    ids = prompt(1, LENGTH)
    expected = alone(model, ids)
    with pruned(model, backend):
        if draft == "dense":
            found = generate(model, ids, assistant_model=assistant)[0]
        else:
            with pruned(assistant, backend):
                found = generate(model, ids, assistant_model=assistant)[0]
    assert torch.equal(found, expected)


@backends
def test_candidates_in_the_first_forward_do_not_count_as_prompt(model, backend):
    ids = prompt(1, 4).repeat(1, 3)  # the lookup finds its candidates in the prompt at once
    with pruned(model, backend) as session:
        expected = model.generate(ids, max_new_tokens=8)
        parts = partitions(session)
        found = model.generate(ids, max_new_tokens=8, prompt_lookup_num_tokens=3)
        assert partitions(session) == parts
        assert session.report.prompt_tokens == 12
    assert torch.equal(found, expected)


@backends
def test_a_second_turn_is_a_new_prefill_that_adds_to_the_statistics(model, backend):
    first, second = prompt(1, LENGTH), prompt(1, 4, seed=1)
    with Pop(model, RATIO) as reference:
        one = reference.greedy(first, STEPS)
        logits = reference.prefill(torch.cat([one[:, -1:], second], 1))  # the last token has not been fed yet
        two = [logits[:, -1].argmax(-1, keepdim=True)]
        for _ in range(2):
            two.append(reference.step(two[-1])[:, -1].argmax(-1, keepdim=True))
    with pruned(model, backend) as session:
        out = model.generate(first, max_new_tokens=STEPS, return_dict_in_generate=True)
        assert torch.equal(out.sequences, one)
        ids = torch.cat([out.sequences, second], 1)
        out = model.generate(ids, past_key_values=out.past_key_values, max_new_tokens=3)
    assert torch.equal(out[:, ids.shape[1] :], torch.cat(two, 1))
    assert partitions(session) == reference.parts


@backends
def test_a_second_turn_of_one_token_through_generate_is_prefill(model, backend):
    with pruned(model, backend) as session:
        cache = DynamicCache(config=model.config)
        model(prompt(1, LENGTH), past_key_values=cache)
        ids = torch.cat([prompt(1, LENGTH), prompt(1, 1, seed=1)], 1)
        model.generate(ids, past_key_values=cache, max_new_tokens=2)
        assert session.report.prompt_tokens == LENGTH + 1


@backends
@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("negative", [True, False])
def test_guidance_keeps_the_two_prompts_apart(model, backend, use_cache, negative):
    ids, other = prompt(1, LENGTH), prompt(1, 5, seed=4) if negative else prompt(1, LENGTH)[:, -1:]
    tokens, scale = [], 1.5
    with Pop(model, RATIO) as one:
        cond = one.prefill(ids)[:, -1]
    with Pop(model, RATIO) as two:
        uncond = two.prefill(other)[:, -1]
    for _ in range(STEPS):
        cond, uncond = cond.log_softmax(-1), uncond.log_softmax(-1)
        tokens.append((scale * (cond - uncond) + uncond).argmax(-1, keepdim=True))
        step = []
        for state in (one, two):  # continue each on its own
            state.handles = [
                down.register_forward_pre_hook(lambda _, args, i=i, state=state: state._before_down(i, args))
                for i, down in enumerate(state.downs)
            ]
            with state:
                step.append(state.step(tokens[-1])[:, -1])
        cond, uncond = step
    settings = {"negative_prompt_ids": other} if negative else {}
    with pruned(model, backend):
        found = model.generate(ids, max_new_tokens=STEPS, guidance_scale=scale, use_cache=use_cache, **settings)
    assert torch.equal(found[:, LENGTH:], torch.cat(tokens, 1))


@backends
@pytest.mark.parametrize("batch", ["shared", "per_sequence"])
def test_beams_carry_the_prompts_partition_through_reordering(model, backend, batch):
    if batch == "per_sequence" and backend == "inplace":
        pytest.skip("refused")
    two = prompt(2, LENGTH)
    with pruned(model, backend, batch=batch) as session, Active(model) as seen:
        together = model.generate(two, max_new_tokens=6, num_beams=3)
        parts = partitions(session)
    kept = session.report.ffns[0].plan.sizes.kept
    for forwards in seen.seen:
        assert all(a.sum(-1).max() <= kept for a in forwards[1:])
    if batch == "per_sequence":  # each prompt's beams are those it has alone
        assert all(row == ffn[0] for ffn in parts for row in ffn[:3])
        with pruned(model, backend, batch=batch):
            rows = [model.generate(two[r : r + 1], max_new_tokens=6, num_beams=3) for r in range(2)]
        assert torch.equal(together, torch.cat(rows))


def test_the_stability_of_beams_follows_their_reordering(model, monkeypatch):
    parents, reorder = [], DynamicCache.reorder_cache
    monkeypatch.setattr(DynamicCache, "reorder_cache", lambda self, b: (parents.append(b.tolist()), reorder(self, b)))
    with pruned(model, batch="per_sequence", gamma=0.5) as session, Active(model) as seen:
        model.generate(prompt(1, LENGTH), max_new_tokens=8, num_beams=4)
    assert any(b != sorted(b) for b in parents), "no beam has changed its place"
    for index, ffn in enumerate(session.report.ffns):
        candidates = set(ffn.partition.candidates[0].tolist())
        kept = [[row[0] & candidates for row in step[index]] for step in seen.sets(4)[1:]]
        stayed = [
            len(now[row] & before[parent[row]]) / len(now[row])
            for before, now, parent in zip(kept[:-1], kept[1:], parents[1:], strict=False)
            for row in range(4)
        ]
        assert ffn.stability == pytest.approx(sum(stayed) / len(stayed))


@backends
def test_a_finished_row_no_longer_counts(model, backend):
    ids = prompt(2, LENGTH)
    with Pop(model, RATIO) as reference:
        free = reference.greedy(ids, 8)[:, LENGTH:]
    eos = int(next(t for t in free[0, :4] if t not in free[1]))
    with Pop(model, RATIO) as reference:
        expected = reference.greedy(ids, 8, eos=eos)
    with pruned(model, backend), Active(model) as seen:
        found = model.generate(ids, max_new_tokens=8, eos_token_id=eos)
    assert eos in found[0] and found[0, -1] == 0, "the first row has finished early"
    assert torch.equal(found, expected)
    live = [[ffn[1] for ffn in forward] for forward in seen.sets(2)]
    assert live == [[ffn[1] for ffn in forward] for forward in reference.active]


def test_a_row_that_has_finished_leaves_the_others_as_if_alone_from_then_on(model):
    ids = prompt(2, LENGTH)
    with pruned(model, batch="per_sequence"):
        both = generate(model, ids, 8)[0]
        eos = int(next(t for t in both[0, :4] if t not in both[1]))
        early = generate(model, ids, 8, eos_token_id=eos)[0]
    assert torch.equal(early[1], both[1])


@backends
def test_generate_batch_is_refused(backend):
    model = tiny("llama", torch.float64)
    small = ContinuousBatchingConfig(num_blocks=4, max_batch_tokens=32)
    settings = GenerationConfig(max_new_tokens=3, eos_token_id=-1)
    with pruned(model, backend), pytest.raises(PhaseError, match="Continuous batching"):
        model.generate_batch([prompt(1, 3)[0].tolist()], settings, continuous_batching_config=small)


@backends
def test_a_packed_row_of_several_requests_is_refused(model, backend):
    with pruned(model, backend), pytest.raises(PhaseError, match="Continuous batching"):
        model(prompt(1, 4), cu_seq_lens_q=torch.tensor([0, 2, 4]))


@pytest.mark.parametrize("mode", ["greedy", "loop", "chunked", "static", "no_cache"])
def test_rows_of_a_per_sequence_batch_decode_as_if_alone(model, mode):
    with pruned(model, batch="per_sequence"):
        found = MODES[mode][0](model)[0]
    assert len(found) == 2
    for row in range(2):
        assert torch.equal(found[row : row + 1], alone(model, prompt(2, LENGTH)[row : row + 1]))


@pytest.mark.parametrize("mode", ["assisted", "lookup"])
def test_per_sequence_equals_shared_for_a_single_row(model, mode):
    expected = alone(model, prompt(1, LENGTH))
    with pruned(model, batch="per_sequence"):
        assert torch.equal(MODES[mode][0](model)[0], expected)


def test_a_second_turn_per_sequence_continues_every_row(model):
    first, second = prompt(2, LENGTH), prompt(2, 4, seed=1)

    def turns(rows):
        out = model.generate(first[rows], max_new_tokens=3, return_dict_in_generate=True)
        ids = torch.cat([out.sequences, second[rows]], 1)
        return model.generate(ids, past_key_values=out.past_key_values, max_new_tokens=3)

    with pruned(model, batch="per_sequence"):
        assert torch.equal(turns([0, 1]), torch.cat([turns([0]), turns([1])]))
