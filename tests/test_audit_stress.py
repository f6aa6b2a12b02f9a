"""What may not show in a bit, switched on and off; and where it shows all the same."""

import re
import threading
from contextlib import contextmanager

import pytest
import torch
from torch import nn

import churn_kernels as ck
from churn_kernels import _ops
from churn_kernels.audit.selftest import racy_sum

pytestmark = pytest.mark.skipif(not _ops.LOADED, reason="the compiled library is not built")


class Scaled(nn.Module):
    """x plus a number that `add_up` makes of it."""

    def __init__(self, add_up):
        super().__init__()
        self.add_up = add_up

    def forward(self, x):
        return x + 1e-3 * self.add_up(x)


def problem(add_up=ck.exact_sum):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 64), Scaled(add_up), nn.Linear(64, 10))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    x, y = torch.randn(64, 256), torch.randint(10, (64,))

    def step():
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()

    return step, model, ck.audit.snapshot(model, optimizer)


def test_a_step_that_repeats_its_bits(threads):
    threads(2)
    found = {s.axis: s.finding for s in ck.audit.stress(*problem())}
    assert list(found) == list(ck.audit.AXES)
    for axis in ("nothing", "contention", "allocator"):
        assert found[axis].verdict == "none", axis
    assert torch.get_num_threads() == 2
    assert torch.backends.mkldnn.enabled


def test_what_depends_on_threads_is_named_and_confirmed(threads):
    """Matrix products may: whatever the audit names, its inputs alone show the same."""
    threads(2)
    step, model, restore = problem()
    (found,) = ck.audit.stress(step, model, restore, axes=("threads",))
    if found.finding.verdict == "none":
        pytest.skip("no operator of this step depends on the number of threads here")
    assert found.finding.verdict == "operator"
    assert found.finding.operation.name in ("aten.mm.default", "aten.addmm.default")
    assert found.finding.outputs[0].largest_ulps >= 1
    restore()
    with Kept(found.finding.index) as kept:
        step()
    hashes = set()
    for count in (1, 2):
        threads(count)
        hashes.add(ck.audit.tensor_hash(kept.again()))
    assert len(hashes) == 2


class Kept(torch.utils._python_dispatch.TorchDispatchMode):
    """Keeps the call of an operator, by its place among those that an OperatorLog logs."""

    def __init__(self, index):
        super().__init__()
        self.index, self.calls = index, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not ck.audit.log._only_looks(func):
            if self.calls == self.index:
                copies = [x.clone() if isinstance(x, torch.Tensor) else x for x in args]
                self.again = lambda: func(*copies, **(kwargs or {}))
            self.calls += 1
        return func(*args, **(kwargs or {}))


def test_a_race_shows_without_any_stress():
    found = ck.audit.stress(*problem(lambda x: racy_sum(x.detach())), axes=("nothing",), replays=10)
    assert found[0].finding.verdict == "operator"
    assert found[0].finding.operation.name == "churn_audit.racy_sum.default"


def test_every_axis_does_something(threads):
    """The negative control: what a step could see of each."""
    threads(2)
    seen = {name: [] for name in ck.audit.AXES}
    for name, around in ck.audit.AXES.items():
        for replay in range(2):
            with around(replay):
                seen[name].append(
                    (
                        torch.get_num_threads(),
                        torch._C._get_mkldnn_enabled(),
                        threading.active_count(),
                    )
                )
    assert seen["nothing"][0] == seen["nothing"][1]
    assert [row[0] for row in seen["threads"]] == [2, 1]
    assert [row[1] for row in seen["onednn"]] == [True, False]
    assert seen["contention"][1][2] > seen["contention"][0][2]
    assert threading.active_count() == seen["nothing"][0][2]


def test_settings_come_back_when_a_step_fails(threads):
    threads(2)

    def step():
        raise KeyError("step")

    for name in ck.audit.AXES:
        with pytest.raises(KeyError):
            ck.audit.stress(step, nn.Linear(2, 2), lambda: None, axes=(name,))
    assert torch.get_num_threads() == 2
    assert torch._C._get_mkldnn_enabled()
    assert not any(module for module in nn.Linear(2, 2)._forward_hooks)


def test_settings_of_ones_own():
    step, model, restore = problem()

    @contextmanager
    def other_data(replay):
        with torch.no_grad():
            model[0].bias += replay
        yield

    found = ck.audit.find_operator(step, model, restore, replays=2, around=other_data)
    assert (found.verdict, found.operation.module) == ("input", "0")


def test_an_axis_that_does_not_exist():
    message = "axes must be some of nothing, contention, allocator, threads, onednn, got 'noise'"
    with pytest.raises(ValueError, match=re.escape(message)):
        ck.audit.stress(*problem(), axes=("noise",))


# Batches in parts ---------------------------------------------------------------------------------


class Leaky(nn.Module):
    """Rows that see the whole batch."""

    def forward(self, x):
        return x - x.mean()


def test_modules_that_depend_on_the_batch():
    torch.manual_seed(0)
    model = nn.Sequential(nn.ReLU(), Leaky(), nn.ReLU()).train()
    x = torch.randn(6, 5)
    found = ck.audit.split_batch(model, x, parts=3)
    assert [(split.module, split.kind) for split in found] == [("1", "Leaky")]
    assert found[0].outputs.share > 0.5
    assert model.training
    assert ck.audit.split_batch(nn.Sequential(nn.ReLU(), nn.Tanh()), x, parts=6) == []


@pytest.mark.parametrize("parts", [1, 7])
def test_parts_that_there_are_not(parts):
    message = f"parts must be at least 2 and at most the number of rows, 6, got {parts}; pass more"
    with pytest.raises(ValueError, match=re.escape(message)):
        ck.audit.split_batch(nn.ReLU(), torch.ones(6, 2), parts=parts)
