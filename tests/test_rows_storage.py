"""Weights stored input-major and back, and histograms of magnitudes: the same bits, the same counts."""

import ctypes
import subprocess
import sys

import pytest
import torch
from torch import nn

from helpers.modes import threads_of_torch
from pop_mm.ops.histogram import BINS, bin_edges, histogram
from pop_mm.ops.turn import is_turned, turn, why_not

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SHAPES = [(1, 7), (64, 64), (130, 67), (3, 70, 129), (5, 1, 4)]
INTEGER = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class Own(torch.Tensor):
    """As packages make them."""


def any_bits(dtype, *shape):
    """Every bit pattern may come, NaN of any kind too."""
    made = torch.randint(-(2**62), 2**62, shape, generator=torch.Generator().manual_seed(0))
    return made.to(INTEGER[dtype.itemsize]).view(dtype)


def bits(tensor):
    return tensor.detach().view(INTEGER[tensor.element_size()])


@pytest.fixture(params=[True, False], ids=["compiled", "torch"])
def compiled(request, monkeypatch):
    if not request.param:
        monkeypatch.setattr("pop_mm.ops.turn.library", lambda *_: None)
        monkeypatch.setattr("pop_mm.ops.histogram.library", lambda _: None)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_are_turned_and_back_bit_for_bit(dtype, shape, threads):
    parameter = nn.Parameter(any_bits(dtype, *shape))
    before, strides, same = parameter.detach().clone(), parameter.stride(), id(parameter)
    with threads_of_torch(threads):
        turned = turn(parameter)
        assert is_turned(parameter) and parameter.shape == shape
        assert torch.equal(bits(parameter), bits(before))
        if turned is not None:
            assert parameter.transpose(-1, -2).is_contiguous()
            turned.back()
    assert id(parameter) == same and parameter.stride() == strides and parameter.is_contiguous()
    assert parameter.storage_offset() == 0
    assert parameter.untyped_storage().nbytes() == before.untyped_storage().nbytes()
    assert torch.equal(bits(parameter), bits(before))


def test_input_major_weights_stay():
    parameter = nn.Parameter(torch.randn(5, 6).t())
    address = parameter.data_ptr()
    assert turn(parameter) is None and parameter.data_ptr() == address


def test_views_of_before_keep_their_values():
    parameter = nn.Parameter(torch.randn(70, 40))
    view = parameter.detach()[:10]
    expected = view.clone()
    turned = turn(parameter)
    parameter.data.add_(1)
    assert torch.equal(view, expected)
    turned.back()
    assert torch.equal(view, expected) and torch.equal(parameter[:10], expected + 1)  # what changed meanwhile stays


def test_gradients_move_along():
    module = nn.Linear(40, 70).double()
    x = torch.randn(3, 40, dtype=torch.float64)
    module(x).square().sum().backward()
    expected, grad = module.weight.grad.clone(), module.weight.grad
    turned = turn(module.weight)
    assert is_turned(grad) and torch.equal(grad, expected)
    module(x).square().sum().backward()
    turned.back()
    assert module.weight.grad is grad and grad.is_contiguous()
    torch.testing.assert_close(grad, 2 * expected)


def test_gradients_made_meanwhile_are_stored_as_without():
    module = nn.Linear(40, 70)
    turned = turn(module.weight)
    module(torch.randn(3, 40)).sum().backward()
    turned.back()
    assert module.weight.grad.stride() == module.weight.stride() == (40, 1)


def test_inference_mode_makes_no_inference_tensors():
    module = nn.Linear(40, 70)
    with torch.inference_mode():
        turned = turn(module.weight)
    module(torch.randn(3, 40)).sum().backward()
    with torch.inference_mode():
        turned.back()
    assert not module.weight.is_inference()


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: nn.Parameter(torch.randn(6, 4, 8)[:, 0]), "its strides are"),
        (lambda: nn.Parameter(torch.randn(12, 8)[:6]), "a part of a larger tensor"),
        (lambda: nn.Parameter(torch.randn(8)), "its shape is"),
        (lambda: nn.Parameter(torch.empty(4, 5, device="meta")), "not loaded"),
        (lambda: torch.randn(4, 5).as_subclass(Own), "it is a Own"),
    ],
)
def test_what_cannot_be_turned_is_refused(make, reason):
    parameter = make()
    assert reason in why_not(parameter)
    before = parameter.stride()
    with pytest.raises(ValueError, match="cannot be stored input-major"):
        turn(parameter)
    assert parameter.stride() == before


def test_a_failure_changes_nothing(monkeypatch):
    module = nn.Linear(40, 70)
    module(torch.randn(3, 40)).sum().backward()
    calls = []

    def fail(source, target):
        calls.append(source)
        if len(calls) == 2:
            raise MemoryError

    monkeypatch.setattr("pop_mm.ops.turn.transpose", fail)
    with pytest.raises(MemoryError):
        turn(module.weight)
    assert module.weight.is_contiguous() and module.weight.grad.is_contiguous()


def naive_counts(x, norms, valid):
    """Number by number, by the definition of a float: 8 bits of exponent and 4 of mantissa, as one integer."""
    counts = [0] * BINS
    for row, counted in zip(x.float().tolist(), [True] * len(x) if valid is None else valid.tolist(), strict=True):
        for j, value in enumerate(row if counted else []):
            magnitude = torch.tensor(abs(value)) * (1 if norms is None else norms[j])
            place = int(magnitude.view(torch.int32)) >> 19
            counts[BINS - 1 if magnitude.isnan() else place] += 1
    return counts


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("with_norms", "with_mask"), [(False, False), (True, True)])
def test_histograms_are_those_of_a_loop(dtype, with_norms, with_mask):
    generator = torch.Generator().manual_seed(1)
    x = (torch.randn(5, 41, generator=generator) * torch.logspace(-12, 8, 41)).to(dtype)[:, :37]
    x[0, :6] = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan"), 1e-40])
    norms = torch.rand(37, generator=generator) if with_norms else None
    valid = torch.tensor([True, False, True, True, False]) if with_mask else None
    counts = torch.full((BINS,), 3)
    histogram(x, counts, norms, valid)
    assert (counts - 3).tolist() == naive_counts(x, norms, valid)


@pytest.mark.usefixtures("compiled")
def test_several_sequences_are_counted_each_by_its_tokens():
    x, norms = torch.randn(6, 40, generator=torch.Generator().manual_seed(3)).t(), torch.rand(6) + 0.5
    valid = torch.rand(3, 40, generator=torch.Generator().manual_seed(4)) > torch.tensor([[0.5], [0.2], [2.0]])
    counts = torch.full((3, BINS), 2)
    histogram(x, counts, norms, valid)
    assert (counts - 2).tolist() == [naive_counts(x, norms, own) for own in valid]


@pytest.mark.parametrize("dtype", DTYPES)
def test_histograms_do_not_depend_on_threads(dtype):
    x = torch.randn(300, 700, generator=torch.Generator().manual_seed(2)).to(dtype)
    found = []
    for threads in (1, 2, 5):
        counts = torch.zeros(BINS, dtype=torch.int64)
        with threads_of_torch(threads):
            histogram(x, counts)
            histogram(x[:0], counts)
        found.append(counts.tolist())
    assert found[0] == found[1] == found[2] and sum(found[0]) == x.numel()
    magnitudes, edges = x.float().abs().flatten(), bin_edges()
    above = magnitudes[:, None] >= edges[[100 * 16, 126 * 16, 127 * 16 + 3]]
    counts = torch.tensor(found[0])
    assert above.sum(0).tolist() == [int(counts[b:].sum()) for b in (100 * 16, 126 * 16, 127 * 16 + 3)]


_MEMORY = """
import ctypes, pathlib, torch, pop_mm
from transformers import LlamaConfig, LlamaForCausalLM

def resident():
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))

shape = dict(hidden_size=512, intermediate_size=1536, num_hidden_layers=10, num_attention_heads=8, num_key_value_heads=4)
model = LlamaForCausalLM(LlamaConfig(vocab_size=128, **shape)).eval()
ids = torch.randint(0, 128, (1, 16))
model.generate(ids, max_new_tokens=3, do_sample=False)
ctypes.CDLL(None).malloc_trim(0)
before = resident()
with pop_mm.prune(model, budget=0.5) as session:
    model.generate(ids, max_new_tokens=3, do_sample=False)
    assert session.moving_seconds > 0, session.report
    inside = resident()
print(inside - before, resident() - before, sum(parameter.nbytes for parameter in model.parameters()))
"""


@pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="only glibc keeps what was freed, and can give it back"
)
def test_weights_that_moved_leave_no_memory_behind():
    done = subprocess.run([sys.executable, "-c", _MEMORY], capture_output=True, text=True, check=True)
    inside, left, weights = map(int, done.stdout.split())
    assert inside < 0.15 * weights
    assert left < 0.15 * weights
