"""Sums of squared activations: exact, in one pass, and blind to what does not count."""

import pytest
import torch

from pop_mm import scoring
from pop_mm.scoring import channel_energy


def activations(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def expected(h, counted=None):
    h = h.double() if counted is None else h.double() * counted.unsqueeze(-1)
    return h.square().sum(-2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(1, 7), (70, 33), (3, 70, 33)])
@pytest.mark.parametrize("block", [1, 500, 1 << 20])
def test_energy_is_that_of_float64(dtype, shape, block, monkeypatch):
    monkeypatch.setattr(scoring, "_BLOCK", block)
    h = activations(*shape, dtype=dtype)
    found = channel_energy(h)
    assert found.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(found.double(), expected(h), rtol=1e-5, atol=0)
    counted = torch.arange(h.shape[:-1].numel()).view(h.shape[:-1]) % 3 > 0
    torch.testing.assert_close(channel_energy(h, counted).double(), expected(h, counted), rtol=1e-5, atol=0)


def test_what_does_not_count_may_be_anything():
    h, counted = activations(2, 9, 5), torch.ones(2, 9, dtype=torch.bool)
    counted[0, :3] = False
    before = channel_energy(h, counted)
    h[0, :3] = float("nan")
    assert torch.equal(channel_energy(h, counted), before)
    h[1, 2, 3] = float("inf")
    assert channel_energy(h, counted).isfinite().tolist() == [[True] * 5, [True, True, True, False, True]]


def test_activations_are_not_changed():
    h = activations(9, 5)
    before = h.clone()
    channel_energy(h, torch.arange(9) > 2)
    assert torch.equal(h, before)
