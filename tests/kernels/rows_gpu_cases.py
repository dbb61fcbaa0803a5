"""What test_gpu_kernels.py runs in a process of its own, since Triton decides once whether it interprets.

On a GPU if there is one; else with TRITON_INTERPRET=1 on the CPU.
"""

import pytest
import torch

from pop_mm.kernels.activations import ACTIVATIONS
from pop_mm.ops import reference
from pop_mm.ops.gpu_rows import GPURowsFFN, GPURowsLinear, why_not
from pop_mm.ops.reference import FFNWeights

torch.set_num_threads(1)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CLOSE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}  # shares of the largest
INF, NAN = float("inf"), float("nan")


def on_device(*values):
    return torch.tensor(values, dtype=torch.float32, device=DEVICE)


def maker(dtype, exact=False):
    """Random tensors; exact: multiples of 1/8, whose products sum without rounding."""
    generator = torch.Generator().manual_seed(0)

    def make(*shape, gap=0):
        shape = (*shape[:-1], shape[-1] + gap)
        if exact:
            made = torch.randint(-8, 9, shape, generator=generator) / 8
        else:
            made = torch.randn(shape, generator=generator) * 0.3
        return made.to(DEVICE, dtype)[..., : shape[-1] - gap]

    return make


def assert_close(found, expected, dtype):
    assert found.dtype == dtype
    atol = CLOSE[dtype] * float(expected.abs().max()) + 1e-30
    torch.testing.assert_close(found.double(), expected.double(), rtol=0, atol=atol)


@pytest.mark.parametrize("dtype", CLOSE)
def test_linears_are_those_of_float64(dtype):
    make = maker(dtype)
    matrices = [(make(37, n, gap=n % 4), make(n) if n != 61 else None) for n in (5, 61, 300)]
    x, norms, threshold = make(1, 1, 37), make(37).abs().float() + 0.5, on_device(0.15)
    for factors in (None, norms):
        kept = torch.full((1,), 5, device=DEVICE)
        found = GPURowsLinear(matrices)(x, threshold, factors, kept)
        above = x.flatten().abs().float() * (1 if factors is None else factors) > threshold
        assert kept.item() == 5 + int(above.sum()) and 0 < above.sum() < 37
        for y, (weight, bias) in zip(found, matrices, strict=True):
            expected = (x.flatten().double() * above) @ weight.double() + (0 if bias is None else bias.double())
            assert_close(y, expected, dtype)


@pytest.mark.parametrize(("act", "gated"), [*((act, True) for act in ACTIVATIONS), ("gelu", False)])
@pytest.mark.parametrize("dtype", CLOSE)
def test_ffns_are_those_of_the_reference(dtype, act, gated):
    make = maker(dtype)
    weights = FFNWeights.alone(
        (make(37, 61, gap=3), make(61)) if gated else None,
        (make(37, 61, gap=3), make(61)),
        (make(61, 37, gap=2), make(37)),
        act,
        make(61).abs().float() + 0.5,
    )
    x, threshold_x = make(1, 37), on_device(0.1)
    h = reference.magnitudes(hidden(weights, x[0], threshold_x), weights.norms[0]).sort().values
    gap = int(h[20:40].diff().argmax()) + 20  # rounding moves none across
    threshold_h = (h[gap : gap + 1] + h[gap + 1 : gap + 2]) / 2
    kept = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    found = GPURowsFFN(weights)(x, threshold_x, threshold_h, kept)
    expected, counts = reference.ffn(weights, x[0], threshold_x, threshold_h)
    assert kept.tolist() == counts.tolist() and counts.tolist()[1] == 60 - gap
    assert found.shape == x.shape
    assert_close(found[0], expected, dtype)


def hidden(weights, x, threshold_x):
    """The input of down, read off an FFN whose down is the identity."""
    size = weights.down[0].shape[1]
    one = torch.eye(size, dtype=x.dtype, device=DEVICE)
    plain = FFNWeights(weights.gate, weights.up, (one[None], None), weights.activation)
    return reference.ffn(plain, x, threshold_x, on_device(-1))[0]


@pytest.mark.parametrize("dtype", CLOSE)
def test_roundings_and_ties_are_those_of_the_reference(dtype):
    """Sums are exact, so bits are equal; the thresholds are magnitudes that occur: those are left out."""
    if dtype is torch.bfloat16 and DEVICE.type == "cpu":
        pytest.skip("the interpreter truncates to bfloat16, a GPU rounds")
    make = maker(dtype, exact=True)
    weights = FFNWeights.alone((make(40, 56), make(56)), (make(40, 56), make(56)), (make(56, 40), make(40)), "relu")
    x, threshold_x = make(40), on_device(0.5)
    threshold_h = hidden(weights, x, threshold_x).abs().float().sort().values[40:41]
    kept = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    found = GPURowsFFN(weights)(x, threshold_x, threshold_h, kept)
    expected, counts = reference.ffn(weights, x, threshold_x, threshold_h)
    assert found.tolist() == expected.tolist() and kept.tolist() == counts.tolist()
    assert counts[1] < 16 and threshold_h > 0


@pytest.mark.parametrize("dtype", CLOSE)
def test_nan_and_infinity(dtype):
    make = maker(dtype)
    weight, x = make(40, 20), make(40)
    step = GPURowsLinear([(weight, None)])
    x[2] = NAN
    kept = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    assert step(x, on_device(INF), None, kept)[0].isnan().all() and kept.item() == 1
    x[2] = INF
    assert (step(x, on_device(INF))[0] == 0).all()
    expected = reference.rows([(weight, None)], x[None], on_device(0.1))[0][0]
    assert step(x, on_device(0.1))[0].isinf().all() and (expected == step(x, on_device(0.1))[0]).all()
    x[2] = 1e-3
    weight[2] = NAN  # of an entry that is left out
    assert not step(x, on_device(0.1))[0].isnan().any()
    kept.zero_()
    step(x, on_device(NAN), None, kept)  # no threshold: all
    assert kept.item() == 40


def test_thresholds_are_read_at_every_call():
    make = maker(torch.float32)
    weight, x, threshold = make(40, 20), make(40), on_device(0.1)
    step = GPURowsLinear([(weight, None)])
    before = step(x, threshold)[0].clone()
    threshold.fill_(INF)
    assert before.any() and not step(x, threshold)[0].any()


def test_other_storages_are_refused():
    make = maker(torch.float32)
    assert "not stored input-major" in why_not([(make(6, 8).t(), None)])
    assert "dtypes" in why_not([(make(8, 6), make(6).double())])
    with pytest.raises(RuntimeError, match="other strides"):
        GPURowsFFN(FFNWeights((make(2, 6, 8), None), (make(2, 6, 8, gap=1), None), (make(2, 8, 6), None)))


@pytest.mark.parametrize("router", ["narrow", "wide"])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_experts_are_those_of_the_reference(dtype, gated, router):
    make = maker(dtype)
    fused, bias = make(4, 37, 122), make(4, 122)  # as experts are stored: the parts of one tensor
    halves = [(fused[..., part], bias[..., part]) for part in (slice(61), slice(61, None))]
    down, norms = (make(4, 61, 37), make(4, 37)), make(4, 61).abs().float() + 0.5
    weights = FFNWeights(halves[0] if gated else None, halves[1], down, "silu", norms)
    x, ids = make(1, 37), torch.tensor([3, 0, 9], device=DEVICE)  # 9: on another device
    factors = make(3).abs() if router == "narrow" else make(3).abs().to(torch.promote_types(dtype, torch.float32))
    exact = dtype is not torch.float16  # rounding moves some across there
    threshold_x, threshold_h = on_device(0.1), on_device(*([0.02, 0.3, 9, 0.04] if exact else [-1] * 4))
    kept = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    step = GPURowsFFN(weights)
    found = step.experts(x, ids, factors, threshold_x, threshold_h, kept)
    expected, counts = reference.experts(weights, x[0], ids, factors, threshold_x, threshold_h)
    assert kept.tolist() == counts.tolist() and (not exact or 0 < counts[1] < 122)
    assert found.shape == x.shape
    assert_close(found[0], expected, dtype)
    again = step.experts(x, ids[:1], factors[:1], threshold_x, threshold_h)  # another number of them
    assert_close(again[0], reference.experts(weights, x[0], ids[:1], factors[:1], threshold_x, threshold_h)[0], dtype)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_a_step_can_be_captured():
    make = maker(torch.bfloat16)
    weights = FFNWeights.alone((make(512, 1024), None), (make(512, 1024), None), (make(1024, 512), None), "silu")
    x, threshold_x, threshold_h = make(512), on_device(0.1), on_device(0.05)
    step = GPURowsFFN(weights)
    step(x, threshold_x, threshold_h)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step(x, threshold_x, threshold_h)
    x.copy_(make(512))
    threshold_x.fill_(0.2)
    graph.replay()
    assert_close(out, reference.ffn(weights, x, threshold_x, threshold_h)[0], torch.bfloat16)


def int8(make, rows, outputs):
    """Entries, and a scale for each output."""
    return (make(rows, outputs) * 300).float().clamp(-127, 127).round().to(torch.int8), make(outputs).abs().float() / 50


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gated", [True, False])
def test_int8_weights_are_those_of_the_reference(dtype, gated):
    make = maker(dtype)
    exact = dtype is torch.float32  # rounding between moves some across in the other
    x, threshold_x, threshold_h = make(37), on_device(0.1), on_device(0.05 if exact else -1.0)
    made = [int8(make, 37, 61), int8(make, 37, 61), int8(make, 61, 37)][0 if gated else 1 :]
    views = [(matrix, make(len(scale))) for matrix, scale in made]
    gate = views[0] if gated else None
    weights = FFNWeights.alone(gate, views[-2], views[-1], "silu", None, [scale for _, scale in made])
    kept = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    found = GPURowsFFN(weights, dtype)(x, threshold_x, threshold_h, kept)
    expected, counts = reference.ffn(weights, x, threshold_x, threshold_h)
    assert_close(found, expected, dtype)
    assert kept.tolist() == counts.tolist() and (not exact or 0 < counts[1] < 61)
    matrices, scales = views[:-1], [scale for _, scale in made[:-1]]
    told, _ = reference.rows(matrices, x[None], threshold_x, None, scales)
    for y, other in zip(GPURowsLinear(matrices, dtype, scales)(x, threshold_x), told, strict=True):
        assert_close(y, other, dtype)
