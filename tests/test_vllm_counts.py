"""What the vLLM plug-in counts of decode steps, without vLLM: entries and bytes that were kept, and those that there are."""

import pytest
import torch

from helpers.vllm_inputs import WIDTH, channels, entries, forward, values
from pop_mm import PopConfig
from pop_mm.engines.vllm.counts import Counting, Counts
from pop_mm.engines.vllm.planned import Planned
from pop_mm.engines.vllm.rows import ChosenRows, Room
from pop_mm.engines.vllm.running import Running
from pop_mm.ops.library import library

PROMPT = ("a", 7, 0, 7, [0, 1])


def running(*inputs, entry_bytes=8):
    """What a worker holds of them, after a prompt of 7 tokens."""
    found = Running(PopConfig(ratio=0.3), Planned((), (), ()), print)
    found.inputs = list(inputs)
    for masked in inputs:
        masked.entry_bytes = entry_bytes
    step(found, values(7), PROMPT)
    return found


def step(worker, x, *requests):
    """The inputs of a forward, each given to two modules."""
    with worker.forward(forward(*requests)):
        return [worker.mask(masked, x) for masked in worker.inputs for _ in range(2)][::2]


def test_prompts_are_not_counted():
    worker = running(channels(), entries())
    assert worker.counts() is None
    step(worker, values(3), ("b", 3, 0, 9, [2, 3]))
    assert worker.counts() is None


def test_pop_keeps_its_share_of_every_decode_token():
    worker = running(channels(ratio=0.4), channels(ratio=0.2), entry_bytes=10)
    kept = sum(masked.sizes.kept for masked in worker.inputs)
    step(worker, values(1, 1), ("a", 1, 7, 7, [0, 1]))
    assert worker.counts() == Counts(1, 10 * kept, 10 * 2 * WIDTH)
    assert worker.counts() is None  # told once
    step(worker, values(3, 2), ("a", 3, 8, 7, [0, 1]))
    assert worker.counts() == Counts(3, 3 * 10 * kept, 3 * 10 * 2 * WIDTH)


def test_thresholds_keep_what_is_left_of_the_input_however_many_modules_are_given_it():
    worker = running(entries(0.4))
    left = torch.cat(step(worker, values(2, 1), ("a", 2, 7, 7, [0, 1])))
    assert worker.counts() == Counts(2, 8 * int((left != 0).sum()), 8 * 2 * WIDTH)
    x = torch.cat([values(1, 3), values(4, 5)])  # beside another's prompt
    (left,) = step(worker, x, ("a", 1, 9, 7, [0, 1]), ("b", 4, 0, 4, [2]))
    assert worker.counts() == Counts(1, 8 * int((left[0] != 0).sum()), 8 * WIDTH)


def test_requests_that_decode_dense_keep_all():
    bad = values(7)
    bad[3, 2] = torch.nan
    for masked in channels(complaints=[]), entries(complaints=[]):
        worker = running(masked)
        step(worker, bad, ("bad", 7, 0, 7, [2, 3]))
        step(worker, values(1, 1), ("bad", 1, 7, 7, [2, 3]))
        assert worker.counts() == Counts(1, 8 * WIDTH, 8 * WIDTH)
    step(worker, values(3), ("short", 3, 0, 3, [4]))
    step(worker, values(1, 1), ("short", 1, 3, 3, [4]))
    assert worker.counts() == Counts(1, 8 * WIDTH, 8 * WIDTH)


def test_made_up_tokens_are_not_counted():
    worker = running(entries())
    with worker.forward():
        worker.mask(worker.inputs[0], values(2))
    assert worker.counts() is None


def test_a_model_that_leaves_nothing_out_has_no_counts():
    worker = running()
    step(worker, values(1), ("a", 1, 7, 7, [0, 1]))
    assert worker.counts() is None


@pytest.mark.skipif(library(torch.float32) is None, reason="no compiled rows")
def test_chosen_rows_count_as_the_mask_does():
    weight = torch.rand(WIDTH) + 0.5
    masked, by_rows = running(entries(0.4, weight)), running(entries(0.4, weight))
    matrix = torch.randn(WIDTH, 5)
    modules = [ChosenRows(by_rows.inputs[0], matrix, Room()) for _ in range(2)]
    for number in range(3):
        one, x = ("a", 1, 7 + number, 7, [0, 1]), values(1, number)
        step(masked, x, one)
        with by_rows.forward(forward(one)):
            for module in modules:
                module(x, None, by_rows.tokens)
    found = masked.counts()
    assert found == by_rows.counts() and 0 < found.kept < found.all == 3 * 8 * WIDTH


def test_what_a_gpu_has_not_sent_yet_comes_with_a_later_answer(monkeypatch):
    from pop_mm.engines.vllm import counts

    class Event:
        done = False

        def query(self):
            return Event.done

    monkeypatch.setattr(counts, "_read", lambda entries, tokens: counts._Reading(entries.clone(), tokens, Event()))
    masked, counting = entries(), Counting()
    masked.entry_bytes = 2
    masked.kept_entries += 5
    assert counting.since_last([masked], 1) is None
    masked.kept_entries += 6
    assert counting.since_last([masked], 2) is None
    Event.done = True
    assert counting.since_last([masked], 2) == Counts(1, 10, 2 * WIDTH)
    assert counting.since_last([masked], 2) == Counts(1, 12, 2 * WIDTH)
    assert counting.since_last([masked], 2) is None
