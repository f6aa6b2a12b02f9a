"""Exact sums on Triton, on a GPU or in its interpreter: the words and the bits of the CPU's."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from exactness import CASES, bits_of, float32_sum, float64_sum, normal, random_bits

import churn_kernels as ck
from churn_kernels import _ops

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif("triton" not in ck.available_backends(), reason="no Triton here"),
]

ROOT = Path(__file__).parents[1]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def exact_sum():
    """The module with the kernels."""
    from churn_kernels.triton import exact_sum

    return exact_sum


def words_and_value(x):
    """The words and the float32 of Triton's ops, on the CPU."""
    ops = _ops.triton()
    words = ops.exact_words(x.to(DEVICE))
    return words.cpu(), ops.exact_round(words).cpu()


def check(x):
    words, value = words_and_value(x)
    assert bits_of(words) == bits_of(_ops.COMPILED.exact_words(x))
    assert bits_of(value) == float32_sum(x.float())


@pytest.mark.parametrize("name", CASES)
def test_words_and_value(name):
    check(CASES[name])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    every = torch.arange(-(2**15), 2**15, 37).to(torch.int16).view(dtype)
    check(torch.where(every.isfinite(), every, 0))


@pytest.mark.parametrize("size", [511, 512, 513, 1500])
def test_sizes(size):
    check(random_bits(size, size))


def test_passes_steps_and_programs(exact_sum, monkeypatch):
    """Sums of several passes, of programs with several blocks, with and without a last part."""
    monkeypatch.setattr(exact_sum, "PROGRAMS", 2)
    for size in (4096, 4100):
        check(random_bits(size, size))
    monkeypatch.setattr(exact_sum, "PASS", 1000)
    check(torch.cat([random_bits(1, 3300), CASES["both infinities"]]))


def test_strides_and_gradient():
    with ck.backend("triton"):
        x = normal(600).view(20, 30).to(DEVICE).t().requires_grad_()
        value = ck.exact_sum(x)
        value.backward(torch.tensor(2.0, device=DEVICE))
        assert bits_of(value) == float32_sum(x.detach().cpu())
        assert torch.equal(x.grad, torch.full_like(x, 2.0))
        assert ck.ExactSum().add(x).add(x[0]).value() == float64_sum(
            torch.cat([x.detach().cpu().flatten(), x[0].detach().cpu()])
        )


def test_registrations():
    ops = _ops.triton()
    x = normal(10).to(DEVICE)
    torch.library.opcheck(ops.exact_words, (x.view(2, 5).t(),))
    torch.library.opcheck(ops.exact_round, (ops.exact_words(x),))


def test_both_roundings_of_masked_tiles():
    """The functions that other kernels use: words of a masked tile, float32 and float64."""
    import exact_kernels

    for name, x in CASES.items():
        tile = torch.cat([x[:200], torch.full((256 - len(x[:200]),), float("nan"))]).to(DEVICE)
        words = torch.zeros(12, dtype=torch.int64, device=DEVICE)
        narrow = torch.zeros(1, dtype=torch.float32, device=DEVICE)
        wide = torch.zeros(1, dtype=torch.float64, device=DEVICE)
        exact_kernels.sum_and_round(tile, words, narrow, wide, len(x[:200]))
        assert bits_of(narrow) == float32_sum(x[:200]), name
        want = torch.tensor([float64_sum(x[:200])], dtype=torch.float64)
        assert bits_of(wide) == bits_of(want), name


COMPILE = """
import json, sys, torch
from benchmarks.compiled.code import read_amd, read_sass
from benchmarks.compiled.compiler import compiled_by, disassemble
from churn_kernels.triton import exact_sum

def launch():
    exact_sum.exact_round(exact_sum.exact_words(torch.zeros(5000)))

for target in sys.argv[1:]:
    for kernel, _ in compiled_by(launch, target):
        if "amdgcn" in kernel.asm:
            code = read_amd(kernel.asm["amdgcn"], kernel.name)
        else:
            code = read_sass(disassemble(kernel))
        print(json.dumps([target, kernel.name, code._asdict()]))
"""


def test_they_compile_for_every_gpu_and_spill_nothing():
    from benchmarks.compiled.targets import TARGETS

    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment.setdefault("TRITON_CACHE_DIR", str(ROOT / "build/triton"))
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, *TARGETS],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    kernels = [(target, kernel) for target, kernel, _ in found]
    wanted = ["exact_words_kernel", "exact_round_kernel"]
    assert kernels == [(target, kernel) for target in TARGETS for kernel in wanted]
    for target, kernel, code in found:
        assert (code["spills"], code["stack"]) == (0, 0), (target, kernel)
        if kernel == "exact_words_kernel":
            assert code["loads"] >= 1, f"{target}: numbers move in 16 bytes"
            assert code["registers"] <= 128, target
