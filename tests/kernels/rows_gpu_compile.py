"""Compile the Triton kernels of chosen rows for an H100; test_gpu_kernels.py runs it in a process of its own."""

import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pop_mm.ops import gpu_rows, triton_rows

FLOATS = ("x", "first", "second", "bias", "router", "gate_bias", "up_bias", "out", "h")
SUMS = ("norms", "threshold", "partial", "scale", "gate_scale", "up_scale")
UNSCALED = {"scale": None}, {"gate_scale": None, "up_scale": None}


def compile_kernel(kernel, constants, **own):
    """For bfloat16 weights and float32 sums; what is no constant and has none of the names above is a number."""
    types = dict.fromkeys(FLOATS, "*bf16") | dict.fromkeys(SUMS, "*fp32") | {"kept": "*i64", "experts": "*i64"} | own
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
    where = {(i,): constants[name] for i, name in enumerate(kernel.arg_names) if name in constants}
    return triton.compile(ASTSource(kernel, signature, where), target=GPUTarget("cuda", 90, 32))


def main():
    wide = {"ACCUMULATE": triton_rows.tl.float32}
    product, block = {**wide, **gpu_rows._PRODUCTS}, {**wide, **gpu_rows._FINISH}
    one, many = {"experts": None}, {}
    for own in ({**one, "second": None, "kept": None}, {**one, "norms": None}, many):
        compile_kernel(triton_rows.products_kernel, {**product, "OWN": not own, **own})
    compile_kernel(triton_rows.products_kernel, {**product, **one, "OWN": False}, first="*i8", second="*i8")
    for finished, hidden in (UNSCALED, ({}, {})):  # plain weights, int8
        for which in (one, many):
            router = {"router": None} if which else {}
            compile_kernel(triton_rows.finish_kernel, {**block, **which, **router, **finished})
            ffn = {"GATED": True, "ACTIVATION": "silu", **hidden}
            compile_kernel(triton_rows.hidden_kernel, {**block, **which, **ffn})


if __name__ == "__main__":
    sys.exit(main())
