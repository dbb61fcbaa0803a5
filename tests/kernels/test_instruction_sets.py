"""Products by chosen rows as machines without AVX-512, and without AVX, compile them: as this machine's own."""

import platform

import pytest
import test_int8_kernels
import test_int8_narrow
import test_rows
import torch

from pop_mm.ops import library

X86 = platform.machine() in ("x86_64", "AMD64")
pytestmark = pytest.mark.skipif(not X86, reason="options of x86 compilers")
options = pytest.mark.parametrize("options", [("-mno-avx512f",), ("-march=x86-64",)], ids=" ".join)


def compiled(monkeypatch, caller, dtype, options, weights=None):
    """From now on ``caller`` computes by a library that these options make."""
    other = library.make(dtype, options, weights)
    assert not isinstance(other, str), other
    monkeypatch.setattr(f"pop_mm.ops.{caller}.library", lambda *_: other)


@options
@pytest.mark.parametrize("dtype", test_rows.DTYPES)
def test_other_instruction_sets_choose_alike(monkeypatch, dtype, options):
    make = test_rows.Maker(dtype)
    weights = make.ffn(37, 61, bias=True)
    x = make(37)
    x[3], x[5] = 0.0, -x[5]
    bounds = test_rows.thresholds(weights, x)
    expected, kept = test_rows.run_ffn(weights, x, *bounds)
    compiled(monkeypatch, "rows", dtype, options)
    found, other_kept = test_rows.run_ffn(weights, x, *bounds)
    assert other_kept == kept
    test_rows.assert_close(found, expected, dtype)


@options
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_number_of_two_bytes_is_read_and_rounded_right(monkeypatch, dtype, options):
    compiled(monkeypatch, "rows", dtype, options)
    test_rows.test_every_number_of_two_bytes_is_read_and_rounded_right(dtype)


@options
@pytest.mark.parametrize("dtype", library.INT8)
def test_every_int8_is_read_right(monkeypatch, dtype, options):
    compiled(monkeypatch, "rows", dtype, options, torch.int8)
    test_int8_kernels.test_every_number_is_read_right(dtype)


@options
def test_every_int8_of_narrow_matrices_is_read_right(monkeypatch, options):
    compiled(monkeypatch, "dot", torch.float32, options, torch.int8)
    test_int8_narrow.test_every_number_is_read_right()
