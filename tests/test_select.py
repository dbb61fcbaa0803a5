"""The choice among candidates: one definition, written here as loops, and all that chooses is held to it.

The Triton kernels choose within an FFN: ``kernels/gpu_kernel_cases.py`` holds them to the same functions.
"""

import math

import pytest
import torch
from hypothesis import given as hypothesis_given
from hypothesis import settings
from hypothesis import strategies as st

from pop_mm import kernels
from pop_mm.ops.select import choose, lowest, shared_scores, step_chooser
from pop_mm.partition import Sizes, partition_sizes


def given(*strategies):
    """Hypothesis' ``given``, with the same examples at every run and no time limit for a slow machine."""
    return lambda test: settings(derandomize=True, deadline=None)(hypothesis_given(*strategies)(test))


sizes_of = st.builds(
    partition_sizes, st.integers(1, 300), st.floats(0, 0.99), st.floats(0, 1), st.sampled_from([1, 1, 2, 8, 16])
)


@given(st.integers(1, 9), st.integers(1, 12), st.integers(0, 2**31), st.data())
def test_tokens_of_a_group_leave_out_what_is_weakest_over_all_of_them(tokens, candidates, seed, data):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(tokens, candidates, generator=generator, dtype=torch.float64)
    weight = torch.rand(candidates, generator=generator, dtype=torch.float64)
    count = data.draw(st.integers(0, candidates))
    group = torch.tensor(data.draw(st.lists(st.integers(0, 2), min_size=tokens, max_size=tokens)))
    valid = torch.tensor(data.draw(st.lists(st.booleans(), min_size=tokens, max_size=tokens)))
    values[~valid] = math.nan  # has no say, whatever it holds
    found = choose(values, weight, count, group, 3, valid)
    per_token = choose(values, weight.expand(tokens, -1), count, group, 3, valid)
    assert found.shape == (3, count)
    for number in range(3):
        mine = [t for t in range(tokens) if group[t] == number]
        scores = [
            float(weight[c]) * math.sqrt(sum(float(values[t, c]) ** 2 for t in mine if valid[t]))
            for c in range(candidates)
        ]
        expected = sorted(scores)[:count]
        assert sorted(scores[c] for c in found[number]) == pytest.approx(expected)
        if mine:
            assert sorted(scores[c] for c in per_token[number]) == pytest.approx(expected)


@given(st.integers(1, 5), st.integers(1, 12), st.integers(0, 2**31), st.data())
def test_a_token_alone_leaves_out_what_is_weakest_in_it(tokens, candidates, seed, data):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(tokens, candidates, generator=generator, dtype=torch.float64)
    weight = torch.rand(tokens, candidates, generator=generator, dtype=torch.float64)
    count = data.draw(st.integers(0, candidates))
    for row, scores in zip(choose(values, weight, count), (values * weight).abs().tolist(), strict=True):
        assert len(set(row.tolist())) == count
        assert sorted(scores[c] for c in row) == sorted(scores)[:count]


@given(sizes_of, st.integers(0, 2**31), st.data())
def test_dropped_are_the_lowest(sizes, seed, data):
    scores = torch.rand(2, sizes.candidates, generator=torch.Generator().manual_seed(seed))
    bad = data.draw(st.integers(0, sizes.candidates))
    scores[0, :bad] = data.draw(st.sampled_from([math.nan, math.inf, -math.inf]))
    dropped = lowest(scores, sizes.candidates_dropped)
    assert dropped.shape == (2, sizes.candidates_dropped)
    clean = torch.where(scores.isfinite(), scores, -1.0)
    for row, values in zip(dropped, clean, strict=True):
        assert len(set(row.tolist())) == sizes.candidates_dropped
        stays = torch.ones(sizes.candidates, dtype=torch.bool)
        stays[row] = False
        assert int(stays.sum()) == sizes.candidates_kept
        if stays.any() and len(row):
            assert values[row].max() <= values[stays].min()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_not_finite_ranks_behind_zero(bad):
    assert lowest(torch.tensor([0.0, bad, 1.0, 2.0]), 1).tolist() == [1]


def test_scores_are_left_as_they_are():
    sizes = partition_sizes(20, 0.5, 0.4)
    scores = torch.tensor([math.nan] * 4 + [1.0] * 4)
    before = scores.clone()
    lowest(scores, sizes.candidates_dropped)
    assert torch.equal(scores.nan_to_num(), before.nan_to_num())


def choosers(weight, sizes):
    """Torch's and, of float32, the compiled one, which may use the other where it cannot read the activations."""

    def not_needed(*_):
        raise AssertionError

    def compiled(h, valid, dropped):
        library.chooser(weight, sizes, dropped.data_ptr, not_needed)(h, valid)

    library = kernels.library() if weight.dtype == torch.float32 else None
    return [step_chooser(weight, sizes.retained, sizes.candidates_dropped), *([compiled] if library else [])]


@given(sizes_of, st.integers(0, 10), st.sampled_from([torch.bfloat16, torch.float32, torch.float64]))
def test_single_steps_leave_out_the_same(sizes, seed, dtype):
    def random(number, count):
        return torch.randn(count, generator=torch.Generator().manual_seed(number)).to(dtype)

    weight = random(seed, sizes.candidates).abs().to(torch.promote_types(dtype, torch.float32))
    for leave_out in choosers(weight, sizes):
        dropped = torch.empty(1, sizes.candidates_dropped, dtype=torch.int64)
        for step in range(2):
            h = random(seed + step + 1, sizes.width) * 10.0 ** ((torch.arange(sizes.width) * 17) % 60 - 30)
            scores = h[sizes.retained :].abs() * weight
            found = h.clone()
            leave_out(found.view(1, -1), None, dropped)
            expected = lowest(scores, sizes.candidates_dropped)  # of equal ones, any may go
            assert torch.equal(scores[dropped[0]].sort().values, scores[expected].sort().values)
            assert len(set(dropped[0].tolist())) == sizes.candidates_dropped
            assert torch.equal(found, h.scatter(0, sizes.retained + dropped[0], 0))


@given(sizes_of, st.integers(2, 9), st.integers(0, 10), st.booleans(), st.sampled_from([torch.bfloat16, torch.float32]))
def test_sequences_choose_together_in_single_steps(sizes, rows, seed, some, dtype):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.rand(sizes.candidates, generator=generator)
    h = torch.randn(rows, sizes.width, generator=generator).to(dtype)
    valid = torch.rand(rows, generator=generator) < 0.7 if some else None
    if some:
        h[~valid] = math.nan  # has no say, whatever it holds
    together = torch.zeros(rows, dtype=torch.int64)
    scores = shared_scores(h[:, sizes.retained :], weight, together, 1, valid)[0]
    expected = lowest(scores, sizes.candidates_dropped)
    for leave_out in choosers(weight, sizes):
        found, dropped = h.clone(), torch.empty(1, sizes.candidates_dropped, dtype=torch.int64)
        leave_out(found, valid, dropped)
        close = {"rtol": 1e-5, "atol": 1e-7}  # sums in another order may exchange neighbours
        torch.testing.assert_close(scores[dropped[0]].sort().values, scores[expected].sort().values, **close)
        assert len(set(dropped[0].tolist())) == sizes.candidates_dropped
        zeroed = h.scatter(1, sizes.retained + dropped.expand(rows, -1), 0)
        assert torch.equal(found.nan_to_num(9), zeroed.nan_to_num(9))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_not_finite_goes_first_in_single_steps(bad, dtype):
    def dropped(count, *h):
        for leave_out in choosers(torch.ones(4, dtype=dtype), Sizes(10, 3, 4, 4 - count)):
            found = torch.empty(1, count, dtype=torch.int64)
            leave_out(torch.tensor([[bad, 0, 1, *h]], dtype=dtype), None, found)
            yield sorted(found[0].tolist())

    largest = torch.finfo(dtype).max
    assert all(found == [1] for found in dropped(1, 0.0, bad, -0.0, largest))
    assert all(found == [1, 2, 3] for found in dropped(3, -largest, bad, 1e-40, -2.0))


def test_what_the_compiled_choice_does_not_take_is_left_to_torch():
    seen = []

    def not_needed():
        raise AssertionError

    leave_out = kernels.library().chooser(torch.ones(4), Sizes(10, 0, 4, 2), not_needed, lambda h, _: seen.append(h))
    for h in torch.ones(1, 4).half(), torch.ones(4, 2).t()[:1], torch.ones(1, 4, requires_grad=True):
        leave_out(h, None)
        assert seen.pop() is h and not seen
