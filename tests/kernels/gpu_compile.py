"""Compile the Triton kernels for an H100, which need not be here; test_gpu_kernels.py runs it in a process of its own."""

import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pop_mm.kernels import gpu, triton_ffn

FLOATS = ("x", "gate", "up", "gate_bias", "up_bias", "down", "h", "out", "bias")
SUMS = ("scores", "weight", "partial")
INTEGERS = ("channels", "dropped")


def compile_kernel(kernel, constants):
    """For bfloat16 weights and float32 sums; what is no constant and has none of the names above is a number."""
    types = dict.fromkeys(FLOATS, "*bf16") | dict.fromkeys(SUMS, "*fp32") | dict.fromkeys(INTEGERS, "*i64")
    types["valid"] = "*u8"
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
    where = {(i,): constants[name] for i, name in enumerate(kernel.arg_names) if name in constants}
    source = ASTSource(kernel, signature, where)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32))


def main():
    tl = triton_ffn.tl
    wide = {"ACCUMULATE": tl.float32}
    for name, blocks, own in (
        ("vector", gpu._VECTOR, {"valid": None, "gate": None, "gate_bias": None}),
        ("matrix", gpu._MATRIX, {"channels": None}),
    ):
        constants = {**wide, **own, **blocks, "OPERANDS": tl.bfloat16, "ACTIVATION": "gelu", "hidden_stride": 1}
        made = compile_kernel(triton_ffn.hidden_kernel, constants)
        assert ("mma" in made.asm["ptx"]) == (name == "matrix")
    compile_kernel(triton_ffn.select_kernel, {"ROWS": 3, **gpu._SELECT})
    compile_kernel(triton_ffn.down_kernel, {**wide, "hidden_stride": 1, **gpu._DOWN})
    compile_kernel(triton_ffn.sum_kernel, {"BLOCK": gpu._DOWN["BLOCK_HIDDEN"]})


if __name__ == "__main__":
    sys.exit(main())
