"""What test_gpu_kernels.py runs in a process of its own, since Triton decides once whether it interprets: the kernels.

On a GPU if there is one; else with TRITON_INTERPRET=1 on the CPU, where a step of a tiny FFN takes a third of a second.
"""

import pytest
import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.pytorch_utils import Conv1D

from pop_mm.kernels.gpu import FusedStep, GatheredStep, fits
from pop_mm.ops.select import lowest
from pop_mm.partition import Sizes, partition_sizes
from pop_mm.weights.layout import FFN, Projection

torch.set_num_threads(1)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SIZES = Sizes(channels=61, retained=19, candidates=23, candidates_kept=9)
EXACT = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}  # shares of the largest


def make(dtype, hidden=37, size=61, act="silu", layout="separate", bias=False, seed=0):
    """An FFN record with random weights: its own modules, fused gate and up, transposed (ungated), or up alone."""
    generator = torch.Generator().manual_seed(seed)
    inputs = {"separate": 2, "fused": 1, "transposed": 1, "ungated": 1}[layout]
    outputs = 2 * size if layout == "fused" else size
    if layout == "transposed":
        modules = [Conv1D(outputs, hidden), Conv1D(hidden, size)]
    else:
        modules = [nn.Linear(hidden, outputs, bias) for _ in range(inputs)] + [nn.Linear(size, hidden, bias)]
    for module in modules:
        for parameter in module.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) * (0.3 if parameter.dim() > 1 else 1)
        module.requires_grad_(False).to(DEVICE, dtype)
    transposed = layout == "transposed"
    *front, down = (
        Projection(str(i), m, "in" if m is modules[-1] else "out", 2 if layout == "fused" and i == 0 else 1, transposed)
        for i, m in enumerate(modules)
    )
    return FFN("ffn", 0, tuple(front), down, size, activation=ACT2FN[act])


def hidden_of(ffn, x, channels):
    """What enters the down projection, ``[B, n]``, in float64, rounded as it is stored; ``channels`` is ``[B, n]``."""
    views = [(w.double(), 0 if b is None else b.double()) for p in ffn.inputs for w, b in p.narrow_views(ffn.size)]
    parts = [x.double() @ w + b for w, b in views]
    h = ffn.activation(parts[0]) * (parts[1] if len(parts) == 2 else 1)
    return h.gather(1, channels).to(x.dtype).double()


def check(ffn, x, channels, sizes, dropped, scores, found):
    """The choice is one of the lowest scores, and the result is what it leads to.

    ``channels`` and ``scores`` are by row; ``dropped`` may be one choice for all rows.
    """
    close = EXACT[x.dtype]
    dropped = dropped.expand(len(x), -1)
    out = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, dropped, True)
    assert (out.sum(-1) == sizes.candidates_dropped).all()
    if x.dtype == torch.float64:
        assert dropped.sort().values.tolist() == lowest(scores, sizes.candidates_dropped).sort().values.tolist()
    worst, best = scores.masked_fill(~out, -1).amax(-1), scores.masked_fill(out, torch.inf).amin(-1)
    assert (worst <= best * (1 + close)).all()
    h = hidden_of(ffn, x, channels)
    h[:, sizes.retained :][out] = 0
    full = torch.zeros(len(x), ffn.size, dtype=torch.float64, device=DEVICE).scatter_(1, channels, h)
    weight, bias = ffn.down.narrow_views(ffn.size)[0]
    expected = full @ weight.double() + (0 if bias is None else bias.double())
    assert found.dtype == x.dtype and found.shape == x.shape
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=close * float(expected.abs().max()))


def random_inputs(dtype, rows, hidden, sizes, groups):
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, hidden, generator=generator).to(DEVICE, dtype)
    wide = torch.promote_types(dtype, torch.float32)
    weight = torch.rand(groups, sizes.candidates, generator=generator).to(DEVICE, wide)
    return x, weight


def run_fused(ffn, sizes, x, weight, valid=None):
    """Check a shared step; what it dropped and gave."""
    step = FusedStep(ffn, sizes)
    step.load(weight[0])
    with torch.no_grad():
        assert step.takes(x)
        found = step(x, valid)
    return step.dropped, found


def run_gathered(ffn, sizes, x, weight, channels):
    step = GatheredStep(ffn, sizes)
    step.load(channels, weight)
    with torch.no_grad():
        assert step.takes(x)
        found = step(x)
    return step.dropped(len(x)), found


def own_channels(rows, sizes, seed=0):
    """Each row's R and C, ``[B, K]``, each ascending."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(rows, sizes.channels, generator=generator).argsort(-1)
    r, c, _ = order.split([sizes.retained, sizes.candidates, sizes.pruned], -1)
    return torch.cat([r.sort(-1).values, c.sort(-1).values], -1).to(DEVICE)


def shared_scores(ffn, x, sizes, weight, valid=None):
    channels = torch.arange(sizes.width, device=DEVICE).expand(len(x), -1)
    h = hidden_of(ffn, x, channels)[:, sizes.retained :]
    if valid is not None and len(x) > 1:
        h = h * valid.unsqueeze(1)
    return channels, torch.linalg.vector_norm(h, dim=0).expand(len(x), -1) * weight.double()


CASES = [  # dtype, rows, activation, layout, bias
    (torch.float64, 1, "silu", "separate", False),
    (torch.float64, 3, "gelu", "fused", True),
    (torch.float64, 8, "gelu_pytorch_tanh", "ungated", True),
    (torch.float32, 1, "gelu_new", "transposed", True),
    (torch.float32, 2, "relu2", "separate", True),
    (torch.float32, 5, "silu", "transposed", True),
    (torch.bfloat16, 1, "silu", "fused", False),
    (torch.bfloat16, 4, "silu", "separate", False),
    (torch.bfloat16, 7, "relu", "ungated", False),
    (torch.float16, 6, "gelu", "separate", True),
]


@pytest.mark.parametrize(("dtype", "rows", "act", "layout", "bias"), CASES)
def test_fused_step(dtype, rows, act, layout, bias):
    ffn = make(dtype, act=act, layout=layout, bias=bias)
    assert fits(ffn)
    x, weight = random_inputs(dtype, rows, 37, SIZES, 1)
    valid = None if rows < 3 else torch.arange(rows, device=DEVICE) != 1
    dropped, found = run_fused(ffn, SIZES, x, weight, valid)
    channels, scores = shared_scores(ffn, x, SIZES, weight, valid)
    check(ffn, x, channels, SIZES, dropped, scores, found)


@pytest.mark.parametrize(("dtype", "rows", "act", "layout", "bias"), [CASES[i] for i in (1, 2, 3, 4, 6, 7)])
def test_gathered_step(dtype, rows, act, layout, bias):
    ffn = make(dtype, act=act, layout=layout, bias=bias)
    if layout != "transposed" and rows != 2:  # it is right for both ways to store down
        ffn.down.weight.data = ffn.down.weight.data.t().contiguous().t()
    rows = rows if rows == 8 else min(rows, 2)
    x, weight = random_inputs(dtype, rows, 37, SIZES, rows)
    channels = own_channels(rows, SIZES)
    dropped, found = run_gathered(ffn, SIZES, x, weight, channels)
    scores = hidden_of(ffn, x, channels)[:, SIZES.retained :].abs() * weight.double()
    check(ffn, x, channels, SIZES, dropped, scores, found)


def test_more_than_one_block_of_everything():
    """Hidden sizes and candidates over the block sizes, and no multiples of them."""
    sizes = Sizes(channels=290, retained=3, candidates=270, candidates_kept=150)
    ffn = make(torch.float32, hidden=150, size=290)
    x, weight = random_inputs(torch.float32, 2, 150, sizes, 1)
    dropped, found = run_fused(ffn, sizes, x, weight)
    channels, scores = shared_scores(ffn, x, sizes, weight)
    check(ffn, x, channels, sizes, dropped, scores, found)
    ffn = make(torch.float32, hidden=530, size=290)
    x, weight = random_inputs(torch.float32, 1, 530, sizes, 1)
    channels = own_channels(1, sizes)
    dropped, found = run_gathered(ffn, sizes, x, weight, channels)
    scores = hidden_of(ffn, x, channels)[:, 3:].abs() * weight.double()
    check(ffn, x, channels, sizes, dropped, scores, found)


def test_a_step_gives_the_same_bits_every_time():
    ffn = make(torch.float32)
    x, weight = random_inputs(torch.float32, 2, 37, SIZES, 2)
    fused, gathered = FusedStep(ffn, SIZES), GatheredStep(ffn, SIZES)
    fused.load(weight[0])
    gathered.load(own_channels(2, SIZES), weight)
    for step in (fused, gathered):
        assert torch.equal(step(x), step(x))


@pytest.mark.parametrize("rows", [1, 2])
def test_of_equal_scores_the_earlier_candidate_stays(rows):
    sizes = Sizes(channels=40, retained=4, candidates=30, candidates_kept=13)
    ffn = make(torch.float32, size=40)
    for projection in ffn.inputs:
        projection.weight.data[4:34] = projection.weight.data[4]
    x, _ = random_inputs(torch.float32, rows, 37, sizes, 1)
    weight = torch.ones(rows, 30, device=DEVICE)
    weight[:, 7], weight[:, 25] = 0.5, 2
    lowest = sorted([7, *(set(range(14, 30)) - {25})])  # 16 of the equal ones from the end, and the lower one
    assert len(lowest) == 16
    expected = sorted([*lowest, 13])
    dropped, _ = run_fused(ffn, sizes, x, weight)
    assert dropped.sort().values.tolist() == [expected]
    channels = torch.arange(34, device=DEVICE).expand(rows, -1)
    dropped, _ = run_gathered(ffn, sizes, x, weight, channels)
    assert dropped.sort().values.tolist() == [expected] * rows


@pytest.mark.parametrize(("dtype", "rows"), [(torch.float32, 1), (torch.bfloat16, 2)])
def test_what_is_not_finite_is_left_out_first(dtype, rows):
    ffn = make(dtype)
    x, weight = random_inputs(dtype, rows, 37, SIZES, rows)
    up = ffn.inputs[1].weight.data
    for candidate, value in ((2, float("nan")), (11, float("inf")), (20, float("-inf"))):
        up[SIZES.retained + candidate, 5] = value
    dropped, found = run_fused(ffn, SIZES, x, weight)
    assert {2, 11, 20} <= set(dropped[0].tolist()) and found.isfinite().all()
    channels = torch.arange(SIZES.width, device=DEVICE).expand(rows, -1)
    dropped, found = run_gathered(ffn, SIZES, x, weight, channels)
    assert all({2, 11, 20} <= set(row.tolist()) for row in dropped) and found.isfinite().all()
    up[0, 0] = float("nan")  # a retained one is seen
    assert run_fused(ffn, SIZES, x, weight)[1].isnan().all()
    assert run_gathered(ffn, SIZES, x, weight, channels)[1].isnan().all()


def test_rows_that_do_not_count():
    ffn = make(torch.float64)
    x, weight = random_inputs(torch.float64, 4, 37, SIZES, 1)
    valid = torch.tensor([True, False, True, False], device=DEVICE)
    some = run_fused(ffn, SIZES, x, weight, valid)[0].sort().values
    assert torch.equal(some, run_fused(ffn, SIZES, x[::2].contiguous(), weight)[0].sort().values)
    assert not torch.equal(some, run_fused(ffn, SIZES, x, weight)[0].sort().values)
    strided = torch.cat([x, x], 1)[:, :37]
    valid = torch.stack([valid, ~valid], 1)[:, 0]
    assert torch.equal(run_fused(ffn, SIZES, strided, weight, valid)[0].sort().values, some)


def test_without_candidates():
    sizes = partition_sizes(61, 0.4, 0.1, variant="static")
    ffn = make(torch.float64)
    x, weight = random_inputs(torch.float64, 2, 37, sizes, 2)
    channels = torch.arange(sizes.width, device=DEVICE).expand(2, -1)
    dropped, found = run_fused(ffn, sizes, x, weight)
    weight_down = ffn.down.weight.data.t()
    torch.testing.assert_close(found, hidden_of(ffn, x, channels) @ weight_down[: sizes.width], rtol=0, atol=1e-11)
    dropped, same = run_gathered(ffn, sizes, x, weight, channels)
    torch.testing.assert_close(same, found, rtol=0, atol=1e-11)
    assert dropped.shape == (2, 0)


def test_what_a_step_does_not_take():
    step = FusedStep(make(torch.float32), SIZES)
    x = torch.zeros(1, 37, device=DEVICE)
    with torch.no_grad():
        assert step.takes(x)
        assert not step.takes(x.double())
        assert not step.takes(x.expand(9, -1))
        assert not step.takes(x.to("meta"))
        with torch.autocast(DEVICE.type, torch.bfloat16):
            assert not step.takes(x)
    assert not step.takes(x)
