"""Sums over numbers of weights: the same from C and torch, and others if a number or its place is another."""

import pytest
import torch

from pop_mm.ops.sample import sample

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def matrices(dtype):
    """Rows, columns, experts, and channels that stand elsewhere."""
    draw = torch.Generator().manual_seed(0)

    def values(*shape):
        return torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype)

    places = torch.stack([torch.randperm(70, generator=draw) for _ in range(3)])
    return [
        (values(1, 50, 33), None),
        (values(1, 33, 50).transpose(1, 2), None),
        (values(3, 70, 40), places),
        (values(3, 40, 70).transpose(1, 2), places),
        (values(100)[::3].view(1, -1, 1), None),
        (values(0).view(1, 0, 1), None),
    ]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threads", [1, 2])
def test_c_and_torch_find_the_same_sums(dtype, threads, monkeypatch):
    wanted = matrices(dtype)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = sample(wanted)
    finally:
        torch.set_num_threads(before)
    monkeypatch.setattr("pop_mm.ops.sample.library", lambda _: None)

    assert found == sample(wanted)
    assert len(set(found)) == len(found)


def loop(matrix, places):
    units, size, width = matrix.shape
    bits = matrix.contiguous().view(torch.int64)
    total = 0
    for k in range(units * size):
        unit, channel = divmod(k, size)
        place = channel if places is None else int(places[unit, channel])
        total += (2 * k + 1) * int(bits[unit, place, k % width])
    return (total + 2**63) % 2**64 - 2**63


def test_the_sums_are_those_of_a_loop():
    wanted = matrices(torch.float64)

    assert sample(wanted) == [loop(*one) for one in wanted]


def test_channels_that_are_exchanged_are_seen_and_their_places_undo_it():
    [(matrix, _), *_] = matrices(torch.float32)
    order = torch.arange(50)
    order[[3, 41]] = order[[41, 3]]
    moved = matrix[:, order]

    assert sample([(moved, None)]) != sample([(matrix, None)])
    assert sample([(moved, order.view(1, -1))]) == sample([(matrix, None)])
