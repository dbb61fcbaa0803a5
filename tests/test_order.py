"""The order of channels: few exchanges, right zones, exact restoration, and compiled moves equal to torch's."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import pop_mm.kernels as kernels
from helpers.channels import bits, same_bits
from helpers.modes import EXPERT_LAYOUTS, LAYOUTS, generate, pruned, threads_of_torch, without_library
from helpers.observe import prompt
from helpers.tiny_models import tiny
from pop_mm.executors.order import ChannelOrder, zone_swaps
from pop_mm.formats import norms
from pop_mm.partition import Sizes, partition
from pop_mm.weights.exchange import as_integers, swap_channels

DTYPES = (torch.int8, torch.float16, torch.bfloat16, torch.float32, torch.float64)


@pytest.fixture(scope="module")
def exchange():
    return kernels.load("compiled").exchange


def matrix(shape, dtype):
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randint(-100, 100, shape, generator=generator).to(dtype)


def pairs(size, count, seed=0):
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
    return order[:count].contiguous(), order[count : 2 * count].contiguous()


def swap_by_torch(weight, axis, first, second):
    with without_library():
        swap_channels([(weight, axis)], first, second)


@settings(max_examples=80, deadline=None)
@given(
    dtype=st.sampled_from(DTYPES),
    rows=st.integers(2, 90),
    columns=st.integers(2, 700),
    count=st.integers(1, 40),
    axis=st.integers(0, 1),
    layout=st.sampled_from(["plain", "transposed", "narrow", "interleaved", "single"]),
    threads=st.integers(1, 4),
)
def test_compiled_moves_are_those_of_torch(exchange, dtype, rows, columns, count, axis, layout, threads):
    def view(whole):
        if layout == "transposed":
            return whole.t()
        if layout == "narrow":
            return whole[1:, 1:] if min(whole.shape) > 2 else whole
        if layout == "interleaved":
            return whole[:, ::2]
        return whole[:, :1] if layout == "single" else whole

    found, expected = matrix((rows, columns), dtype), matrix((rows, columns), dtype)
    size = view(found).shape[axis]
    first, second = pairs(size, min(count, size // 2))
    with threads_of_torch(threads):
        exchange(view(found), axis, first, second)
    swap_by_torch(view(expected), axis, first, second)
    assert torch.equal(found, expected)
    own = view(matrix((rows, columns), dtype))
    index = torch.arange(size)
    index[first], index[second] = second, first
    assert torch.equal(view(expected), own.index_select(axis, index))


def test_large_weights_are_shared_out_among_threads(exchange):
    for dtype in torch.bfloat16, torch.float32:
        for axis in 0, 1:
            found, expected = (
                torch.randn(700, 700, generator=torch.Generator().manual_seed(0)).to(dtype) for _ in "ab"
            )
            first, second = pairs(700, 333)
            exchange(found, axis, first, second)
            swap_by_torch(expected, axis, first, second)
            assert torch.equal(found, expected)


def test_every_bit_pattern_survives(exchange):
    weight = torch.tensor([[0x7FC1, 0x8000, 1], [0xFF81 - 0x10000, 2, 3]], dtype=torch.int32).to(torch.int16)
    before = weight.clone()
    exchange(weight.view(torch.bfloat16), 1, torch.tensor([0]), torch.tensor([2]))
    assert torch.equal(weight, before[:, [2, 1, 0]])


@settings(max_examples=100, deadline=None)
@given(data=st.data(), size=st.integers(1, 60))
def test_channels_come_into_their_zones_and_back(data, size):
    retained = data.draw(st.integers(0, size))
    candidates = data.draw(st.integers(0, size - retained))
    sizes = Sizes(size, retained, candidates, candidates // 2)
    weight = torch.arange(size)

    def swap(first, second):
        assert len({*first.tolist(), *second.tolist()}) == 2 * len(first) > 0
        weight[first], weight[second] = weight[second], weight[first]

    order = ChannelOrder(size, torch.device("cpu"), swap)
    for seed in range(3):
        part = partition(
            torch.rand(size, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99)) + seed)), sizes
        )
        zones = part.zones().numpy()
        here = np.repeat([0, 1, 2], [retained, candidates, sizes.pruned])
        moved = order.place(zones, sizes)
        assert weight.tolist() == order.channel_at.tolist() == order.front(size).tolist()
        assert (zones[order.channel_at] == here).all()
        assert order.position_of[weight].tolist() == list(range(size))
        ranks = order.candidate_ranks(zones, sizes)
        assert part.candidates[ranks].tolist() == weight[retained : sizes.width].tolist()
        assert order.place(zones, sizes) == 0
        assert moved <= 2 * size
    order.restore()
    assert weight.tolist() == order.channel_at.tolist() == list(range(size))
    assert not order.moved


def test_pairs_that_stand_in_each_others_zone_take_one_exchange():
    sizes = Sizes(6, 2, 2, 1)
    (first, second), (third, _) = zone_swaps(np.array([0, 2, 1, 1, 0, 2], np.uint8), sizes)
    assert (first.tolist(), second.tolist(), third.tolist()) == ([1], [4], [])
    rounds = zone_swaps(np.array([1, 0, 2, 1, 0, 2], np.uint8), sizes)  # three channels in a ring take two
    assert [len(first) for first, _ in rounds] == [1, 1]


@pytest.mark.parametrize("model_type", [*LAYOUTS, *EXPERT_LAYOUTS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_move_and_come_back_as_by_torch(model_type, dtype):
    model = tiny(model_type, dtype)
    before, found = bits(model), {}
    for library in without_library(), nullcontext():
        with library, pruned(model, "inplace") as session:
            for seed in 0, 1:
                generate(model, prompt(2, 9, seed), 3)
            raw = {name: p.detach().clone() for name, p in model.named_parameters()}
            found[library] = raw, session.report.moved_channels
        assert same_bits(bits(model), before)
    (stock, moved), (compiled, compiled_moved) = found.values()
    assert moved == compiled_moved > 0
    for name, tensor in stock.items():
        assert torch.equal(as_integers(tensor), as_integers(compiled[name])), name


@pytest.mark.parametrize("library", [without_library(), nullcontext()], ids=["torch", "compiled"])
def test_autograd_notices_that_weights_moved(library):
    weight = torch.randn(4, 4, requires_grad=True)
    x = torch.randn(1, 4, requires_grad=True)
    out = torch.nn.functional.linear(x, weight).sum()
    with torch.no_grad(), library:
        swap_channels([(weight, 0)], torch.tensor([0]), torch.tensor([1]))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", [0, 1])
def test_norms_of_weights_are_taken_in_pieces(monkeypatch, dim, dtype):
    """Torch copies all that it is given in float32, which is twice a bfloat16 weight's memory."""
    monkeypatch.setattr(norms, "_NORM_WEIGHTS", 1000)
    own, sizes = torch.linalg.vector_norm, []
    monkeypatch.setattr(
        torch.linalg, "vector_norm", lambda piece, **how: (sizes.append(piece.numel()), own(piece, **how))[1]
    )
    matrix = torch.randn(110, 90, generator=torch.Generator().manual_seed(0)).to(dtype)
    wide = torch.float32
    found = norms.weight_norms(matrix, dim, wide)
    torch.testing.assert_close(found, matrix.to(wide).square().sum(dim).sqrt())
    assert sum(sizes) == matrix.numel()
    assert max(sizes) <= 1000
    long = norms.weight_norms(
        torch.ones(2000, 3, dtype=dtype).transpose(0, dim), dim, wide
    )  # one line is more than a piece
    assert long.tolist() == pytest.approx([2000**0.5] * 3)


def test_norms_of_weights_are_taken_where_they_are():
    matrix = torch.ones(4, 3, dtype=torch.bfloat16)
    with torch.device("meta"):  # as with a default device that is a GPU
        assert norms.weight_norms(matrix, 0, torch.float32).tolist() == [2, 2, 2]
