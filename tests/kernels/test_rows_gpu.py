"""The benchmarks of chosen rows; test_gpu_kernels.py holds the Triton kernels to the reference."""

import json

from test_gpu_kernels import ROOT, needs_triton, no_gpu, run


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
