"""Trainings that audits of the tests replay; `churn-audit` loads them as it loads a user's."""

import dataclasses
import os

import torch
from torch import nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

import churn_kernels as ck
from churn_kernels.audit.selftest import racy_sum

HOSTILE = "<script>alert('\"&')</script>"


@torch.library.custom_op("churn_test::sum_by_threads", mutates_args=())
def sum_by_threads(x: torch.Tensor) -> torch.Tensor:
    """A sum that depends on the number of threads."""
    return x.sum() * (1 + 1e-2 * torch.get_num_threads())


class Scaled(nn.Module):
    """x plus a number that `add_up` makes of it."""

    def __init__(self, add_up):
        super().__init__()
        self.add_up = add_up

    def forward(self, x):
        return x + 1e-3 * self.add_up(x.detach())


def training(add_up=ck.exact_sum, *, after_step=lambda model: None, name="middle", resume=None):
    torch.manual_seed(0)
    x, y = torch.randn(96, 12), torch.randint(4, (96,))
    model = nn.Sequential()
    for key, layer in (
        ("first", nn.Linear(12, 32)),
        (name, Scaled(add_up)),
        ("last", nn.Linear(32, 4)),
    ):
        model.add_module(key, layer)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)

    def step(n):
        rows = torch.randperm(96, generator=torch.Generator().manual_seed(n))[:32]
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()
        after_step(model)

    return ck.audit.Training(model, optimizer, step, lambda: model(x), resume)


def steady(device):
    return training()


def racy(device):
    return training(racy_sum)


def by_threads(device):
    return training(sum_by_threads)


def hostile(device):
    return training(racy_sum, name=HOSTILE)


def shy(device):
    """Differs from replay to replay, unless somebody looks at its operators."""

    def noise(model):
        if _get_current_dispatch_mode() is None:
            with torch.no_grad():
                model[0].bias[0] += int.from_bytes(os.urandom(4)) * 1e-12

    return training(after_step=noise)


def unseeded(device):
    found = training()
    with torch.no_grad():
        found.model[0].bias[0] += int.from_bytes(os.urandom(4)) * 1e-12
    return found


def broken(device):
    raise KeyError("the target's own")


def nothing(device):
    return None


def no_argument():
    raise AssertionError


def two_arguments(device, seed):
    raise AssertionError


def leaves(device):
    raise SystemExit(3)


def changed(**fields):
    """A training of which some of what it consists of is something else."""
    return dataclasses.replace(training(), **fields)


def a_string_model(device):
    return changed(model="model")


def no_optimizer(device):
    return changed(optimizer=None)


def a_step_of_nothing(device):
    return changed(step=lambda: None)


def no_predictions(device):
    return changed(predict=torch.zeros(2, 2))


def resumes_nowhere(device):
    return changed(resume=lambda n: None)


def a_step_that_raises(device):
    def step(n):
        raise ValueError("two lines\n of it")

    return changed(step=step)


def two_by_two(device):
    model = nn.Linear(2, 2)
    return ck.audit.Training(model, torch.optim.Adam(model.parameters()), lambda n: None)


class Doubling(nn.Module):
    """Numbers in (0, 1) under x -> 4 x (1 - x), whose Lyapunov exponent is ln 2."""

    def __init__(self):
        super().__init__()
        self.x = nn.Parameter(torch.rand(1, dtype=torch.float64))


def chaotic(device):
    torch.manual_seed(0)
    model = Doubling()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    def step(n):
        with torch.no_grad():
            model.x.copy_(4 * model.x * (1 - model.x))

    def predict():
        return torch.stack([model.x, 1 - model.x], 1)

    return ck.audit.Training(model, optimizer, step, predict)
