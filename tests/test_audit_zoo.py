"""Trainings of many kinds: equal runs are found equal, and what was changed in one is named."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
import zoo

import churn_kernels as ck
from churn_kernels import _ops
from churn_kernels.audit import text
from churn_kernels.audit.replay import built, find_in_step

pytestmark = pytest.mark.skipif(not _ops.LOADED, reason="the compiled library is not built")

STEPS, AT = 4, 3


@pytest.fixture(autouse=True)
def one_thread(threads):
    threads(1)


def trace(path, build, change=None):
    """The trace of a training that is changed before step `AT`."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    training = built(build, "cpu")
    with ck.audit.record(path, training.model, training.optimizer, state=training.state):
        for n in range(1, STEPS + 1):
            if change and n == AT:
                change(training)
            training.step(n)
    return ck.audit.Trace.load(path)


@pytest.mark.parametrize("name", zoo.SCRIPTS)
def test_equal_runs_are_equal(name, tmp_path):
    found = ck.audit.compare(*(trace(tmp_path / run, zoo.SCRIPTS[name]) for run in "ab"))
    assert found.difference is None, text.of_comparison(found)
    assert found.steps == STEPS + 1


@pytest.mark.parametrize("name", zoo.SCRIPTS)
def test_replays_of_a_step_are_equal(name):
    training = built(zoo.SCRIPTS[name], "cpu", before=2)
    found = find_in_step([training], 2, replays=3)
    assert found.verdict == "none", text.of_finding(found)
    assert len(found.log) > 10


WHOLE = [name for name in zoo.SCRIPTS if name != "no module"]  # in which nothing can be flipped
QUICK = {"dropout", "amp", "complex", "generator of batches", "scratch"}


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in WHOLE],
)
def test_whole_examinations(name):
    found = ck.audit.examine(zoo.SCRIPTS[name], replays=2, pairs=2, steps=2, amplify_steps=1)
    said = text.of_examination(found, name)
    assert found.verdict == "none", said
    assert all(pair.step is None for pair in found.pairs), said
    assert not found.finding.outside
    for axis in found.axes:  # threads and oneDNN may show, but nothing without them does
        allowed = {"none", "operator"} | ({"sequence"} if axis.name == "onednn" else set())
        assert axis.finding is None or axis.finding.verdict in allowed, said


# State that is not named --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "reached"),
    [
        ("ema", {"average"}),
        ("gan", {"discriminator", "optimizer_d"}),
        ("loader", {"batches"}),
        ("generator of batches", {"batches"}),
        ("list of batches", {"batches"}),
        ("mixup", {"generator"}),
        ("codistillation", {"models[1]"}),
        ("teacher", {"follower"}),
    ],
)
def test_state_that_is_not_named_is_listed(name, reached):
    training = built(zoo.SCRIPTS[name], "cpu", before=2)
    found = find_in_step([replace(training, state={})], 2, replays=3)
    assert found.verdict in ("input", "sequence")
    assert reached <= set(found.outside)
    said = text.of_finding(found)
    assert "outside of what is brought back before each replay, these change: " in said
    assert said.endswith(
        "; add them to state={name: object}, and make buffers of tensors that a model holds"
    )


CALLS = [0]


class Trainer:
    """A script as a class, whose step is one of its methods."""

    def __init__(self):
        self.training = zoo.of(zoo.mlp)("cpu")
        self.batches = (n for n in range(100))
        self.seen = 0

    def step(self, n):
        CALLS[0] += 1
        self.seen += 1
        self.training.step(next(self.batches))


@pytest.mark.parametrize("bound", [True, False])
def test_state_of_a_trainer_is_listed(bound):
    trainer = Trainer()
    step = trainer.step if bound else lambda n: trainer.step(n)
    training = replace(trainer.training, step=step)
    found = find_in_step([training], 2, replays=3)
    name = "self" if bound else "trainer"
    assert set(found.outside) == {"CALLS[0]", f"{name}.batches", f"{name}.seen"}


class Remembering(torch.nn.Linear):
    """Adds up what it has seen, where nobody looks."""

    def __init__(self):
        super().__init__(zoo.FEATURES, zoo.FEATURES)
        self.sum, self.calls = 0.0, 0

    def forward(self, x):
        self.sum = self.sum + x.detach().mean()
        self.calls += 1
        return super().forward(x) * self.sum


def test_state_that_a_model_hides_is_listed():
    training = built(zoo.of(lambda: zoo.mlp(Remembering(), width=8)), "cpu", before=2)
    found = find_in_step([training], 2, replays=3)
    assert found.verdict == "input"
    assert found.outside == ("model.2.sum", "model.2.calls")


# One change each ---------------------------------------------------------------------------------


def setting(key, value, of="optimizer", group=0):
    """Another option of an optimizer's group."""

    def change(training):
        optimizer = training.optimizer if of == "optimizer" else training.state[of]
        optimizer.param_groups[group][key] = value

    return change


def weight(of="model"):
    """One unit in the last place of one number, behind the back of PyTorch's counters."""

    def change(training):
        model = training.model if of == "model" else training.state[of]
        next(model.parameters()).data.view(torch.int32).flatten()[0] += 1

    return change


def on(of, change):
    """A change of named state."""
    return lambda training: change(training.state[of])


def missed(training):
    """The scheduler does not step after the next step."""
    training.model.missed.add(AT)


def unfrozen(training):
    training.model[0].requires_grad_(True)


def emptied(training):
    training.optimizer.state.clear()


def forgotten(training):
    """The scaled gradients of one step are twice as large."""
    training.model[0].weight.register_hook(lambda gradient: gradient * 2)


PLANTED = [
    ("mlp", setting("lr", 0.01), "learning rate 0.1 against 0.01", "before step 3"),
    ("mlp", setting("weight_decay", 0.1), "weight decay 0 against 0.1", "before step 3"),
    ("mlp", weight(), "parameters", "before step 3"),
    ("mlp", emptied, "optimizer", "before step 3"),
    ("mlp", forgotten, "gradients", "in step 3"),
    ("adam", emptied, "optimizer", "before step 3"),
    (
        "adam",
        setting("betas", (0.8, 0.9)),
        "betas (0.9, 0.999) against (0.8, 0.9)",
        "before step 3",
    ),
    ("adagrad", setting("weight_decay", 0), "weight decay 0.01 against 0", "before step 3"),
    ("dropout", lambda _: torch.manual_seed(9), "random state of PyTorch", "in step 3"),
    ("dropout", lambda t: t.model.eval(), "random state of PyTorch", "in step 3"),
    # Nothing is observed ahead of the forward pass, which changes them, too.
    ("pictures", lambda t: t.model[2].running_mean.add_(1), "buffers", "in step 3"),
    ("lstm", weight(), "parameters", "before step 3"),
    ("tied embeddings", weight(), "parameters", "before step 3"),
    ("complex", lambda t: t.model.weight.data.conj_physical_(), "parameters", "before step 3"),
    ("spectral norm", weight(), "parameters", "before step 3"),
    ("cosine", missed, "learning rate", "before step 4"),
    ("one cycle", missed, "learning rate", "before step 4"),
    ("cyclic", missed, "learning rate", "before step 4"),
    ("lambda", missed, "learning rate 0.0729", "before step 4"),
    ("plateau", missed, "learning rate", "before step 4"),
    ("sequence of schedules", missed, "learning rate", "before step 4"),
    ("ema", on("ema", lambda ema: setattr(ema, "decay", 0.5)), "ema decay 0.9 against 0.5", None),
    ("ema", on("ema", lambda ema: ema.shadow["0.bias"].data.add_(1)), "ema", "before step 3"),
    ("swa", weight("swa"), "swa", "before step 3"),
    ("swa", on("swa", lambda swa: swa.n_averaged.zero_()), "swa buffers", "before step 3"),
    ("gan", weight("discriminator"), "discriminator", "before step 3"),
    ("gan", setting("lr", 1.0, "optimizer_d"), "optimizer_d learning rate 0.01 against 1.0", None),
    ("gan", lambda t: t.state["optimizer_d"].state.clear(), "optimizer_d", "before step 3"),
    ("gan", setting("lr", 1.0), "learning rate 0.01 against 1.0", "before step 3"),
    ("amp", on("scaler", lambda s: s.update(2.0)), "scaler scale 128.0 against 2.0", None),
    ("accumulation", setting("weight_decay", 0.0), "weight decay 0.01 against 0.0", None),
    ("clipping", forgotten, "gradients", "in step 3"),
    ("lbfgs", setting("lr", 0.2), "learning rate 0.1 against 0.2", "before step 3"),
    ("lbfgs", forgotten, "gradients", "in step 3"),
    ("loader", on("batches", next), "batches position 3 against 4", "before step 3"),
    ("generator of batches", on("batches", next), "batches position 3 against 4", "before step 3"),
    ("list of batches", on("batches", next), "batches position 3 against 4", "before step 3"),
    ("mixup", on("generator", lambda g: g.manual_seed(4)), "generator", "before step 3"),
    ("codistillation", weight("partner"), "partner", "before step 3"),
    ("frozen", unfrozen, "gradients", "in step 3"),
    ("groups", setting("lr", 0.5, group=1), "learning rate of group 1 0.01 against 0.5", None),
    ("compiled", weight(), "parameters", "before step 3"),
    ("no module", lambda t: zoo.first_parameter(t).data.add_(1), "parameters", "before step 3"),
    (
        "no module",
        lambda t: zoo.first_parameter(t, "optimizer_of_scale").data.add_(1),
        "optimizer_of_scale parameters",
        "before step 3",
    ),
    ("teacher", weight("teacher"), "teacher", "before step 3"),
    ("teacher", on("teacher", lambda t: t.center.add_(1)), "teacher buffers", "before step 3"),
]


def test_steps_of_other_optimizers_are_in_the_line_of_the_next(tmp_path):
    names = list(trace(tmp_path / "a", zoo.SCRIPTS["gan"]).steps[2].hashes)
    assert names == [
        *("random state of PyTorch", "optimizer_d gradients", "optimizer_d", "discriminator"),
        *("discriminator before (2)", "random state of PyTorch (2)", "optimizer_d gradients (2)"),
        *("optimizer_d (2)", "discriminator (2)"),
        *("discriminator before (3)", "random state of PyTorch (3)"),
        *("buffers", "gradients", "optimizer", "parameters"),
    ]


@pytest.mark.parametrize(("name", "change", "what", "when"), PLANTED)
def test_what_was_changed_is_named(name, change, what, when, tmp_path):
    one, other = (
        trace(tmp_path / "a", zoo.SCRIPTS[name]),
        trace(tmp_path / "b", zoo.SCRIPTS[name], change),
    )
    found = ck.audit.compare(one, other).difference
    assert found.what.startswith(what), text.of_comparison(ck.audit.compare(one, other))
    assert found.when == (when or "before step 3")
    assert len(found.what) == len(what) or " against " in found.what
