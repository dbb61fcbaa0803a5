import math

import pytest
import torch
from hypothesis import given as hypothesis_given
from hypothesis import settings
from hypothesis import strategies as st

from pop_mm import ConfigError
from pop_mm.partition import partition, partition_sizes


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
