"""Scoring a continuation as decode in one forward, and the ways around ``generate``: pipelines, streams, threads."""

import threading

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast, TextIteratorStreamer, pipeline

from helpers.modes import LENGTH, STEPS, backends, generate, left_padded, pruned
from helpers.observe import Active, partitions, prompt
from helpers.reference import Pop
from helpers.tiny_models import VOCAB
from pop_mm import PhaseError, SessionError

CONTEXT = 6


def step_by_step(model, ids, context, mask=None, batch="shared"):
    """Logits [B, S, V] of the context as prefill and one step for each further column."""
    with Pop(model, 0.4, batch=batch) as reference:
        masks = [None] * ids.shape[1] if mask is None else mask.split(1, 1)
        logits = [reference.prefill(ids[:, :context], None if mask is None else mask[:, :context])]
        for column in range(context, ids.shape[1]):
            live = None if mask is None else mask[:, column].tolist()
            logits.append(reference.step(ids[:, column : column + 1], live, masks[column]))
    return torch.cat(logits, 1), reference


@backends
@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("rows", [1, 2])
@torch.no_grad()
def test_split_by_an_int_equals_decode_step_by_step(model, backend, use_cache, rows):
    ids = prompt(rows, LENGTH)
    expected, reference = step_by_step(model, ids, CONTEXT)
    with pruned(model, backend) as session, session.split(CONTEXT), Active(model) as seen:
        found = model(ids, use_cache=use_cache).logits
        assert partitions(session) == reference.parts
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
    for index, (forward,) in enumerate(zip(seen.sets(rows)[0], strict=True)):
        for row in range(rows):
            steps = [f[index][row][0] for f in reference.active[1:]]
            assert forward[row][CONTEXT:] == steps


@backends
@torch.no_grad()
def test_split_by_a_tensor_gives_each_row_its_own_context(model, backend):
    lengths, contexts = [LENGTH, 7], [6, 4]  # right-padded
    rows = [prompt(1, n, seed) for seed, n in enumerate(lengths)]
    ids, mask = torch.zeros(2, LENGTH, dtype=torch.long), torch.zeros(2, LENGTH, dtype=torch.long)
    for row, own in enumerate(rows):
        ids[row, : own.shape[1]], mask[row, : own.shape[1]] = own[0], 1
    if backend == "masked":
        with pruned(model, backend, batch="per_sequence") as session, session.split(torch.tensor(contexts)):
            found = model(ids, attention_mask=mask).logits
        for row, own in enumerate(rows):
            expected, _ = step_by_step(model, own, contexts[row])
            torch.testing.assert_close(found[row, : lengths[row]], expected[0], rtol=0, atol=1e-9)
    with pruned(model, backend) as session, session.split(torch.tensor(contexts)):
        shared = model(ids, attention_mask=mask).logits
        assert session.report.prompt_tokens == sum(contexts)
        again = model(ids.where(mask.bool(), 7), attention_mask=mask).logits
    torch.testing.assert_close(again[mask.bool()], shared[mask.bool()], rtol=0, atol=0)


@backends
@torch.no_grad()
def test_split_of_a_right_padded_shared_batch_equals_decode_step_by_step(model, backend):
    ids, mask = prompt(2, LENGTH), torch.ones(2, LENGTH, dtype=torch.long)
    ids[1, -2:] = mask[1, -2:] = 0
    expected, _ = step_by_step(model, ids, CONTEXT, mask)
    with pruned(model, backend) as session, session.split(CONTEXT):
        found = model(ids, attention_mask=mask).logits
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], rtol=0, atol=1e-9)


@backends
@torch.no_grad()
def test_split_of_a_left_padded_shared_batch_equals_decode_step_by_step(model, backend):
    ids, mask = left_padded(prompt(2, LENGTH))
    expected, reference = step_by_step(model, ids, CONTEXT, mask)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with pruned(model, backend) as session, session.split(CONTEXT):
        found = model(ids, attention_mask=mask, position_ids=positions).logits
        assert partitions(session) == reference.parts
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], rtol=0, atol=1e-9)


@backends
def test_a_left_padded_batch_without_a_cache_equals_one_with_a_cache(model, backend):
    ids, mask = left_padded(prompt(2, LENGTH))
    with pruned(model, backend):
        expected = generate(model, ids, attention_mask=mask)[0]
        assert torch.equal(generate(model, ids, attention_mask=mask, use_cache=False)[0], expected)


@backends
@torch.no_grad()
def test_a_context_as_long_as_the_input_is_pure_prefill(model, backend):
    dense = model(prompt(1, LENGTH)).logits
    with pruned(model, backend) as session, session.split(LENGTH):
        assert torch.equal(model(prompt(1, LENGTH)).logits, dense)


@backends
@pytest.mark.parametrize(
    ("context", "says"),
    [
        (0, "no prompt"),
        (-1, "no prompt"),
        (1.5, "int"),
        (True, "int"),
        (torch.tensor([1.0]), "integer"),
        (torch.tensor([2, 2, 2]), "3 context lengths"),
        (torch.tensor([0, 0]), "empty|no prompt"),
    ],
)
def test_a_context_that_makes_no_sense_is_refused(model, backend, context, says):
    def score():
        with session.split(context):
            model(prompt(2, LENGTH))

    with pruned(model, backend) as session, pytest.raises(PhaseError, match=says):
        score()


def test_a_row_without_a_context_is_refused_per_sequence(model):
    def score():
        with session.split(torch.tensor([0, 3])):
            model(prompt(2, LENGTH))

    with pruned(model, batch="per_sequence") as session, pytest.raises(PhaseError, match=r"Row 0 .*empty"):
        score()


def test_split_ends_with_its_block_and_needs_a_session(model):
    session = pruned(model)
    with pytest.raises(SessionError, match="attached"):
        session.split(3)
    with session, torch.no_grad():
        with session.split(CONTEXT):
            split = model(prompt(1, LENGTH)).logits
        assert not torch.equal(model(prompt(1, LENGTH)).logits, split)


# --- around generate ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    words = {"<pad>": 0, "<s>": 1, **{f"w{i}": i for i in range(2, VOCAB)}}
    core = Tokenizer(WordLevel(words, unk_token="w2"))
    core.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", bos_token="<s>", padding_side="left")


def words(ids):
    return " ".join(f"w{i}" for i in ids.flatten().tolist())


@backends
@pytest.mark.parametrize("batch_size", [1, 2])
def test_a_text_generation_pipeline_is_pruned(model, backend, tokenizer, batch_size):
    texts = [words(prompt(1, LENGTH)), words(prompt(1, 6, seed=1))]
    with pruned(model, backend):
        ids = [tokenizer(t, return_tensors="pt") for t in texts]
        if batch_size == 2:
            both = tokenizer(texts, return_tensors="pt", padding=True)
            expected = model.generate(**both, max_new_tokens=STEPS)[:, LENGTH:]
        else:
            expected = [generate(model, one["input_ids"])[0] for one in ids]
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer, batch_size=batch_size)
    with pruned(model, backend):
        found = pipe(texts, max_new_tokens=STEPS, return_full_text=False)
    assert [out[0]["generated_text"] for out in found] == [
        tokenizer.decode(one.flatten(), skip_special_tokens=True) for one in expected
    ]


@backends
def test_a_stream_from_another_thread_is_pruned(model, backend, tokenizer):
    ids = prompt(1, LENGTH)
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    with pruned(model, backend):
        expected = generate(model, ids)[0]
        settings = {"inputs": ids, "max_new_tokens": STEPS, "streamer": streamer}
        thread = threading.Thread(target=model.generate, kwargs=settings)
        thread.start()
        text = "".join(streamer)
        thread.join()
    assert text.split() == tokenizer.decode(expected[0]).split()
