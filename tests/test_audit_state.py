"""State that audits are given by name: what it may be, and iterators that can be set back."""

import re

import pytest
import torch
from torch import nn

import churn_kernels as ck
from churn_kernels import _ops
from churn_kernels.audit.replay import built

pytestmark = pytest.mark.skipif(not _ops.LOADED, reason="the compiled library is not built")


def refused(tmp_path, message, model=None, **state):
    model = model or nn.Linear(2, 2)
    optimizer = torch.optim.SGD(nn.Linear(2, 2).parameters(), 0.1)
    with (
        pytest.raises(ValueError, match=re.escape(message)),
        ck.audit.record(tmp_path / "a", model, optimizer, state=state),
    ):
        pass
    assert not (tmp_path / "a").exists()
    with pytest.raises(ValueError, match=re.escape(message)):
        ck.audit.snapshot(model, optimizer, state)
    training = ck.audit.Training(model, optimizer, lambda n: None, state=state)
    with pytest.raises(ck.audit.ReplayError, match=re.escape(message)):
        built(lambda device: training, "cpu")


def test_lazy_modules_are_refused(tmp_path):
    message = (
        "got lazy modules that have not been run: 1.weight, 1.bias; call it once on a batch before"
    )
    lazy = nn.Sequential(nn.ReLU(), nn.LazyLinear(3))
    refused(tmp_path, f"model must have parameters with a shape, {message}", lazy)
    refused(tmp_path, f"critic must have parameters with a shape, {message}", critic=lazy)


def test_state_that_cannot_be_brought_back_is_refused(tmp_path):
    class Half:
        def state_dict(self):
            return {}

    kinds = "state must hold objects with state_dict and load_state_dict, tensors, random number "
    refused(tmp_path, kinds, half=Half())
    refused(
        tmp_path,
        "got 'batches', a generator; iterate over churn_kernels.audit.Rewindable of",
        batches=(i for i in range(3)),
    )
    refused(tmp_path, "got 'pairs', a zip; iterate over", pairs=zip([1], [2], strict=True))
    loader = torch.utils.data.DataLoader(range(3))
    refused(
        tmp_path,
        "a torch.utils.data.dataloader.DataLoader; iterate over churn_kernels.audit",
        loader=loader,
    )
    refused(
        tmp_path,
        "state's names must be none of random state, buffers, gradients, parameters, ",
        buffers=nn.Linear(2, 2),
    )


def test_traces_of_other_named_state_are_not_compared(tmp_path):
    for name, state in (("a", {}), ("b", {"other": nn.Linear(2, 2)})):
        model = nn.Linear(2, 2)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        with ck.audit.record(tmp_path / name, model, optimizer, state=state):
            pass
    a, b = (ck.audit.Trace.load(tmp_path / name) for name in "ab")
    message = "must hold runs with the same named state, got {} and {'other': 'Linear'}; record"
    with pytest.raises(ck.audit.TraceError, match=re.escape(message)):
        ck.audit.compare(a, b)


# Iterators that can be set back ------------------------------------------------------------------


def test_an_iterator_goes_back_to_where_it_was():
    made = []

    def items():
        for i in range(6):
            made.append(i)
            yield torch.full((2,), float(i)) + torch.rand(())

    batches = ck.audit.Rewindable(items())
    next(batches)
    restore = batches.mark()
    first = [next(batches) for _ in range(3)]
    drawn = torch.rand(())
    first[0].mul_(0)  # a step may write to its batch
    restore()
    torch.manual_seed(9)
    again = [next(batches) for _ in range(3)]
    assert torch.equal(torch.rand(()), drawn)  # as if the items had been made anew
    assert again[0].mean() >= 1
    assert all(map(torch.equal, first[1:], again[1:]))
    assert made == [0, 1, 2, 3]
    assert batches.state_dict() == {"position": 4}
    batches.load_state_dict({"position": 2})
    assert torch.equal(next(batches), again[1])
    del restore
    batches.load_state_dict({"position": 5})
    message = "position must be at least 5, got 2; what came before is forgotten"
    with pytest.raises(ValueError, match=message):
        batches.load_state_dict({"position": 2})
    assert len(list(batches)) == 1
