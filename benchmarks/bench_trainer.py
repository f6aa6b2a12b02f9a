"""Time of a step of the trainer, against a bare PyTorch loop that does the same work.

ResNet-56 on minibatches of 128 images of 32 x 32 pixels, augmented; gradients clipped; SGD with
momentum. Their steps alternate, together with the trainer's loss and metrics alone. Times
are CPU time of one thread, which other load on the machine affects least.
"""

import time
from collections.abc import Callable
from statistics import median

import pytest
import torch
import torch.nn.functional as F
from churn_trainer.config import Data, Model, Optimisation, Run
from churn_trainer.data.batches import augment
from churn_trainer.data.dataset import Dataset
from churn_trainer.loop import Loop, make_fabric
from churn_trainer.members import build_members
from churn_trainer.methods import find_method
from churn_trainer.objectives import measured_logits, objective
from torch import Tensor

import churn_kernels as ck

pytestmark = pytest.mark.benchmark(
    group="trainer", disable_gc=True, timer=time.process_time, warmup=False
)

CLASSES, IMAGES, ROUNDS = 10, 2048, 15
METHODS = {1: "baseline", 2: "skl"}

Step = Callable[[], object]


def images() -> Dataset:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (IMAGES, 3, 32, 32), generator=generator).byte()
    labels = torch.arange(IMAGES) % CLASSES
    return Dataset("noise", labels, CLASSES, (3, 32, 32), pixels.__getitem__, is_image=True)


def wanted_run(models: int, batch_rows: int) -> Run:
    return Run(
        method=find_method(METHODS[models]),
        data=Data(train_rows=IMAGES // 2, crop_padding=4, flip=True),
        model=Model(name="resnet56"),
        optimisation=Optimisation(
            epochs=100, batch_rows=batch_rows, learning_rate=0.01, clip_norm=1.0, weight_decay=1e-4
        ),
    )


def bare_loss(run: Run, logits: list[Tensor], labels: Tensor) -> Tensor:
    total = torch.stack([F.cross_entropy(one, labels) for one in logits]).sum()
    if len(logits) == 1:
        return total
    log_p, log_q = (F.log_softmax(one, dim=1) for one in logits)
    divergence = ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(dim=1).mean()
    return total + run.method.beta * divergence


def bare_loop(run: Run, dataset: Dataset) -> Step:
    """The same step in plain PyTorch: the same networks on differently drawn images."""
    settings = run.optimisation
    networks = build_members([run], dataset.shape, CLASSES).networks
    optimizer = torch.optim.SGD(
        networks.parameters(),
        lr=settings.learning_rate,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
    )
    generator = torch.Generator().manual_seed(0)

    def step() -> None:
        rows = torch.randint(IMAGES, (settings.batch_rows,), generator=generator)
        draws = torch.randint(2**62, rows.shape, generator=generator)
        inputs = (augment(dataset.fetch(rows), draws, run.data).float() - 127.5) / 73.9
        loss = bare_loss(run, [network(inputs) for network in networks], dataset.labels[rows])
        optimizer.zero_grad()
        loss.backward()
        for network in networks:
            torch.nn.utils.clip_grad_norm_(network.parameters(), settings.clip_norm)
        optimizer.step()

    return step


def loss_alone(run: Run) -> Step:
    """The part of the trainer's step from the logits to their gradients, with its metrics."""
    rows = run.optimisation.batch_rows
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(run.method.members, rows, CLASSES, generator=generator).requires_grad_()
    labels = torch.randint(CLASSES, (rows,), generator=generator)
    losses = torch.zeros(1, rows)

    def step() -> None:
        logits.grad = None
        (objective(run.method, 0.5, logits, labels) / rows).backward()
        predicted = measured_logits(run.method, logits.detach())
        losses[0] = ck.regularized_cross_entropy(predicted, labels, reduction="none")

    return step


def cpu_time(step: Step) -> float:
    start = time.process_time()
    step()
    return time.process_time() - start


@pytest.mark.parametrize("models", list(METHODS))
def test_step(benchmark, request, models):
    tiny = request.config.getoption("--tiny")
    run, dataset = wanted_run(models, 4 if tiny else 128), images()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    training = Loop([run], dataset, make_fabric(), None, ())
    others = {"bare": bare_loop(run, dataset), "loss": loss_alone(run)}
    for step in (training.one_step, *others.values()):
        step()  # warm-up
    times: dict[str, list[float]] = {name: [] for name in others}

    def take_turns() -> None:
        for name, step in others.items():
            times[name].append(cpu_time(step))

    benchmark.pedantic(training.one_step, setup=take_turns, rounds=1 if tiny else ROUNDS)
    torch.set_num_threads(threads)
    medians = {name: 1e3 * median(values) for name, values in times.items()}
    benchmark.extra_info.update(models=models, rows=run.optimisation.batch_rows, ms=medians)
