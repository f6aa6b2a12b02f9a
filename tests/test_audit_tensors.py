"""Recorded runs of models whose tensors are of any kind and place."""

import pytest
import torch
from torch import nn

import churn_kernels as ck
from churn_kernels import _ops
from churn_kernels.audit import hashes
from churn_kernels.audit.replay import state_hashes

pytestmark = pytest.mark.skipif(not _ops.LOADED, reason="the compiled library is not built")


def test_devices_of_the_tensors_do_not_show(monkeypatch):
    """Adam's step counts stay on the CPU while its moments go with the parameters."""
    torch.manual_seed(0)
    tensors = [(f"{i}", torch.randn(2 + i) if i % 2 else torch.tensor(float(i))) for i in range(6)]
    tensors.insert(2, ("none", None))
    want = hashes.tensors_hash(tensors)()
    monkeypatch.setattr(hashes, "_device_of", lambda x: "cuda" if x.ndim else "cpu")
    assert hashes.tensors_hash(tensors)() == want
    assert hashes.tensors_hash(tensors[::-1])() != want


def test_only_generators_that_a_model_draws_from_count(monkeypatch):
    training = ck.audit.Training(nn.Linear(2, 2), torch.optim.SGD([torch.ones(1)], 1), lambda n: 0)
    want = state_hashes(training)["random state"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: [torch.ones(3, dtype=torch.uint8)])
    assert state_hashes(training)["random state"] == want
    torch.rand(())
    assert state_hashes(training)["random state"] != want


def test_kinds_of_tensors(tmp_path):
    """Not finite, sparse gradients, none at all, complex numbers, channels last."""

    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.words = nn.Embedding(9, 3, sparse=True)
            self.pixels = nn.Conv2d(2, 2, 3).to(memory_format=torch.channels_last)
            self.waves = nn.Parameter(torch.ones(3, dtype=torch.complex64))
            self.unused = nn.Parameter(torch.full((2,), float("nan")))

        def forward(self):
            pixels = self.pixels(torch.ones(1, 2, 4, 4)).sum()
            return self.words(torch.tensor([1, 1, 4])).sum() + self.waves.abs().sum() + pixels

    traces = []
    for name in "ab":
        torch.manual_seed(0)
        model = Mixed()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        with ck.audit.record(tmp_path / name, model, optimizer):
            model().backward()
            if name == "b":
                model.words.weight.grad._values()[0, 0] *= -1
            optimizer.step()
        traces.append(ck.audit.Trace.load(tmp_path / name))
    assert ck.audit.compare(*traces).difference.first == "gradients"


def differs_first(tmp_path, change):
    """What differs first between two runs of a model of odd tensors, the second one changed."""

    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.tensor([1.0, float("nan"), float("-inf"), -0.0]))
            scales = torch.tensor([0.1, 0.2])
            table = torch.quantize_per_channel(
                torch.ones(2, 3), scales, torch.zeros(2), 0, torch.qint8
            )
            self.register_buffer("table", table)
            self.register_buffer("graph", torch.eye(3).to_sparse_csr())

    traces = []
    for name in "ab":
        model = Odd()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        with ck.audit.record(tmp_path / name, model, optimizer):
            if name == "b":
                change(model)
            optimizer.step()
        traces.append(ck.audit.Trace.load(tmp_path / name))
    difference = ck.audit.compare(*traces).difference
    return difference and difference.first


@pytest.mark.filterwarnings("ignore:Sparse C.. tensor support")
@pytest.mark.filterwarnings("ignore:torch.quantize_per")
@pytest.mark.parametrize(
    ("change", "first"),
    [
        (lambda model: None, None),
        (lambda model: model.weight.data.view(torch.int32)[1].add_(1), "parameters before"),
        (lambda model: model.weight.data[2:3].neg_(), "parameters before"),
        (lambda model: model.weight.data[3:4].neg_(), "parameters before"),
        (lambda model: model.graph.values().neg_(), "buffers"),
        (
            lambda model: setattr(
                model,
                "table",
                torch.quantize_per_tensor(torch.ones(2, 3), 0.1, 0, torch.qint8),
            ),
            "buffers",
        ),
    ],
)
def test_tensors_that_are_not_finite_not_dense_or_quantised(tmp_path, change, first):
    assert differs_first(tmp_path, change) == first


def test_a_model_without_data_is_refused(tmp_path):
    model = nn.Linear(2, 2, device="meta")
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with (
        pytest.raises(ValueError, match="x must hold data, got a meta tensor; pass a materialised"),
        ck.audit.record(tmp_path / "a", model, optimizer),
    ):
        pass
    optimizer.step()  # no hook is left
