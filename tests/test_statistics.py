"""Sums of squared activations: exact, in one pass, and blind to what does not count."""

from contextlib import nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.covering import covers
from helpers.modes import threads_of_torch, without_library
from pop_mm import kernels
from pop_mm.methods import scoring
from pop_mm.methods.scoring import channel_energy


def activations(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def expected(h, counted=None):
    h = h.double() if counted is None else h.double() * counted.unsqueeze(-1)
    return h.square().sum(-2)


@covers(
    dtype=[torch.float16, torch.bfloat16, torch.float32, torch.float64],
    shape=[(1, 7), (70, 33), (3, 70, 33)],
    block=[1, 500, 1 << 20],
    compiled=[True, False],
)
def test_energy_is_that_of_float64(dtype, shape, block, compiled, monkeypatch):
    monkeypatch.setattr(scoring, "_BLOCK", block)
    h = activations(*shape, dtype=dtype)
    with nullcontext() if compiled else without_library():
        check_energy(h, dtype)


def check_energy(h, dtype):
    found = channel_energy(h)
    assert found.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(found.double(), expected(h), rtol=1e-5, atol=0)
    counted = torch.arange(h.shape[:-1].numel()).view(h.shape[:-1]) % 3 > 0
    torch.testing.assert_close(channel_energy(h, counted).double(), expected(h, counted), rtol=1e-5, atol=0)


@settings(max_examples=60, deadline=None)
@given(
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    tokens=st.integers(1, 30),
    channels=st.sampled_from([1, 7, 63, 64, 200, 5000]),
    gap=st.integers(0, 5),
    masked=st.booleans(),
    threads=st.integers(1, 4),
)
def test_the_compiled_sum_is_that_of_float64(dtype, tokens, channels, gap, masked, threads):
    h = activations(tokens, channels + gap, dtype=dtype)[:, :channels]
    counted = torch.arange(tokens) % 3 > 0 if masked else None
    compiled = kernels.load("compiled").energy
    assert compiled.takes(h)
    with threads_of_torch(threads):
        found = channel_energy(h, counted)
    torch.testing.assert_close(found.double(), expected(h, counted), rtol=1e-5, atol=0)
    assert torch.equal(found, channel_energy(h, counted))


def test_what_the_compiled_sum_does_not_take():
    compiled = kernels.load("compiled").energy
    for h in (activations(2, 3, 4), activations(3, 4).t(), activations(3, 4).double(), activations(3, 4).half()):
        assert not compiled.takes(h)
        torch.testing.assert_close(channel_energy(h).double(), expected(h), check_dtype=False, rtol=1e-5, atol=0)


@pytest.mark.parametrize("library", [without_library(), nullcontext()], ids=["torch", "compiled"])
def test_what_does_not_count_may_be_anything(library):
    with library:
        check_that_it_does_not_count()


def check_that_it_does_not_count():
    h, counted = activations(9, 5), torch.ones(9, dtype=torch.bool)
    counted[:3] = False
    before = channel_energy(h, counted)
    h[:3] = float("nan")
    assert torch.equal(channel_energy(h, counted), before)
    h[5, 3] = float("inf")
    assert channel_energy(h, counted).isfinite().tolist() == [True, True, True, False, True]


def test_activations_are_not_changed():
    h = activations(9, 5)
    before = h.clone()
    channel_energy(h, torch.arange(9) > 2)
    assert torch.equal(h, before)
