"""Products by chosen rows: C against naive float64 and against torch's modules, for every dtype, shape, storage and edge."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from helpers.covering import covers
from helpers.modes import threads_of_torch
from pop_mm.kernels.activations import ACTIVATIONS
from pop_mm.ops import library, reference
from pop_mm.ops.reference import FFNWeights
from pop_mm.ops.rows import RowsFFN, RowsLinear, why_not

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
CLOSE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}  # shares of the largest
INF, NAN = float("inf"), float("nan")


def between(magnitudes, share):
    """A float32 threshold about which ``share`` of the magnitudes lie, in the widest gap near: rounding moves none across."""
    ordered = magnitudes.flatten().float().sort().values
    at = int((1 - share) * len(ordered))
    near = ordered[max(at - 4, 0) : at + 5]
    gap = int(near.diff().argmax())
    return (near[gap : gap + 1] + near[gap + 1 : gap + 2]) / 2


class Maker:
    """Random tensors whose products sum without rounding (multiples of 1/8), or any."""

    def __init__(self, dtype, seed=0, exact=False):
        self.dtype, self.exact = dtype, exact
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape, gap=0, scale=0.3):
        *front, last = shape
        if self.exact:
            made = torch.randint(-8, 9, (*front, last + gap), generator=self.generator) / 8
        else:
            made = torch.randn(*front, last + gap, generator=self.generator) * scale
        return made.to(self.dtype)[..., :last]

    def ffn(self, hidden, size, experts=1, act="silu", gated=True, bias=False, gap=0, norms=True):
        def view(*shape):
            return self(experts, *shape, gap=gap), self(experts, shape[1]) if bias else None

        gate = view(hidden, size) if gated else None
        factors = torch.rand(experts, size, generator=self.generator) + 0.5 if norms else None
        return FFNWeights(gate, view(hidden, size), view(size, hidden), act, factors)


def naive_ffn(weights, x, threshold_x, threshold_h, expert=0):
    """One FFN in float64 without any rounding but that of magnitudes; also how many entries of x and h are kept, and |h|."""

    def product(vector, view):
        return vector @ view[0][expert].double() + (0 if view[1] is None else view[1][expert].double())

    x = x.double()
    above_x = x.abs().float() > threshold_x
    parts = [product(x * above_x, view) for view in weights.views[:-1]]
    h = ACTIVATIONS[weights.activation](parts[0])
    h = h * parts[1] if len(parts) == 2 else h
    magnitude = h.abs().float() * (1 if weights.norms is None else weights.norms[expert])
    above_h = magnitude > threshold_h[expert]
    return product(h * above_h, weights.down), [int(above_x.sum()), int(above_h.sum())], magnitude


def thresholds(weights, x, share_x=0.7, share_h=0.5):
    """Of an FFN or its experts, each its own, safely between magnitudes."""
    threshold_x = between(x.abs(), share_x)
    nothing = torch.full((len(weights.up[0]),), -1.0)
    found = [naive_ffn(weights, x, threshold_x, nothing, e)[2] for e in range(len(nothing))]
    return threshold_x, torch.cat([between(h, share_h) for h in found])


def assert_close(found, expected, dtype):
    assert found.dtype == dtype
    atol = CLOSE[dtype] * float(expected.abs().max()) + 1e-30
    torch.testing.assert_close(found.double(), expected.double(), rtol=0, atol=atol)


def run_ffn(weights, x, threshold_x, threshold_h, threads=1):
    kept = torch.zeros(2, dtype=torch.int64)
    with threads_of_torch(threads):
        return RowsFFN(weights)(x, threshold_x, threshold_h, kept), kept.tolist()


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("hidden", "outputs"), [(1, (1,)), (37, (5, 61, 700)), (64, (48, 16, 16)), (130, (33,))])
def test_linears_are_those_of_float64(dtype, threads, hidden, outputs):
    make = Maker(dtype, hidden)
    matrices = [(make(hidden, n, gap=3 * i), make(n) if i != 1 else None) for i, n in enumerate(outputs)]
    x = make(1, 1, hidden)
    threshold = between(x.abs(), 0.6) if hidden > 1 else torch.tensor([0.0])
    kept = torch.full((1,), 5)
    with threads_of_torch(threads):
        found = RowsLinear(matrices)(x, threshold, None, kept)
    above = x.flatten().abs().float() > threshold
    assert kept.item() == 5 + int(above.sum())
    assert [len(y) for y in found] == list(outputs)
    for y, (weight, bias) in zip(found, matrices, strict=True):
        expected = (x.flatten().double() * above) @ weight.double() + (0 if bias is None else bias.double())
        assert_close(y, expected, dtype)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_each_matrix_may_have_its_own_input(dtype, threads):
    """As the down projections of a token's experts have."""
    make = Maker(dtype)
    matrices = [(make(45, 19), make(19)) for _ in range(3)]
    x, norms = make(3, 45), torch.rand(3, 45, generator=make.generator)
    threshold = torch.cat([between(v.abs().float() * n, 0.5) for v, n in zip(x, norms, strict=True)])
    kept = torch.zeros(1, dtype=torch.int64)
    with threads_of_torch(threads):
        found = RowsLinear(matrices)(x, threshold, norms, kept)
    above = x.abs().float() * norms > threshold[:, None]
    assert kept.item() == int(above.sum())
    for y, v, mask, (weight, bias) in zip(found, x, above, matrices, strict=True):
        assert_close(y, (v.double() * mask) @ weight.double() + bias.double(), dtype)


@pytest.mark.parametrize("threads", [1, 2])
def test_only_some_matrices_may_take_part(threads):
    """The experts of a token, by two calls with something else between them."""
    make = Maker(torch.float64)
    weights = make.ffn(20, 24, experts=4, act="relu", bias=True)
    x, ids, router = make(20), [3, 1], torch.tensor([0.25, 0.75], dtype=torch.float64)
    threshold_x, threshold_h = thresholds(weights, x)
    gate, up, down = (list(zip(*view, strict=True)) for view in weights.views)
    inward, outward = RowsLinear([view for pair in zip(gate, up, strict=True) for view in pair]), RowsLinear(down)
    kept = torch.zeros(2, dtype=torch.int64)
    with threads_of_torch(threads):
        found = inward(x, threshold_x, None, kept, [n for e in ids for n in (2 * e, 2 * e + 1)])
        h = torch.stack([F.relu(g) * u for g, u in (found[:2], found[2:])])
        y = outward(h, threshold_h[ids], weights.norms[ids], kept[1:], ids)
    expected, counts = reference.experts(weights, x, torch.tensor(ids), router, threshold_x, threshold_h)
    assert_close(y[0] * router[0] + y[1] * router[1], expected, torch.float64)
    assert kept.tolist() == counts.tolist()


@covers(dtype=DTYPES, threads=(1, 2, 3), gated=(True, False), act=ACTIVATIONS)
def test_ffns_are_those_of_float64(dtype, threads, gated, act):
    make = Maker(dtype, 3)
    weights = make.ffn(37, 61, act=act, gated=gated, bias=act != "relu", gap=5, norms=act != "gelu")
    x = make(2, 37)[1:, None]
    threshold_x, threshold_h = thresholds(weights, x.flatten())
    if dtype in (torch.bfloat16, torch.float16):  # roundings between may move a few: the reference has them too
        reference_y, counts = reference.ffn(weights, x.flatten(), threshold_x, threshold_h)
        expected, expected_kept = reference_y.double(), counts.tolist()
        exact = naive_ffn(weights, x.flatten(), threshold_x, threshold_h)[0]
        assert_close(reference_y, exact, dtype)
    else:
        expected, expected_kept, _ = naive_ffn(weights, x.flatten(), threshold_x, threshold_h)
    found, kept = run_ffn(weights, x, threshold_x, threshold_h, threads)
    assert found.shape == x.shape
    assert kept == expected_kept
    assert_close(found.flatten(), expected, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("hidden", "size"), [(1, 1), (16, 2000), (700, 40), (33, 1030)])
def test_any_size(dtype, hidden, size):
    make = Maker(dtype, size)
    weights = make.ffn(hidden, size, bias=True)
    x = make(hidden)
    nothing = torch.tensor([-1.0])
    for threads in (1, 2, 7):
        found, kept = run_ffn(weights, x, nothing, nothing, threads)
        assert kept == [hidden, size]
        assert_close(found, naive_ffn(weights, x, nothing, nothing)[0], dtype)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_roundings_and_ties_are_those_of_modules(dtype, threads):
    """Sums of multiples of 1/64 are exact, so bits are equal; the thresholds are magnitudes that occur: those are left out."""
    make = Maker(dtype, 1, exact=True)
    weights = make.ffn(40, 56, act="relu", bias=True, norms=False)
    x = make(40)
    threshold_x = torch.tensor([0.5])

    def module(view):
        made = nn.Linear(*view[0][0].shape, dtype=dtype)
        made.weight.data, made.bias.data = view[0][0].t().contiguous(), view[1][0]
        return made

    gate, up, down = (module(view) for view in weights.views)
    with torch.no_grad():
        masked = x * (x.abs() > 0.5)
        h = F.relu(gate(masked)) * up(masked)
        threshold_h = h.abs().float().sort().values[40:41].contiguous()
        assert threshold_h > 0
        above = h.abs().float() > threshold_h
        expected = down(h * above)
    found, kept = run_ffn(weights, x, threshold_x, threshold_h, threads)
    assert kept == [int((x.abs() > 0.5).sum()), int(above.sum())]
    assert kept[0] < int((x.abs() >= 0.5).sum())
    assert found.tolist() == expected.tolist()
    slow, counts = reference.ffn(weights, x, threshold_x, threshold_h)
    assert slow.tolist() == expected.tolist() and counts.tolist() == kept


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_stays_visible_and_infinity_is_a_magnitude(dtype):
    make = Maker(dtype)
    for length in (40, 5):  # by vectors, and behind them
        matrix, x = make(length, 20), make(length)
        x[2] = NAN
        for threshold, nan_alone in ((0.1, False), (INF, True)):
            kept = torch.zeros(1, dtype=torch.int64)
            (y,) = RowsLinear([(matrix, None)])(x, torch.tensor([threshold]), None, kept)
            assert y.isnan().all()
            assert kept.item() == (1 if nan_alone else 1 + int((x.abs().float() > threshold).sum()))
        x[2] = INF
        (y,) = RowsLinear([(matrix.abs() + 0.1, None)])(x, torch.tensor([3e4]))
        assert (y == INF).all()
        (y,) = RowsLinear([(matrix, None)])(x, torch.tensor([INF]))
        assert (y == 0).all()
        (y,) = RowsLinear([(matrix, None)])(x, torch.tensor([NAN]))  # no threshold: all
        assert y.isnan().any() or y.isinf().any()


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_left_out_is_not_read(dtype, threads):
    """Weights that are no numbers do no harm where the entry is left out."""
    make = Maker(dtype)
    weights = make.ffn(40, 56, bias=True)
    x = make(40)
    threshold_x, threshold_h = thresholds(weights, x)
    before, _ = run_ffn(weights, x, threshold_x, threshold_h, threads)
    h = naive_ffn(weights, x, threshold_x, threshold_h)[2]
    for matrix, out in ((weights.gate[0], x.abs().float() <= threshold_x), (weights.down[0], h <= threshold_h)):
        assert out.any()
        matrix[:, out] = NAN
    after, _ = run_ffn(weights, x, threshold_x, threshold_h, threads)
    assert after.tolist() == before.tolist()


@pytest.mark.parametrize("threads", [1, 2])
def test_nothing_kept_leaves_the_biases(threads):
    make = Maker(torch.float64)
    weights = make.ffn(40, 56, bias=True)
    x, most, nothing = make(40), torch.tensor([INF]), torch.tensor([-1.0])
    found, kept = run_ffn(weights, x, most, most, threads)
    assert kept == [0, 0] and found.tolist() == weights.down[1][0].tolist()
    found, kept = run_ffn(weights, x, most, nothing, threads)
    assert kept == [0, 56]
    assert_close(found, naive_ffn(weights, x * 0, nothing, nothing)[0], torch.float64)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("wide", [False, True])
def test_experts_are_those_of_float64(dtype, threads, wide):
    make = Maker(dtype, 2)
    weights = make.ffn(37, 61, experts=5, bias=True, gap=4)
    x, ids = make(37), torch.tensor([3, 0, 4])
    router = torch.tensor([0.5, 0.3, 0.2], dtype=torch.promote_types(dtype, torch.float32) if wide else dtype)
    threshold_x, threshold_h = thresholds(weights, x)
    kept = torch.zeros(2, dtype=torch.int64)
    with threads_of_torch(threads):
        found = RowsFFN(weights).experts(x, ids, router, threshold_x, threshold_h, kept)
    each = [naive_ffn(weights, x, threshold_x, threshold_h, e) for e in ids.tolist()]
    expected = sum(y * w for (y, *_), w in zip(each, router.double(), strict=True))
    assert_close(found, expected, dtype)
    slow, counts = reference.experts(weights, x, ids, router, threshold_x, threshold_h)
    assert_close(slow, expected, dtype)
    assert kept.tolist() == counts.tolist()
    if dtype in (torch.float32, torch.float64):
        assert kept.tolist() == [each[0][1][0], sum(counts[1] for _, counts, _ in each)]


def test_experts_of_other_devices_add_nothing():
    make = Maker(torch.float64)
    weights = make.ffn(20, 24, experts=3, bias=True)
    x, router, nothing = make(20), torch.tensor([0.5, 0.5], dtype=torch.float64), torch.full((3,), -1.0)
    for ids in ((1, 3), (1, -1)):
        found = RowsFFN(weights).experts(x, torch.tensor(ids), router, nothing[:1], nothing)
        assert_close(found, naive_ffn(weights, x, nothing[:1], nothing, 1)[0] / 2, torch.float64)


def test_thresholds_are_read_at_every_call():
    make = Maker(torch.float64)
    weights = make.ffn(30, 40, experts=2)
    x, threshold_x, threshold_h = make(30), torch.tensor([0.1]), torch.tensor([0.01, 0.02])
    step = RowsFFN(weights)
    for _ in range(2):
        expected, *_ = naive_ffn(weights, x, threshold_x, threshold_h)
        assert_close(step(x, threshold_x, threshold_h), expected, torch.float64)
        threshold_x.fill_(0.3)
        threshold_h.fill_(0.05)


def test_fused_and_transposed_weights_are_read_where_they_are():
    """Gate and up as halves of one matrix [H, 2D], experts as views of [E, H, 2D]."""
    make = Maker(torch.float32)
    fused, down = make(3, 30, 80), make(3, 40, 30)
    separate = FFNWeights((fused[..., :40].contiguous(), None), (fused[..., 40:].contiguous(), None), (down, None))
    views = FFNWeights((fused[..., :40], None), (fused[..., 40:], None), (down, None))
    x, ids, router = make(30), torch.tensor([2, 1]), torch.tensor([0.25, 0.75])
    threshold_x, threshold_h = torch.tensor([0.1]), torch.full((3,), 0.02)
    found, expected = (RowsFFN(w).experts(x, ids, router, threshold_x, threshold_h).tolist() for w in (views, separate))
    assert found == expected


def test_other_storages_and_devices_are_refused():
    make = Maker(torch.float32)
    assert why_not([(make(8, 6), None)]) is None
    assert "not stored input-major" in why_not([(make(6, 8).t(), None)])
    assert "several dtypes" in why_not([(make(8, 6), make(6).double())])
    assert "not on the CPU" in why_not([(torch.empty(8, 6, device="meta"), None)])
    assert "bias is not contiguous" in why_not([(make(8, 6), make(6, 2)[:, 0])])
    assert "is empty" in why_not([(make(8, 0), None)])
    assert "torch.int8" in why_not([(torch.zeros(8, 6, dtype=torch.int8), None)])


def test_without_a_compiler_it_says_so(monkeypatch):
    monkeypatch.setattr("pop_mm.native.compiler.command", lambda: [])
    assert library.make(torch.float32) == "none was found"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_number_of_two_bytes_is_read_and_rounded_right(dtype):
    """Times one it is itself; and sums are rounded as torch rounds them."""
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)
    one, nothing = torch.ones(1, dtype=dtype), torch.tensor([-1.0])
    (found,) = RowsLinear([(every[None], None)])(one, nothing)
    same = (found == every) | (found.isnan() & every.isnan())
    assert same.all()
    third = torch.tensor([1 / 3], dtype=dtype)
    (found,) = RowsLinear([(every[None], None)])(third, nothing)
    expected = (every.float() * third.float()).to(dtype)
    assert ((found == expected) | (found.isnan() & expected.isnan())).all()
    kept = torch.zeros(1, dtype=torch.int64)
    threshold = torch.tensor([0.37])
    RowsLinear([(torch.ones(1 << 16, 1, dtype=dtype), None)])(every, threshold, None, kept)
    assert kept.item() == int((~(every.float().abs() <= threshold)).sum())
