import math

import pytest
import torch
from hypothesis import given as hypothesis_given
from hypothesis import settings
from hypothesis import strategies as st

from pop_mm import ConfigError, kernels
from pop_mm.partition import Sizes, dropped_candidates, partition, partition_sizes, shared_scores, step_chooser


def given(*strategies):
    """Hypothesis' ``given``, with the same examples at every run and no time limit for a slow machine."""
    return lambda test: settings(derandomize=True, deadline=None)(hypothesis_given(*strategies)(test))


ratios = st.floats(0, 0.99)
gammas = st.floats(0, 1)
channel_counts = st.integers(1, 300)
sizes_of = st.builds(partition_sizes, channel_counts, ratios, gammas, st.sampled_from([1, 1, 2, 8, 16]))


def scores_for(sizes, seed, levels=None, leading=()):
    """Random scores; with few levels there are many ties."""
    generator = torch.Generator().manual_seed(seed)
    if levels:
        return torch.randint(levels, (*leading, sizes.channels), generator=generator).float()
    return torch.rand(*leading, sizes.channels, generator=generator)


@given(channel_counts, ratios, gammas)
def test_sizes_follow_the_formula(channels, ratio, gamma):
    sizes = partition_sizes(channels, ratio, gamma)
    kept = channels - math.floor(ratio * channels + 1e-6)
    c = min(round(gamma * channels / 2), kept, channels - kept)
    assert (sizes.retained, sizes.candidates, sizes.pruned) == (kept - c, 2 * c, channels - kept - c)
    assert (sizes.kept, sizes.candidates_kept, sizes.candidates_dropped) == (kept, c, c)
    assert sizes.width == kept + c
    assert min(sizes.retained, sizes.candidates, sizes.pruned) >= 0
    assert sizes.dense == (kept == channels)


@pytest.mark.parametrize(
    ("channels", "ratio", "gamma", "expected"),
    [
        (100, 0.3, 0.1, (65, 10, 25)),
        (100, 0.3, 0.0, (70, 0, 30)),
        (100, 0.3, 1.0, (40, 60, 0)),  # gamma clamped: |C| / 2 cannot exceed the pruned share
        (100, 0.9, 1.0, (0, 20, 80)),  # nor the kept one
        (100, 0.0, 0.1, (100, 0, 0)),
        (10, 0.7, 0.2, (2, 2, 6)),  # 0.7 * 10 is 6.999...: seven channels are left out all the same
        (1, 0.9, 1.0, (1, 0, 0)),
    ],
)
def test_sizes_by_hand(channels, ratio, gamma, expected):
    sizes = partition_sizes(channels, ratio, gamma)
    assert (sizes.retained, sizes.candidates, sizes.pruned) == expected


@pytest.mark.parametrize("channels", [1, 7, 64, 14336])
@pytest.mark.parametrize("variant", ["pop", "static", "full"])
def test_a_ratio_that_keeps_no_channel_is_refused(channels, variant):
    with pytest.raises(ConfigError, match=rf"none of an FFN's {channels} channels") as error:
        partition_sizes(channels, 1 - 1e-12, 0.1, 1, variant)
    named = float(str(error.value).split("exceed ")[-1].rstrip("."))
    assert partition_sizes(channels, named, 0.1, 1, variant).kept in (1, 2)


@given(channel_counts, ratios, gammas, st.sampled_from([2, 8, 16, 64, 1000]))
def test_round_to_widens_the_candidates_and_nothing_else(channels, ratio, gamma, multiple):
    plain, rounded = partition_sizes(channels, ratio, gamma), partition_sizes(channels, ratio, gamma, multiple)
    assert rounded.kept == plain.kept
    assert rounded.retained == plain.retained
    assert rounded.width % multiple == 0 or rounded.width == channels
    assert plain.width <= rounded.width < plain.width + multiple
    assert rounded.retained + rounded.candidates + rounded.pruned == channels


@given(channel_counts, ratios, gammas, gammas)
def test_sizes_are_monotone_in_gamma(channels, ratio, a, b):
    low, high = (partition_sizes(channels, ratio, gamma) for gamma in sorted((a, b)))
    assert low.candidates <= high.candidates
    assert low.retained >= high.retained
    assert low.pruned >= high.pruned
    assert low.kept == high.kept


@given(channel_counts, ratios, gammas)
def test_variants_keep_the_same_number(channels, ratio, gamma):
    pop, static, full = (partition_sizes(channels, ratio, gamma, 1, v) for v in ("pop", "static", "full"))
    assert pop.kept == static.kept == full.kept
    assert (static.candidates, static.retained) == (0, pop.kept)
    assert (full.candidates, full.pruned) == (channels, 0)


@given(sizes_of, st.integers(0, 2**31), st.sampled_from([None, 1, 3]))
def test_partition_is_a_partition_in_rank_order(sizes, seed, levels):
    scores = scores_for(sizes, seed, levels)
    result = partition(scores, sizes)
    parts = (result.retained, result.candidates, result.pruned)
    assert [len(part) for part in parts] == [sizes.retained, sizes.candidates, sizes.pruned]
    assert torch.cat(parts).sort().values.tolist() == list(range(sizes.channels))
    assert all(part.tolist() == sorted(part.tolist()) for part in parts)
    # the ranking, by definition: score downwards, then channel number upwards
    ranking = sorted(range(sizes.channels), key=lambda channel: (-scores[channel].item(), channel))
    assert result.retained.tolist() == sorted(ranking[: sizes.retained])
    assert result.front().sort().values.tolist() == sorted(ranking[: sizes.width])
    assert result.allowed().nonzero().flatten().tolist() == sorted(ranking[: sizes.width])


@given(channel_counts, ratios, gammas, gammas, st.integers(0, 2**31))
def test_partitions_are_nested_in_gamma(channels, ratio, a, b, seed):
    low, high = (partition_sizes(channels, ratio, gamma) for gamma in sorted((a, b)))
    scores = scores_for(low, seed, 5)
    small, large = partition(scores, low), partition(scores, high)
    assert set(large.retained.tolist()) <= set(small.retained.tolist())
    assert set(large.pruned.tolist()) <= set(small.pruned.tolist())


@given(sizes_of, st.integers(0, 2**31), st.sampled_from([(3,), (2, 3), (1, 1, 2)]))
def test_leading_axes_are_independent(sizes, seed, leading):
    scores = scores_for(sizes, seed, 4, leading)
    together = partition(scores, sizes)
    for index in torch.cartesian_prod(*(torch.arange(n) for n in leading)).view(-1, len(leading)).tolist():
        alone = partition(scores[tuple(index)], sizes)
        for name in ("retained", "candidates", "pruned"):
            assert torch.equal(getattr(together, name)[tuple(index)], getattr(alone, name))
        assert torch.equal(together.allowed()[tuple(index)], alone.allowed())


@given(sizes_of, st.integers(0, 2**31), st.data())
def test_dropped_are_the_lowest(sizes, seed, data):
    scores = torch.rand(2, sizes.candidates, generator=torch.Generator().manual_seed(seed))
    bad = data.draw(st.integers(0, sizes.candidates))
    scores[0, :bad] = data.draw(st.sampled_from([math.nan, math.inf, -math.inf]))
    dropped = dropped_candidates(scores, sizes)
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
    assert dropped_candidates(torch.tensor([0.0, bad, 1.0, 2.0]), Sizes(10, 3, 4, 3)).tolist() == [1]


def test_scores_are_left_as_they_are():
    sizes = partition_sizes(20, 0.5, 0.4)
    scores = torch.tensor([math.nan] * 4 + [1.0] * 4)
    before = scores.clone()
    dropped_candidates(scores, sizes)
    assert torch.equal(scores.nan_to_num(), before.nan_to_num())


def choosers(weight, sizes):
    """Torch's and, of float32, the compiled one, which may use the other where it cannot read the activations."""

    def not_needed(*_):
        raise AssertionError

    def compiled(h, valid, dropped):
        library.chooser(weight, sizes, dropped.data_ptr, not_needed)(h, valid)

    library = kernels.library() if weight.dtype == torch.float32 else None
    return [step_chooser(weight, sizes), *([compiled] if library else [])]


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
            expected = dropped_candidates(scores, sizes)  # of equal ones, any may go
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
    scores = shared_scores(h[:, sizes.retained :], weight, valid)
    expected = dropped_candidates(scores, sizes)
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
