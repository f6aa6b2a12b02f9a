"""The loop: what a step does, runs together and alone, divergence, and going on from a state."""

import dataclasses
import math

import pytest
import torch
from churn_trainer import loop
from churn_trainer.checkpoint import Checkpoint
from churn_trainer.config import Data, Model, Optimisation, Seeds
from churn_trainer.data import digits
from churn_trainer.loop import fit
from churn_trainer.methods import METHODS
from churn_trainer.models import build_model
from churn_trainer.schedule import learning_rate
from small_study import small_run

from churn_kernels import codistillation_loss

DIGITS = digits()


def runs_of(method="baseline", count=3, **changes):
    return [small_run(method, seeds=Seeds(s, s, s, s, s), **changes) for s in range(count)]


def weights_of(trained, member, run):
    return list(trained.members.weights(member, run).values())


def accuracy(trained):
    return float((trained.logits.argmax(-1) == trained.labels).float().mean())


# Step sizes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({}, [0.4] * 8),
        ({"warmup_epochs": 2}, [0.1, 0.2, 0.3, 0.4, 0.4, 0.4, 0.4, 0.4]),
        (
            {"schedule": "step", "milestones": (1, 3), "decay": 0.5},
            [0.4, 0.4, 0.2, 0.2, 0.2, 0.2, 0.1, 0.1],
        ),
        (
            {"schedule": "cosine", "warmup_epochs": 1},
            [0.2, 0.4, *(0.2 * (1 + math.cos(math.pi * t / 6)) for t in range(6))],
        ),
    ],
)
def test_step_sizes_follow_their_schedule(settings, wanted):
    settings = Optimisation(epochs=4, learning_rate=0.4, **settings)
    assert [learning_rate(settings, step, 2) for step in range(8)] == pytest.approx(wanted)


@pytest.mark.parametrize(
    "settings",
    [
        {"momentum": 0.0},
        {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1, "clip_norm": 0.0},
        {"momentum": 0.5, "clip_norm": 0.3, "schedule": "cosine"},
    ],
)
def test_a_training_is_sgd_as_it_is_written(settings):
    optimisation = Optimisation(epochs=2, batch_rows=30, learning_rate=0.1, **settings)
    run = small_run(model=Model(hidden=()), optimisation=optimisation)
    trained = fit([run], DIGITS)
    source = loop.Batches([run], DIGITS, torch.device("cpu"))
    model = build_model(run.model, (1, 8, 8), 10)
    model.load_state_dict(loop.build_members([run], (1, 8, 8), 10).weights(0, 0))
    velocity = [torch.zeros_like(p) for p in model.parameters()]
    for step in range(4):
        inputs, labels, _ = source.train(step)
        loss = torch.nn.functional.cross_entropy(model(inputs[0]), labels[0])
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        norm = torch.cat([g.flatten() for g in gradients]).norm()
        limit = optimisation.clip_norm or math.inf
        rate, mu = learning_rate(optimisation, step, 2), optimisation.momentum
        with torch.no_grad():
            for p, v, g in zip(model.parameters(), velocity, gradients, strict=True):
                g = g * min(1.0, limit / float(norm)) + optimisation.weight_decay * p
                v.mul_(mu).add_(g)
                p.sub_(rate * (g + mu * v if optimisation.nesterov else v))
    for one, other in zip(weights_of(trained, 0, 0), model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


# Many runs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["baseline", "skl-entropy", "ce-stale", "average", "2-ensemble"])
def test_runs_trained_together_are_each_run_trained_alone(method):
    runs = runs_of(method)
    together = fit(runs, DIGITS)
    assert together.logits.shape == (3, 1737, 10)
    alone = fit(runs[1:2], DIGITS)
    for member in range(runs[0].method.members):
        for many, one in zip(
            weights_of(together, member, 1), weights_of(alone, member, 0), strict=True
        ):
            torch.testing.assert_close(many, one, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(together.logits[1], alone.logits[0], rtol=1e-2, atol=1e-3)
    assert torch.equal(together.labels[1], alone.labels[0])


def test_members_share_minibatches_and_start_apart():
    uncoupled = dataclasses.replace(METHODS["2-ensemble"], measured="member")
    pair = fit([small_run(method=uncoupled.name)], DIGITS)
    single = fit([small_run()], DIGITS)
    for two, one in zip(weights_of(pair, 0, 0), weights_of(single, 0, 0), strict=True):
        torch.testing.assert_close(two, one, rtol=1e-3, atol=1e-5)
    assert not torch.equal(weights_of(pair, 0, 0)[0], weights_of(pair, 1, 0)[0])


def test_a_student_learns_from_teachers_that_stay_as_they_are():
    runs = runs_of("2-distillation", 2)
    teachers = fit([run.teacher() for run in runs], DIGITS).members
    before = [weight.clone() for weight in teachers.state_dict().values()]
    plain = fit(runs_of("baseline", 2), DIGITS)
    student = fit(runs, DIGITS, teachers=teachers)
    assert all(
        torch.equal(old, new)
        for old, new in zip(before, teachers.state_dict().values(), strict=True)
    )
    assert not torch.equal(student.logits, plain.logits)
    all_teachers = [dataclasses.replace(run.method, distillation=1.0) for run in runs]
    pupils = [dataclasses.replace(r, method=m) for r, m in zip(runs, all_teachers, strict=True)]
    pupil = fit(pupils, DIGITS, teachers=teachers)
    assert not torch.equal(pupil.logits, student.logits)


def test_networks_with_dropout_train_together_as_alone():
    runs = runs_of(model=Model(hidden=(16,), dropout=0.3))
    together, alone = fit(runs, DIGITS), fit(runs[2:], DIGITS)
    assert torch.equal(together.logits[2], alone.logits[0])


def test_runs_of_different_kinds_are_refused():
    with pytest.raises(
        ValueError, match="share all settings but the seeds, got 2 kinds; train each"
    ):
        fit([small_run(), small_run("skl")], DIGITS)


def test_the_loss_is_the_library_s(monkeypatch):
    calls = []

    def spy(logits, target, **options):
        calls.append((tuple(logits.shape), tuple(target.shape), options["beta"]))
        return codistillation_loss(logits, target, **options)

    monkeypatch.setattr("churn_kernels.codistillation_loss", spy)
    method = dataclasses.replace(METHODS["skl"], ramp_share=1.0)
    runs = [
        dataclasses.replace(run, method=method)
        for run in runs_of(count=4, optimisation=Optimisation(epochs=2))
    ]
    fit(runs, DIGITS)
    # 60 rows in minibatches of 32: 4 runs' rows at once, and the weight rises with each step.
    assert [call[:2] for call in calls] == [((2, 128, 10), (128,)), ((2, 112, 10), (112,))] * 2
    assert [call[2] for call in calls] == pytest.approx([0, 0.75, 1.5, 2.25])


def test_epochs_are_told_measured_and_learnt_in():
    told = []
    run = small_run(optimisation=Optimisation(epochs=5))
    trained = fit([run], DIGITS, measured=(2, 5), on_epoch=lambda e: told.append(e) or e.number)
    assert [epoch.number for epoch in told] == trained.history == [1, 2, 3, 4, 5]
    losses = [float(epoch.cross_entropy) for epoch in told]
    assert losses == sorted(losses, reverse=True)
    assert losses[0] < 1.2 * math.log(10) + 1
    assert [epoch.number for epoch in told if epoch.logits is not None] == [2, 5]
    assert torch.equal(told[-1].logits, trained.logits)
    assert accuracy(trained) > 0.2  # chance is 0.1


def test_each_seed_changes_what_it_is_for_and_all_the_same_change_nothing():
    noise = torch.randint(256, (80, 3, 12, 12), generator=torch.Generator().manual_seed(1)).byte()
    labels = (noise.float().mean(dim=(1, 2, 3)) > 127.5).long()
    dataset = loop.Dataset("noise", labels, 2, (3, 12, 12), noise.__getitem__, is_image=True)

    def trained(**seeds):
        run = small_run(
            data=Data(train_rows=40, crop_padding=2, flip=True),
            model=Model(name="cnn", dropout=0.2),
            optimisation=Optimisation(epochs=1),
            seeds=Seeds(**seeds),
        )
        return fit([run], dataset).logits

    base = trained()
    assert torch.equal(trained(), base)
    for name in ("split", "initialisation", "order", "augmentation", "dropout"):
        assert not torch.equal(trained(**{name: 1}), base), name


# Divergence ---------------------------------------------------------------------------------------


def test_a_run_that_diverges_is_named_and_the_others_go_on(monkeypatch):
    build = loop.build_members

    def broken(*arguments, **options):
        members = build(*arguments, **options)
        with torch.no_grad():
            members.stacked[0][1] = math.inf
        return members

    runs = runs_of()
    whole = fit(runs, DIGITS)
    monkeypatch.setattr(loop, "build_members", broken)
    told = []
    trained = fit(runs, DIGITS, on_epoch=told.append)
    assert trained.diverged == {1: "its loss or gradient is not finite, epoch 1"}
    assert told[0].diverged == trained.diverged
    assert len(told) == 3
    for place in (0, 2):
        assert torch.equal(trained.logits[place], whole.logits[place])


def test_a_training_whose_runs_have_all_diverged_stops():
    optimisation = Optimisation(epochs=50, learning_rate=1e30, clip_norm=0.0)
    trained = fit(runs_of(count=2, optimisation=optimisation), DIGITS, on_epoch=lambda e: e.number)
    assert set(trained.diverged) == {0, 1}
    assert trained.history[-1] < 10


def test_a_model_that_predicts_one_class_has_collapsed(monkeypatch):
    optimisation = Optimisation(epochs=4, learning_rate=1e-9)
    build = loop.build_members

    def constant(*arguments, **options):
        members = build(*arguments, **options)
        with torch.no_grad():
            weights = {name: 0 * value for name, value in members.weights(0, 0).items()}
            bias = list(weights)[-1]
            weights[bias][7] = 1
            members.load_weights(0, 0, weights)
        return members

    monkeypatch.setattr(loop, "build_members", constant)
    trained = fit([small_run(optimisation=optimisation)], DIGITS, measured=(1, 2, 3, 4))
    assert trained.diverged == {0: "it predicts class 7 for every test row, epoch 3"}


# Going on -----------------------------------------------------------------------------------------


class Killed(BaseException):
    """Ends a training in the middle."""


@pytest.mark.parametrize("method", ["skl", "ce-stale"])
@pytest.mark.parametrize("after", [1, 2, 3, 5])
def test_a_training_that_goes_on_ends_with_the_same_bits(method, after, tmp_path, monkeypatch):
    runs = runs_of(method, 2)
    method = dataclasses.replace(runs[0].method, stale_steps=3 * (method == "ce-stale"))
    runs = [dataclasses.replace(run, method=method) for run in runs]
    whole = fit(runs, DIGITS, on_epoch=lambda e: e.cross_entropy.tolist())
    checkpoint = Checkpoint(tmp_path / "state.pt", ["x"], seconds=0)
    save = checkpoint.save
    saved = []

    def save_and_die(state):
        save(state)
        saved.append(state["step"])
        if len(saved) == after:
            raise Killed

    monkeypatch.setattr(checkpoint, "save", save_and_die)
    with pytest.raises(Killed):
        fit(runs, DIGITS, checkpoint=checkpoint, on_epoch=lambda e: e.cross_entropy.tolist())
    again = Checkpoint(tmp_path / "state.pt", ["x"], seconds=math.inf)
    resumed = fit(runs, DIGITS, checkpoint=again, on_epoch=lambda e: e.cross_entropy.tolist())
    assert saved[-1] == after
    assert torch.equal(resumed.logits, whole.logits)
    assert resumed.history == whole.history
    for one, other in zip(
        resumed.members.state_dict().values(), whole.members.state_dict().values(), strict=True
    ):
        assert torch.equal(one, other)


def test_batch_norm_and_dropout_go_on_with_the_same_bits(tmp_path):
    noise = torch.randint(256, (40, 3, 16, 16), generator=torch.Generator().manual_seed(1)).byte()
    dataset = loop.Dataset(
        "noise", torch.arange(40) % 2, 2, (3, 16, 16), noise.__getitem__, is_image=True
    )
    run = small_run(
        data=Data(train_rows=20, flip=True),
        model=Model(name="resnet32"),
        optimisation=Optimisation(epochs=2, batch_rows=10),
    )
    whole = fit([run], dataset)
    checkpoint = Checkpoint(tmp_path / "state.pt", ["x"], seconds=0)
    steps = []

    def die(_):
        steps.append(1)
        raise Killed

    with pytest.raises(Killed):
        fit([run], dataset, checkpoint=checkpoint, on_epoch=die)
    assert checkpoint.load()["step"] == 1
    assert torch.equal(fit([run], dataset, checkpoint=checkpoint).logits, whole.logits)


def test_losses_are_computed_in_the_run_s_mode(monkeypatch):
    modes = []

    def spy(*arguments, mode, **options):
        modes.append(mode)
        return codistillation_loss(*arguments, mode=mode, **options)

    monkeypatch.setattr("churn_kernels.codistillation_loss", spy)
    exact = small_run("skl", optimisation=Optimisation(epochs=1, reduction_mode="exact"))
    fit([exact], DIGITS)
    fit([small_run("skl", optimisation=Optimisation(epochs=1))], DIGITS)
    assert modes == ["exact"] * 2 + [None] * 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there_is_explained():
    message = "accelerator must be one of this machine's, with 1 devices, got 'cuda': .*; cpu is al"
    with pytest.raises(ValueError, match=message):
        loop.make_fabric(accelerator="cuda")


def test_lower_precision_trains_too():
    run = small_run(optimisation=Optimisation(epochs=20, precision="bf16-mixed"))
    trained = fit([run], DIGITS)
    full = fit([small_run(optimisation=Optimisation(epochs=20))], DIGITS)
    assert trained.logits.dtype == torch.float32
    assert not torch.equal(trained.logits, full.logits)
    assert accuracy(trained) == pytest.approx(accuracy(full), abs=0.05)
    assert accuracy(full) > 0.6
