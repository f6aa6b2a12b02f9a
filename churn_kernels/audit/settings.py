"""Settings of the process that may move a bit, each as a block that puts back what was there."""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch

from churn_kernels._files import check
from churn_kernels.modes import MODES, reduction_mode

MOST_THREADS = 1024
"""More than a file may ask a process to start."""


@contextmanager
def _put(get: Callable[[], Any], put: Callable[[Any], None], value: Any) -> Iterator[None]:
    before = get()
    put(value)
    try:
        yield
    finally:
        put(before)


def thread_count(count: int) -> AbstractContextManager[None]:
    """PyTorch's threads within an operator."""
    return _put(torch.get_num_threads, torch.set_num_threads, count)


def onednn(on: bool) -> AbstractContextManager[None]:
    """With oneDNN, or with PyTorch's own kernels in its place."""
    return _put(torch._C._get_mkldnn_enabled, torch._C._set_mkldnn_enabled, on)


def matmul_precision(precision: str) -> AbstractContextManager[None]:
    """Of float32 matrix products: "highest", "high" or "medium"."""
    return _put(torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, precision)


@contextmanager
def deterministic_algorithms(on: bool) -> Iterator[None]:
    """PyTorch's own switch; what has no deterministic algorithm warns."""
    before = torch.are_deterministic_algorithms_enabled()
    warned = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(on, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warned)


@contextmanager
def deterministic_cudnn() -> Iterator[None]:
    """The same algorithms of cuDNN at every call, and only those that repeat their bits."""
    cudnn = torch.backends.cudnn
    before = cudnn.deterministic, cudnn.benchmark
    cudnn.deterministic, cudnn.benchmark = True, False
    try:
        yield
    finally:
        cudnn.deterministic, cudnn.benchmark = before


@contextmanager
def cublas_workspace(size: str = ":4096:8") -> Iterator[None]:
    """Workspaces that cuBLAS does not share between streams, as NVIDIA asks for."""
    name = "CUBLAS_WORKSPACE_CONFIG"
    before = os.environ.get(name)
    clear = torch._C._cuda_clearCublasWorkspaces  # the next call reads the variable again
    os.environ[name] = size
    clear()
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
        clear()


_RECORDED: dict[str, tuple[Any, Callable[[Any], AbstractContextManager[None]]]] = {
    "threads": (range(1, MOST_THREADS + 1), thread_count),
    "mkldnn": (bool, onednn),
    "deterministic_algorithms": (bool, deterministic_algorithms),
    "matmul_precision": ({"highest", "high", "medium"}, matmul_precision),
    "reduction_mode": (set(MODES), reduction_mode),
}
"""The form of each recorded setting, and the block that takes it on."""


@contextmanager
def as_recorded(manifest: Mapping[str, Any]) -> Iterator[None]:
    """The settings of a recorded run, as far as a running process can take them on.

    Args:
        manifest: as `audit.manifest` gives it: threads, oneDNN, deterministic algorithms, the
            precision of matrix products and the reduction mode are set.
    Raises: TypeError, ValueError or RuntimeError for values that are none.
    """
    with ExitStack() as stack:
        for name, (form, setting) in _RECORDED.items():
            if name in manifest:
                stack.enter_context(setting(check(manifest[name], form, name)))
        yield
