"""Fixtures for every test: the backends, and uninitialised memory that shows when it is read."""

import os

import pytest
import torch

import churn_kernels as ck

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


@pytest.fixture(params=["cpu", "reference"])
def backend(request):
    """Each backend in turn, in force for the test; one that was not built is skipped."""
    if request.param not in ck.available_backends():
        pytest.skip(f"backend {request.param!r} was not built")
    with ck.backend(request.param):
        yield request.param
