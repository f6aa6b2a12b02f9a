"""The operator that makes two replays of a step differ: which, where, and by how much."""

import math

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import churn_kernels as ck
from churn_kernels import _ops
from churn_kernels.audit import text
from churn_kernels.audit.__main__ import main
from churn_kernels.audit.selftest import PLACES, racy_sum, selftest

pytestmark = pytest.mark.skipif(not _ops.LOADED, reason="the compiled library is not built")


def test_selftest():
    trials = selftest()
    assert [trial.place for trial in trials] == list(PLACES)
    assert [trial.place for trial in trials if not trial.passed] == []
    forward = trials[0].finding
    assert forward.operation.source.partition(":")[0].endswith("selftest.py")
    assert forward.operation.tensors == "(float32[32, 64]) -> (float32[])"
    assert forward.operation.inputs == forward.other.inputs
    assert forward.operation.outputs != forward.other.outputs
    (of_sum,) = forward.outputs
    assert of_sum.share == 1.0
    assert of_sum.largest_ulps >= 1
    assert sum(of_sum.ulps.values()) == 1


def test_the_audit_is_caught_when_it_is_blind(monkeypatch):
    """The negative control: operators whose tensors nobody looks at."""
    monkeypatch.setattr("churn_kernels.audit.log.tensor_hash", lambda x: "")
    passed = [trial.place for trial in selftest(replays=2) if trial.passed]
    assert passed == ["data", "nowhere"]  # the data's order is a number among the arguments


def test_the_command(capsys):
    assert main(["selftest"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(PLACES)
    assert lines[1].startswith("right: a race in backward: churn_audit.racy_sum.default (layers.2)")
    assert "no difference in 10 replays: fewer than 33% of steps" in lines[-1]


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 5)
        self.inner = nn.ModuleDict({"drop": nn.Dropout(0.5), "last": nn.Linear(5, 3)})

    def forward(self, x):
        return self.inner["last"](self.inner["drop"](torch.relu(self.first(x))))


def logged(step=None):
    torch.manual_seed(0)
    model = Model()
    with ck.audit.OperatorLog(model) as log:
        (step or (lambda m: ck.symmetric_kl(m(torch.ones(4, 6)), m(torch.ones(4, 6))).backward()))(
            model
        )
    return log.operations


def test_operators_know_where_they_belong():
    operations = logged(lambda m: m(torch.ones(4, 6)).sum().backward())
    forward = {(o.module, o.name) for o in operations if o.phase == "forward"}
    assert ("first", "aten.addmm.default") in forward
    assert ("inner.last", "aten.addmm.default") in forward
    assert ("(model)", "aten.relu.default") in forward
    backward = {(o.module, o.name) for o in operations if o.phase == "backward"}
    assert ("first", "aten.mm.default") in backward
    assert ("inner.last", "aten.mm.default") in backward
    assert ("(model)", "aten.threshold_backward.default") in backward
    sources = {o.source for o in operations if o.name == "aten.threshold_backward.default"}
    assert all(s.startswith("backward of ") and "test_audit_operators.py:" in s for s in sources)


def test_our_own_kernels_are_logged():
    names = {o.name for o in logged()}
    assert "churn_kernels.loss.default" in names


def test_random_operators_take_their_generator_as_an_input():
    torch.manual_seed(0)
    model = Model()
    restore = ck.audit.snapshot(model, torch.optim.SGD(model.parameters(), 0.1))

    def step():
        model(torch.ones(4, 6)).sum().backward()

    assert ck.audit.find_operator(step, model, restore, replays=3).verdict == "none"
    found = ck.audit.find_operator(step, model, lambda: None, replays=3)
    assert found.verdict == "input"
    assert found.operation.module == "inner.drop"


def test_written_arguments_are_outputs_and_unwritten_memory_is_not():
    def step(model):
        x = torch.empty(1000)
        x.fill_(2.0)
        torch.add(x, 1.0, out=torch.empty(1000))

    first, second = logged(step), logged(step)
    assert first == second
    by_name = {o.name: o for o in first}
    assert by_name["aten.fill_.Scalar"].outputs == (ck.audit.tensor_hash(torch.full((1000,), 2.0)),)
    assert by_name["aten.add.out"].outputs == (ck.audit.tensor_hash(torch.full((1000,), 3.0)),)


class Scratch(nn.Module):
    """Memory that is held outside of the model's state, and overwritten whole in each step."""

    def __init__(self):
        super().__init__()
        self.last = nn.Linear(4, 3)
        self.scratch = torch.empty(4, 6)

    def forward(self, x):
        with torch.no_grad():
            torch.mul(x, 2, out=self.scratch)
            self.scratch.sub_(1)
            parts = torch.empty(4, 4)
            parts[:2], parts[2:] = self.scratch[:2, :4], self.scratch[2:, 2:]
        return self.last(parts + torch.empty_like(parts).exponential_())


class Alignment(nn.Module):
    """A loss that is given a workspace, of which its kernel writes a part."""

    def __init__(self):
        super().__init__()
        self.last = nn.Linear(6, 3)

    def forward(self, x):
        scores = self.last(x).log_softmax(-1).expand(5, 4, 3)
        wanted, lengths = torch.tensor([1, 2, 2, 1, 2, 1, 1]), torch.tensor([2, 1, 3, 1])
        return nn.functional.ctc_loss(scores, wanted, torch.tensor([5, 4, 5, 3]), lengths)


class Dirty(TorchDispatchMode):
    """Memory that nothing has written holds other bytes in every replay."""

    def __init__(self, replay):
        super().__init__()
        self.replay = replay

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        if func._schema.name.startswith("aten::empty"):
            found.untyped_storage().fill_(self.replay + 1)
        if func._schema.name == "aten::_ctc_loss":
            for row, length in zip(found[1], args[2], strict=True):
                row[length:] = self.replay
        return found


@pytest.mark.parametrize("make", [Model, Scratch, Alignment])
def test_memory_that_nothing_has_written_is_no_input(make):
    torch.manual_seed(0)
    model = make()
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    restore = ck.audit.snapshot(model, optimizer)

    def step():
        optimizer.zero_grad()
        model(torch.ones(4, 6)).sum().backward()
        optimizer.step()

    found = ck.audit.find_operator(step, model, restore, replays=4, around=Dirty)
    assert found.verdict == "none", found.operation


def test_an_operator_that_reads_memory_that_nothing_has_written():
    torch.manual_seed(0)
    model = nn.Linear(6, 3)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    def step():
        garbage = torch.empty(4, 6)
        garbage[:3] = 1.0
        model(garbage.abs()).sum().backward()
        optimizer.step()

    found = ck.audit.find_operator(step, model, ck.audit.snapshot(model, optimizer))
    assert (found.verdict, found.operation.name) == ("memory", "aten.abs.default")
    assert text.of_finding(found) == "aten.abs.default reads memory that nothing has written"


def test_a_step_that_takes_another_path():
    model = nn.Linear(2, 2)
    calls = iter(range(100))

    def step():
        y = model(torch.ones(1, 2))
        (y.exp() if next(calls) % 2 else y.sin()).sum()

    found = ck.audit.find_operator(step, model, lambda: None, replays=2)
    assert found.verdict == "sequence"
    assert {found.operation.name, found.other.name} == {"aten.sin.default", "aten.exp.default"}


def test_one_replay_is_refused():
    model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="replays must be at least 2, got 1; one has nothing to"):
        ck.audit.find_operator(lambda: None, model, lambda: None, replays=1)


def test_the_racy_sum_is_close_to_the_sum():
    x = torch.randn(500)
    assert abs(racy_sum(x) - x.double().sum()) < 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_differences_in_units_of_the_last_place(dtype):
    a = torch.tensor([1.0, 1.0, 0.0, -1.0, 5.0, math.inf], dtype=dtype)
    b = a.clone()
    up = torch.full_like(a, math.inf)
    b[0] = torch.nextafter(a, up)[0] if dtype.itemsize > 2 else a[0] + torch.finfo(dtype).eps
    b[2] = -0.0
    b[3] = a[3] * (1 + 4 * torch.finfo(dtype).eps)
    found = ck.audit.differences(a, b)
    assert found.positions == [(0,), (2,), (3,)]
    assert found.share == 0.5
    assert found.ulps == {1: 1, 4: 1}
    assert found.largest_ulps == 4
    assert found.largest == pytest.approx(4 * torch.finfo(dtype).eps)
    assert ck.audit.differences(a, a.clone()) is None


def test_differences_of_other_tensors():
    a = torch.arange(6).view(2, 3)
    b = a.clone()
    b[1, 2] = 0
    found = ck.audit.differences(a, b)
    assert (found.positions, found.ulps) == ([(1, 2)], {})
    z = torch.ones(2, dtype=torch.complex64)
    assert ck.audit.differences(z, z * 1j).share == 1.0
    nan = torch.tensor([math.nan, 1.0])
    assert ck.audit.differences(nan, torch.tensor([1.0, 1.0])).positions == [(0,)]
