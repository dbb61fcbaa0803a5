"""The Triton kernels of chosen rows: right against the reference; compiled for GPUs even where there is none. The benchmark."""

import json

import pytest
import torch
from test_gpu_kernels import HERE, ROOT, needs_triton, no_gpu, run


@needs_triton
@pytest.mark.parametrize("cases", ["rows_gpu_cases.py", "rows_gpu_model_cases.py"])
def test_kernels_are_right(cases):
    """On the GPU if there is one, else interpreted; in a process of its own."""
    own = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    options = ("-p", "no:xdist", "-p", "no:cacheprovider", "--noconftest")
    code, output = run("-m", "pytest", *options, HERE / cases, **own)
    assert code == 0 and " passed" in output, output


@needs_triton
@no_gpu
def test_kernels_compile_for_gpus(tmp_path):
    code, output = run(HERE / "rows_gpu_compile.py", TRITON_CACHE_DIR=str(tmp_path), TRITON_INTERPRET="0")
    assert code == 0, output


@needs_triton
@no_gpu
def test_benchmark_for_gpus_checks_what_it_times():
    code, output = run(ROOT / "benchmarks" / "gpu_rows.py", "--interpret")
    assert code == 0 and "agree" in output, output
    code, output = run(ROOT / "benchmarks" / "gpu_rows.py")
    assert code == 2 and "needs a CUDA device" in output, output


def test_benchmark_runs(tmp_path):
    code, output = run(ROOT / "benchmarks" / "rows_kernels.py", "--quick", "--json", tmp_path / "out.json")
    assert code == 0, output
    assert output.count("not judged") == 3
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert {row["variant"] for row in rows} == {"dense", "rows, all", "rows 0.8/0.6", "rows 0.7/0.5", "rows 0.6/0.4"}
