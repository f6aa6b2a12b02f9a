"""What `audit.record` adds to a training step: ResNet-56 on batches of CIFAR's shape."""

import pytest
import torch
import torch.nn.functional as F
from churn_trainer.models.resnet import resnet56
from torch import nn

from churn_kernels import audit

pytestmark = pytest.mark.benchmark(group="recording", disable_gc=True)


class Still(torch.optim.SGD):
    """SGD with an empty step, so that only its hooks are timed."""

    def step(self, closure=None):
        """Do nothing."""


class Training:
    """A network with gradients, and an optimizer with momentum buffers."""

    def __init__(self, size):
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randn(size, 3, 32, 32, generator=generator)
        self.labels = torch.randint(10, (size,), generator=generator)
        self.model: nn.Module = resnet56((3, 32, 32), 10)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3, momentum=0.9)
        self.loss = torch.zeros(())
        self.step()

    def step(self):
        """A training step without recording."""
        self.optimizer.zero_grad()
        self.loss = F.cross_entropy(self.model(self.images), self.labels)
        self.loss.backward()
        self.optimizer.step()

    def around_a_step(self, recorder):
        """Only the recording of a step: the hooks run around an empty optimizer step."""
        recorder.observe(images=self.images, labels=self.labels)
        recorder.observe(loss=self.loss)
        self.optimizer.step()


@pytest.mark.parametrize("peer", ["step", "recording"])
@pytest.mark.parametrize("size", [32, 128])
def test_recording(benchmark, request, tmp_path, size, peer):
    tiny = request.config.getoption("--tiny")
    training = Training(2 if tiny else size)
    benchmark.extra_info.update(shape=str(size), peer=peer)
    if peer == "step":
        benchmark.pedantic(training.step, rounds=1 if tiny else 9)
        return
    state = training.optimizer.state
    training.optimizer = Still(training.model.parameters(), lr=1e-3, momentum=0.9)
    training.optimizer.state = state
    with audit.record(tmp_path / "a", training.model, training.optimizer) as recorder:
        benchmark.pedantic(training.around_a_step, (recorder,), rounds=1 if tiny else 99)
    assert len(audit.Trace.load(tmp_path / "a").steps) >= 2
