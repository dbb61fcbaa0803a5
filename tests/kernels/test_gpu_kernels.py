"""The Triton kernels: right against torch, and in whole models; compiled for GPUs even where there is none."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers.activations import ACT2FN

from helpers.modes import pruned
from helpers.tiny_models import tiny
from pop_mm import ConfigError, PopConfig
from pop_mm.kernels import gpu
from pop_mm.session.session import plan_ffns

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed (pip install triton)")
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")


def run(*command, **environment):
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        capture_output=True,
        text=True,
        timeout=600,
        cwd=ROOT,
        env={**os.environ, "PYTEST_ADDOPTS": "", "PYTHONPATH": os.pathsep.join(sys.path), **environment},
    )
    return done.returncode, done.stdout + done.stderr


@needs_triton
@pytest.mark.parametrize("cases", ["gpu_kernel", "gpu_model", "rows_gpu", "rows_gpu_model"])
def test_kernels_are_right(cases):
    """On the GPU if there is one, else interpreted; in a process of its own."""
    own = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    options = ("-p", "no:xdist", "-p", "no:cacheprovider", "--noconftest")  # whose imports take their time
    code, output = run("-m", "pytest", *options, HERE / f"{cases}_cases.py", **own)
    assert code == 0 and " passed" in output, output


@needs_triton
@no_gpu
@pytest.mark.parametrize("kernels", ["gpu", "rows_gpu"])
def test_kernels_compile_for_gpus(kernels, tmp_path):
    code, output = run(HERE / f"{kernels}_compile.py", TRITON_CACHE_DIR=str(tmp_path), TRITON_INTERPRET="0")
    assert code == 0, output


@needs_triton
def test_benchmark_runs():
    code, output = run(ROOT / "benchmarks" / "gpu_kernels.py", "--interpret")
    assert code == 0 and "The variants agree" in output, output


@no_gpu
def test_benchmark_says_that_it_needs_a_gpu(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.setattr(sys, "argv", ["gpu_kernels.py"])
    import gpu_kernels

    assert gpu_kernels.main() == 2
    assert "needs a CUDA device" in capsys.readouterr().out


@no_gpu
def test_without_a_gpu_it_is_an_error(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    model = tiny("llama")
    for batch in ("shared", "per_sequence"):
        with pytest.raises(ConfigError, match=r"runs on CUDA devices, but FFNs to prune are on cpu. Move the model"):
            pruned(model, "auto", kernels="triton", batch=batch)


def test_without_triton_it_is_an_error(monkeypatch):
    monkeypatch.setattr(gpu, "find_spec", lambda _: None)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ConfigError, match=r"CUDA builds of torch for Linux bring it; otherwise: pip install triton"):
        pruned(tiny("llama"), "auto", kernels="triton")


@pytest.mark.parametrize(("batch", "backend"), [("shared", "inplace"), ("per_sequence", "gathered")])
def test_a_plan_works_without_weights(batch, backend):
    with torch.device("meta"):
        model = tiny("llama")
    plans = plan_ffns(model, PopConfig(0.4, kernels="triton", batch=batch))
    assert [plan.backend for plan in plans] == [backend] * 2


def test_other_kernels_leave_batches_of_sequences_masked():
    for kernels in ("auto", "stock"):
        plans = plan_ffns(tiny("llama"), PopConfig(0.4, kernels=kernels, batch="per_sequence"))
        assert {plan.backend for plan in plans} == {"masked"}


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("silu", "silu"),
        ("gelu", "gelu"),
        ("gelu_new", "gelu_tanh"),
        ("gelu_fast", "gelu_tanh"),
        ("gelu_pytorch_tanh", "gelu_tanh"),
        ("relu", "relu"),
        ("relu2", "relu2"),
        ("relu6", None),
        ("gelu_10", None),
        ("quick_gelu", None),
        ("xielu", None),
        ("leaky_relu", None),
    ],
)
def test_activations_are_known_by_what_they_do(name, found):
    assert gpu.activation_name(ACT2FN[name]) == found


def test_what_is_no_activation():
    assert gpu.activation_name(None) is None
    assert gpu.activation_name(nn.Linear(3, 3)) is None
    assert gpu.activation_name(nn.Flatten(0)) is None
