"""Shapes, and the machine info of every record."""

import pytest
import torch

import churn_kernels as ck
from benchmarks.peers import TINY


def pytest_addoption(parser):
    parser.addoption(
        "--tiny", action="store_true", help="a few rows instead of each shape, as a smoke test"
    )


@pytest.fixture
def shape(request):
    """The (N, C) of a case, by indirect parametrization."""
    return TINY if request.config.getoption("--tiny") else request.param


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info.pop("node", None)  # do not record the host name
    isa = torch.ops.churn_kernels.cpu_isa("") if "cpu" in ck.available_backends() else None
    machine_info.update(
        torch=torch.__version__,
        threads=torch.get_num_threads(),
        cpu_isa=isa,
        churn_kernels=ck.build_info(),
    )
