"""Products by chosen rows of int8 weights: C against float64 with the dequantised weights, and their storage."""

import pytest
import torch
from test_rows import Maker, assert_close, between, naive_ffn, thresholds

from helpers.covering import covers
from helpers.modes import threads_of_torch
from pop_mm.kernels.activations import ACTIVATIONS
from pop_mm.ops import library, reference
from pop_mm.ops.reference import FFNWeights
from pop_mm.ops.rows import RowsFFN, RowsLinear, why_not
from pop_mm.ops.turn import is_turned, turn


def quantised(weight):
    """``[..., in, out]`` int8 with a scale for each output, ``[..., out]``; and the product of both, in float64."""
    scale = weight.float().abs().amax(-2).clamp_min(1e-6) / 127
    matrix = (weight.float() / scale.unsqueeze(-2)).round().to(torch.int8)
    return matrix, scale.contiguous(), matrix.double() * scale.double().unsqueeze(-2)


def int8_ffn(dtype, hidden, size, act="silu", gated=True, bias=False, experts=1):
    """An FFN of int8 weights, and its dequantised twin in float64."""
    plain = Maker(dtype, 3).ffn(hidden, size, experts, act, gated, bias)
    made = [quantised(weight) for weight, _ in plain.views]
    biases = [bias for _, bias in plain.views]

    def view(number):
        return made[number][0], biases[number]

    def wide(number):
        return made[number][2], None if biases[number] is None else biases[number].double()

    def gate(get):
        return get(0) if gated else None

    scales = [scale for _, scale, _ in made]
    weights = FFNWeights(gate(view), view(-2), view(-1), act, plain.norms, scales)
    return weights, FFNWeights(gate(wide), wide(-2), wide(-1), act, plain.norms)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("dtype", library.INT8)
@pytest.mark.parametrize(("hidden", "outputs"), [(1, (1,)), (37, (5, 61, 700)), (64, (48, 16, 16)), (130, (33, 129))])
def test_linears_are_those_of_float64(dtype, threads, hidden, outputs):
    make = Maker(dtype, hidden)
    made = [quantised(make(hidden, n)) for n in outputs]
    biases = [make(n) if i != 1 else None for i, n in enumerate(outputs)]
    views, scales = [(m, b) for (m, _, _), b in zip(made, biases, strict=True)], [scale for _, scale, _ in made]
    assert why_not(views, dtype) is None
    x, kept = make(1, 1, hidden), torch.full((1,), 5)
    threshold = between(x.abs(), 0.6) if hidden > 1 else torch.tensor([0.0])
    with threads_of_torch(threads):
        found = RowsLinear(views, None, dtype, scales)(x, threshold, None, kept)
    above = x.flatten().abs().float() > threshold
    assert kept.item() == 5 + int(above.sum())
    told, counts = reference.rows(views, x.view(1, -1), threshold, None, scales)
    assert counts.item() == int(above.sum())
    for y, other, (_, _, weight), bias in zip(found, told, made, biases, strict=True):
        expected = (x.flatten().double() * above) @ weight + (0 if bias is None else bias.double())
        assert_close(y, expected, dtype)
        assert_close(other, expected, dtype)


@covers(dtype=library.INT8, threads=(1, 2, 3), gated=(True, False), act=ACTIVATIONS)
def test_ffns_are_those_of_float64(dtype, threads, gated, act):
    weights, twin = int8_ffn(dtype, 37, 161, act, gated, bias=act != "relu")
    x, kept = Maker(dtype, 5)(37), torch.zeros(2, dtype=torch.int64)
    threshold_x, threshold_h = thresholds(twin, x)
    expected, counts = reference.ffn(weights, x, threshold_x, threshold_h)
    with threads_of_torch(threads):
        found = RowsFFN(weights, None, dtype)(x, threshold_x, threshold_h, kept)
    assert_close(found, expected.double(), dtype)
    assert kept.tolist() == counts.tolist()
    exact, exact_counts, _ = naive_ffn(twin, x, threshold_x, threshold_h)
    assert_close(found, exact, dtype)
    if dtype is torch.float32:  # roundings between may move a few in the others
        assert kept.tolist() == exact_counts


@pytest.mark.parametrize("dtype", library.INT8)
def test_experts(dtype):
    weights, _ = int8_ffn(dtype, 45, 70, bias=True, experts=4)
    x, ids, router = Maker(dtype, 5)(45), torch.tensor([3, 1]), torch.tensor([0.25, 0.75])
    bounds = torch.tensor([0.2]), torch.tensor([0.01, 0.02, 0.03, 0.04])
    kept = torch.zeros(2, dtype=torch.int64)
    found = RowsFFN(weights, None, dtype).experts(x, ids, router, *bounds, kept)
    expected, counts = reference.experts(weights, x, ids, router, *bounds)
    assert_close(found, expected.double(), dtype)
    assert kept.tolist() == counts.tolist()


@pytest.mark.parametrize("dtype", library.INT8)
def test_every_number_is_read_right(dtype):
    """Times one and a scale of a power of two it is exact; 300 outputs end in the middle of a step."""
    every = torch.arange(-128, 172).clamp(max=127).to(torch.int8)
    kernel = RowsLinear([(every[None].contiguous(), None)], None, dtype, [torch.full((300,), 0.25)])
    (found,) = kernel(torch.ones(1, dtype=dtype), torch.tensor([-1.0]))
    assert torch.equal(found, every.to(dtype) * 0.25)


def test_scales_come_with_int8_alone():
    matrix, scale, _ = quantised(torch.randn(8, 8))
    with pytest.raises(RuntimeError, match="without scales"):
        RowsLinear([(matrix, None)], None, torch.float32)
    with pytest.raises(RuntimeError, match="with scales"):
        RowsLinear([(torch.randn(8, 8), None)], None, None, [scale])
    assert "weights of torch.int8" in why_not([(matrix, None)], torch.float64)
    assert "several dtypes" in why_not([(matrix, torch.randn(8).bfloat16())], torch.float32)


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("shape", [(1, 7), (64, 64), (130, 67), (200, 129)])
def test_int8_is_turned_and_back_bit_for_bit(monkeypatch, shape, compiled):
    if not compiled:
        monkeypatch.setattr("pop_mm.ops.turn.library", lambda *_: None)
    matrix = torch.randint(-128, 128, shape, generator=torch.Generator().manual_seed(0)).to(torch.int8)
    before = matrix.clone()
    for threads in (1, 2):
        with threads_of_torch(threads):
            turned = turn(matrix)
            assert is_turned(matrix) and torch.equal(matrix, before)
            if turned is not None:
                turned.back()
        assert matrix.is_contiguous() and torch.equal(matrix, before)
        assert matrix.untyped_storage().nbytes() == before.nbytes
