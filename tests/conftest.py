"""Fixtures for every test: the backends, and uninitialised memory that shows when it is read."""

import os

import pytest
import torch

# Without a GPU Triton's kernels run in its interpreter, on CPU tensors.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import churn_kernels as ck


def round_in_interpreter():
    """Let Triton's interpreter round float32 to bfloat16 as a GPU does; it cuts the bits off."""
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    cast = builder.cast_impl

    def rounding(self, source, dtype):
        if source.dtype.scalar == tl.float32 and dtype.scalar == tl.bfloat16:
            bits = source.data.view(np.uint32)
            nearest = (bits + 0x7FFF + (bits >> 16 & 1) & 0xFFFF0000).view(np.float32)
            data = np.where(np.isfinite(source.data), nearest, source.data)
            source = interpreter.TensorHandle(data, source.dtype)
        return cast(self, source, dtype)

    builder.cast_impl = rounding


def hurry_interpreter():
    """Let Triton's interpreter prepare its language once a kernel, not at every inner call."""
    import triton.language as tl
    from triton.runtime import interpreter

    prepare = interpreter._patch_lang

    def prepare_once(function):
        used = [m for m in function.__globals__.values() if m is tl or m is tl.core]
        if not used or any(tl.core.is_builtin(module.load) for module in used):
            return prepare(function)
        return interpreter._LangPatchScope()  # nothing to put back

    interpreter._patch_lang = prepare_once


if os.environ.get("TRITON_INTERPRET") == "1" and "triton" in ck.available_backends():
    round_in_interpreter()
    hurry_interpreter()

# Workers share the cores among themselves; a test that is about threads sets their number itself.
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def poisoned_memory():
    """torch.empty is full of NaN, so that an output nobody wrote cannot pass for a result."""
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = filled


@pytest.fixture(params=["cpu", "triton", "reference"])
def backend(request):
    """Each backend in turn, in force for the test; one that was not built is skipped."""
    if request.param not in ck.available_backends():
        pytest.skip(f"backend {request.param!r} was not built")
    with ck.backend(request.param):
        yield request.param


@pytest.fixture
def threads():
    """Sets torch's threads, and puts them back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
