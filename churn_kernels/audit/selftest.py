"""The audit on itself: it has to find operators that are planted to be caught.

On a CPU, where PyTorch's own operators repeat their bits, the planted one is a sum that adds its
parts in the order in which threads come to them.
"""

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from churn_kernels.audit.operators import Finding, find_operator
from churn_kernels.audit.replay import Training
from churn_kernels.audit.state import snapshot
from churn_kernels.exact import exact_sum

PARTS = 24
FAR = 4096.0  # added to one part and taken from the next: no two orders round alike
NAME = "churn_audit.racy_sum.default"
LAYER = "layers.2"


@torch.library.custom_op("churn_audit::racy_sum", mutates_args=())
def racy_sum(x: Tensor) -> Tensor:
    """Sum of x in float32, its parts added in the order in which threads come to them."""
    total = torch.zeros((), device=x.device)
    lock, ready = threading.Lock(), threading.Barrier(PARTS)

    def add(i: int, part: Tensor) -> None:
        value = part.sum() + FAR * (-1) ** i
        ready.wait()
        time.sleep(time.perf_counter_ns() % 97 * 1e-6)
        with lock:
            total.add_(value)

    with ThreadPoolExecutor(PARTS) as pool:
        list(pool.map(add, range(PARTS), x.flatten().tensor_split(PARTS)))
    return total


class _SumOf(torch.autograd.Function):
    """x + 1e-3 `add_up`(x), or the same of the gradient in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, add_up: Callable[[Tensor], Tensor], backward: bool) -> Tensor:
        ctx.add_up, ctx.backward_too = add_up, backward
        return x.clone() if backward else x + 1e-3 * add_up(x)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        if not ctx.backward_too:
            return upstream, None, None
        return upstream + 1e-3 * ctx.add_up(upstream), None, None


class _Layer(nn.Module):
    def __init__(self, add_up: Callable[[Tensor], Tensor], backward: bool) -> None:
        super().__init__()
        self.add_up, self.in_backward = add_up, backward

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _SumOf.apply(x, self.add_up, self.in_backward)
        return y


class _Model(nn.Module):
    def __init__(self, planted: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), planted, nn.Linear(64, 3))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers(x)
        return y


def planted(device: str) -> Training:
    """A target to try `churn-audit run` on: a small training with a racy sum in its forward pass.

    Args:
        device: where it trains; the threads that race are the host's.
    """
    torch.manual_seed(0)
    x, y = torch.randn(256, 8).to(device), torch.randint(3, (256,)).to(device)
    model = _Model(_Layer(racy_sum, backward=False)).to(device)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)

    def step(n: int) -> None:
        rows = torch.randperm(256, generator=torch.Generator().manual_seed(n))[:32]
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()

    return Training(model, optimizer, step, lambda: model(x))


@dataclass(frozen=True)
class Trial:
    """One planted operator and what the audit said of it.

    Attributes:
        place: where it was planted: "forward", "backward", "optimizer", "data", or "nowhere".
        finding: what `find_operator` found.
        passed: whether that is right.
    """

    place: str
    finding: Finding
    passed: bool


PLACES = ("forward", "backward", "optimizer", "data", "nowhere")


def selftest(replays: int = 10) -> list[Trial]:
    """Plant a racy sum in each of `PLACES`, and see whether the audit names it.

    "nowhere" has `exact_sum` in its place, and no two replays may differ.
    """
    return [_try(place, replays) for place in PLACES]


def _try(place: str, replays: int) -> Trial:
    planted = racy_sum if place in ("forward", "backward") else exact_sum
    torch.manual_seed(0)
    model = _Model(_Layer(planted, backward=place == "backward"))
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    x, y = torch.randn(32, 8), torch.randint(3, (32,))
    restore = snapshot(model, optimizer)
    shown = iter(range(1_000_000))

    def step() -> None:
        # Rows in an order that differs from replay to replay, as workers without a seed make it.
        rows = torch.arange(32).roll(next(shown) if place == "data" else 0)
        loss = nn.functional.cross_entropy(model(x[rows]), y[rows])
        loss.backward()
        if place == "optimizer":
            for group in optimizer.param_groups:
                gradient = model.layers[0].weight.grad
                group["lr"] = 0.1 / (1.0 + racy_sum(gradient).abs().item())
        optimizer.step()

    found = find_operator(step, model, restore, replays=replays)
    operation = found.operation
    if place == "nowhere":
        passed = found.verdict == "none"
    elif place == "data":
        passed = found.verdict == "input" and operation is not None
    else:
        passed = (
            found.verdict == "operator"
            and operation is not None
            and operation.name == NAME
            and operation.phase == ("" if place == "optimizer" else place)
            and operation.module == ("" if place == "optimizer" else LAYER)
        )
    return Trial(place, found, passed)
