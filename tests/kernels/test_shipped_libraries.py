"""Shipped libraries: which one is taken, that it computes what a compiled one does, and what happens where none fits."""

import ctypes
import platform
from dataclasses import replace

import pytest
import torch

from helpers.modes import generate
from helpers.observe import prompt
from pop_mm import kernels, native, prune
from pop_mm.kernels import Matvec, Rows
from pop_mm.native import compiler, shipped
from pop_mm.ops import library
from pop_mm.ops.library import Library

VARIANTS = shipped.VARIANTS.get(platform.machine(), ())
pytestmark = [
    pytest.mark.skipif(not VARIANTS, reason="no libraries are shipped for this kind of processor"),
    pytest.mark.skipif(not compiler.command(), reason="there is no C compiler"),
]


def ship(sources, variant):
    """Put the library of some sources where a wheel has it."""
    return shipped.build(sources, variant, shipped.FOLDER)


@pytest.fixture
def folder(monkeypatch, tmp_path):
    """An empty folder of shipped libraries, and an empty cache."""
    monkeypatch.setattr(shipped, "FOLDER", tmp_path / "libraries")
    monkeypatch.setenv("POP_MM_CACHE", str(tmp_path / "cache"))
    shipped.FOLDER.mkdir()
    return shipped.FOLDER


@pytest.fixture
def small(tmp_path):
    """Sources of one small function."""
    file = tmp_path / "answer.c"
    file.write_text("int answer(void) { return ANSWER; }\n")
    return native.Sources("small", (file,), (), ("-DANSWER=1",))


def test_the_best_variant_that_the_processor_runs_is_loaded(folder, small, monkeypatch):
    for number, variant in enumerate(VARIANTS, 1):
        target = shipped.path(small, variant)
        target.parent.mkdir(parents=True)
        assert compiler.build(small.files, target, (f"-DANSWER={number}",), ()) is None
    monkeypatch.setattr(compiler, "command", list)
    for number, variant in enumerate(VARIANTS, 1):
        monkeypatch.setattr(shipped, "processor_flags", lambda flags=variant.needs: flags)
        assert native.load(small).answer() == number
    monkeypatch.setattr(shipped, "processor_flags", frozenset)
    assert native.load(small).answer() == len(VARIANTS)


def test_a_library_of_other_sources_is_not_taken(folder, small):
    ship(small, VARIANTS[-1])
    assert native.load(small).answer() == 1
    small.files[0].write_text("int answer(void) { return 7; }\n")
    assert native.load(small).answer() == 7
    assert native.load(replace(small, options=("-DANSWER=2",))).answer() == 7


def test_a_damaged_library_is_no_error(folder, small, monkeypatch):
    ship(small, VARIANTS[-1]).write_bytes(b"not a library")
    assert native.load(small).answer() == 1
    monkeypatch.setattr(compiler, "command", list)
    assert "the shipped library cannot be loaded" in native.load(small)
    assert native.load(small).endswith("a compiler: none was found")


def test_the_flags_are_those_of_this_machine():
    flags = shipped.processor_flags()
    assert bool(flags) == (platform.machine() == "x86_64")
    assert "AVX512" not in torch.backends.cpu.get_cpu_capability() or "avx512f" in flags


def best():
    return next(variant for variant in VARIANTS if variant.needs <= shipped.processor_flags())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_are_those_of_a_compiled_library(folder, dtype):
    x, weight = torch.randn(1, 331).to(dtype), torch.randn(97, 331).to(dtype)
    shipped = ctypes.CDLL(str(ship(kernels.sources(dtype), best())))
    found, expected = (Matvec({dtype: made})([Rows([weight])], x) for made in (shipped, compiled(dtype)))
    assert torch.equal(found, expected)


def compiled(dtype):
    made = compiler.load(kernels.sources(dtype))
    assert not isinstance(made, str), made
    return made


@pytest.mark.parametrize("dtype", library.OPTIONS, ids=str)
def test_ffns_by_rows_are_those_of_a_compiled_library(folder, dtype, monkeypatch):
    from pop_mm.ops.reference import FFNWeights
    from pop_mm.ops.rows import RowsFFN

    make = torch.Generator().manual_seed(3)
    gate, up, down = ((torch.randn(1, *s, generator=make).to(dtype), None) for s in [(67, 130), (67, 130), (130, 67)])
    weights = FFNWeights(gate, up, down, "silu", None)
    x = torch.randn(67, generator=make).to(dtype)
    sources = library.sources(dtype)
    found = []
    for made in (ctypes.CDLL(str(ship(sources, best()))), compiler.load(sources)):
        monkeypatch.setattr("pop_mm.ops.rows.library", lambda *_, made=made: Library(made, dtype))
        found.append(RowsFFN(weights)(x, torch.tensor([0.4]), torch.tensor([0.1])))
    assert torch.equal(*found)


# every variant -------------------------------------------------------------------------------------------------------

RUNNABLE = [variant for variant in VARIANTS if variant.needs <= shipped.processor_flags()]
METHODS = {"rows": {"budget": 0.6}, "inplace": {"ratio": 0.4, "scope": "ffn"}}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The libraries for float32 models in every variant that this processor runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shipped, "FOLDER", tmp_path_factory.mktemp("libraries"))
        for variant in RUNNABLE:
            for sources in (*map(kernels.sources, kernels.DTYPES), library.sources(torch.float32)):
                ship(sources, variant)
        yield shipped.FOLDER


@pytest.fixture(params=RUNNABLE, ids=lambda variant: variant.name)
def variant(request, built, monkeypatch):
    """The processor has no more than this variant needs, and there is no compiler."""
    monkeypatch.setattr(shipped, "FOLDER", built)
    monkeypatch.setattr(shipped, "processor_flags", lambda: request.param.needs)
    monkeypatch.setattr(compiler, "command", list)
    for cached in (kernels._library, library._library):
        cached.cache_clear()
    yield request.param
    for cached in (kernels._library, library._library):
        cached.cache_clear()


@pytest.mark.parametrize("backend", METHODS)
def test_a_session_decodes_right_on_every_variant(variant, load, backend):
    model = load("llama", torch.float32)
    assert f"/{variant.name}/" in native.load(library.sources(torch.float32))._name
    with prune(model, backend="masked", **METHODS[backend]):
        expected = generate(model, prompt(), 6)
    with prune(model, **METHODS[backend]) as session:
        found = generate(model, prompt(), 6)
        assert set(session.report.backends) == {backend}
        assert session.report.to_dict()["kernels"] == "compiled"
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1], rtol=0, atol=1e-4)
