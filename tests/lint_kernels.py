"""Kernels that the lint must find fault with, and one that it must not.

`python -m tests.lint_kernels` compiles them for sm_90 and prints their findings as JSON.
"""

import json

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

from benchmarks.compiled.compiler import compiled_by, texts_of
from benchmarks.compiled.lint import findings

SIZE = 4096


@triton.jit
def faultless(x, y, size: tl.constexpr):
    i = tl.arange(0, size)
    a, b = tl.load(x + i), tl.load(y + i)
    wide = a.to(tl.float64) * b.to(tl.float64) + 1.0
    tl.store(x + i, tl.fma(a, b, tl.div_rn(a, b)) + a * b + (wide / (wide + 1.0)).to(tl.float32))


@triton.jit
def exponential(x, y, size: tl.constexpr):
    i = tl.arange(0, size)
    tl.store(y + i, tl.exp2(tl.load(x + i)))


@triton.jit
def library_function(x, y, size: tl.constexpr):
    i = tl.arange(0, size)
    tl.store(y + i, libdevice.expm1(tl.load(x + i)))


@triton.jit
def quotient(x, y, size: tl.constexpr):
    i = tl.arange(0, size)
    tl.store(y + i, tl.load(x + i) / tl.load(y + i))


@triton.jit
def contracted(x, y, size: tl.constexpr):
    i = tl.arange(0, size)
    a, b = tl.load(x + i), tl.load(y + i)
    tl.store(y + i, a * b + a)


@triton.jit
def contracted_float64(x, y, size: tl.constexpr):
    i = tl.arange(0, size)
    a, b = tl.load(x + i).to(tl.float64), tl.load(y + i).to(tl.float64)
    tl.store(y + i, (a * b + a).to(tl.float32))


@triton.jit
def fused_float64(x, y, size: tl.constexpr):
    i = tl.arange(0, size)
    a, b = tl.load(x + i).to(tl.float64), tl.load(y + i).to(tl.float64)
    tl.store(y + i, tl.fma(a, b, a).to(tl.float32))


@triton.jit
def sum_of_floats(x, y, size: tl.constexpr):
    tl.store(y, tl.sum(tl.load(x + tl.arange(0, size)), 0))


@triton.jit
def atomic_sum(x, y, size: tl.constexpr):
    i = tl.arange(0, size)
    tl.atomic_add(y + i, tl.load(x + i), sem="relaxed")


@triton.jit
def crowded(x, y, size: tl.constexpr):
    i = tl.arange(0, size)
    a = tl.load(x + i)
    tl.store(y + i, a + tl.max(a, 0))


FUSING = {"enable_fp_fusion": True}
KERNELS = {
    faultless: {},
    exponential: {},
    library_function: {},
    quotient: {},
    contracted: FUSING,
    contracted_float64: FUSING,
    fused_float64: {},
    sum_of_floats: {},
    atomic_sum: {},
    crowded: {"maxnreg": 32},
}


def launch_all():
    x, y = torch.zeros(SIZE), torch.zeros(SIZE)
    for kernel, options in KERNELS.items():
        size = SIZE if kernel is crowded else 128
        kernel[(1,)](x, y, size, **{"num_warps": 1, "enable_fp_fusion": False} | options)


def main():
    compiled = [kernel for kernel, _ in compiled_by(launch_all, "sm_90")]
    print(json.dumps({kernel.name: findings(kernel.name, texts_of(kernel)) for kernel in compiled}))


if __name__ == "__main__":
    main()
