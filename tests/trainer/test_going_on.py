"""Trainings that stop and go on: with the same bits, or a word where that cannot be."""

import dataclasses
import importlib
import math
import re
import shutil
from functools import partial

import pytest
import torch
from churn_trainer import loop, surroundings
from churn_trainer import train as training
from churn_trainer.checkpoint import Checkpoint
from churn_trainer.config import Data, Model, Optimisation
from churn_trainer.data import digits
from churn_trainer.loop import fit
from churn_trainer.run_folder import CHECKPOINT, TRACE, RunFolder
from churn_trainer.tasks import make_tasks
from churn_trainer.train import Options, train
from small_study import independent, small_run
from test_loop import Killed, runs_of, weights_of

from churn_kernels import audit

DIGITS = digits()

# Its bits follow from the number of threads: each of them sums its share of the 300,000 squares.
WIDE = """
import torch

class Net(torch.nn.Module):
    def __init__(self, shape, classes):
        super().__init__()
        self.linear = torch.nn.Linear(64, classes)
        self.wide = torch.nn.Parameter(torch.randn(300_000) / 300)
        self.dropout = torch.nn.Dropout(0.1)

    def forward(self, inputs):
        return self.dropout(self.linear(inputs.flatten(1))) * (1 + self.wide.square().sum())
"""
TRUST = ("wide_net",)


@pytest.fixture
def wide(tmp_path, monkeypatch):
    (tmp_path / "wide_net.py").write_text(WIDE)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    return small_run(model=Model(name="wide_net:Net"), optimisation=Optimisation(epochs=2))


def dies_after(monkeypatch, saves):
    """Checkpoints are saved after every step, and the training dies at one of them."""
    save, saved = Checkpoint.save, []

    def dying(self, state):
        save(self, state)
        saved.append(state["step"])
        if len(saved) == saves:
            raise Killed

    monkeypatch.setattr(Checkpoint, "save", dying)


def interrupted(runs, tmp_path, monkeypatch, saves, **options):
    """The training, killed after some steps and gone on with; and what it said of that."""
    checkpoint, told = Checkpoint(tmp_path / "state.pt", ["x"], seconds=0), []
    with monkeypatch.context() as patch:
        dies_after(patch, saves)
        with pytest.raises(Killed):
            fit(runs, DIGITS, checkpoint=checkpoint, **options)
    return fit(runs, DIGITS, checkpoint=checkpoint, on_resume=told.append, **options), told


def assert_same_bits(one, other):
    assert torch.equal(one.logits, other.logits)
    assert one.best_epochs == other.best_epochs
    states = one.members.state_dict(), other.members.state_dict()
    for first, second in zip(*(state.values() for state in states), strict=True):
        assert torch.equal(first, second)


# What decides bits --------------------------------------------------------------------------------


def test_a_training_goes_on_with_the_threads_it_began_with(wide, tmp_path, monkeypatch, threads):
    threads(2)
    other = fit([wide], DIGITS, trust=TRUST)
    threads(1)
    whole = fit([wide], DIGITS, trust=TRUST)
    assert not torch.equal(whole.logits, other.logits)  # else this would show nothing
    checkpoint, told = Checkpoint(tmp_path / "state.pt", ["x"], seconds=0), []
    with monkeypatch.context() as patch:
        dies_after(patch, 2)
        with pytest.raises(Killed):
            fit([wide], DIGITS, checkpoint=checkpoint, trust=TRUST)
    threads(2)
    resumed = fit([wide], DIGITS, checkpoint=checkpoint, trust=TRUST, on_resume=told.append)
    assert_same_bits(resumed, whole)
    assert [one.sentence for one in told] == ["after step 2; threads are 1 as before, not 2"]
    assert resumed.threads == 1
    assert torch.get_num_threads() == 2  # what comes after it computes as before


def test_what_cannot_be_brought_back_is_said_and_kept(tmp_path, monkeypatch):
    run, told = small_run(), []
    with monkeypatch.context() as patch:
        dies_after(patch, 3)
        with pytest.raises(Killed):
            train([run], tmp_path, Options(checkpoint_seconds=0))
    before = surroundings.manifest()
    manifest = {**before, "torch": "2.99.0", "processor": "NEON"}
    manifest["churn_kernels"] = {**manifest["churn_kernels"], "cpu_isa": "neon"}
    monkeypatch.setattr(surroundings, "manifest", lambda: manifest)
    (folder,) = train([run], tmp_path, tell=told.append)
    (event,) = [event for event in told if event.kind == "resumed"]
    assert event.runs == [run]
    assert event.detail == (
        "after step 3; its bits may be others from here on: "
        f"torch was {before['torch']}, is 2.99.0, processor was {before['processor']}, is NEON, "
        f"churn_kernels.cpu_isa was {before['churn_kernels']['cpu_isa']}, is neon"
    )
    assert folder.metrics()["environment"]["resumed"] == [event.detail]


def test_nothing_is_said_of_what_moves_no_bit(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    resumed, told = interrupted([small_run()], tmp_path, monkeypatch, 2)
    assert [one.sentence for one in told] == ["after step 2"]
    here = surroundings.surroundings(torch.device("cpu"), 1)
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert surroundings.surroundings(torch.device("cpu"), 1) == here
    monkeypatch.setenv("MKL_CBWR", "AVX2")
    there = surroundings.surroundings(torch.device("cpu"), 2)
    assert surroundings.differences(here, there) == [
        "processes was 1, is 2",
        "environment.MKL_CBWR was not there, is AVX2",
    ]
    assert resumed.resumed == told


def test_a_trace_has_a_line_for_each_time_its_training_went_on(
    wide, tmp_path, monkeypatch, threads
):
    threads(1)
    options = Options(trace=True, checkpoint_seconds=0, trust=TRUST)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train([wide], whole, options)
    for saves, number in ((1, 1), (1, 2)):
        threads(number)
        with monkeypatch.context() as patch:
            dies_after(patch, saves)
            with pytest.raises(Killed):
                train([wide], cut, options)
    threads(2)
    train([wide], cut, options)
    traces = [audit.Trace.load(root / wide.id / TRACE) for root in (whole, cut)]
    assert [one.after for one in traces[1].resumptions] == [1, 2]
    assert [one.manifest["threads"] for one in traces[1].resumptions] == [1, 1]
    assert traces[0].resumptions == []
    assert audit.compare(*traces).difference is None
    assert len(traces[0].steps) == len(traces[1].steps)


# AdamW, parts of a minibatch, validation rows -----------------------------------------------------

ADAMW = {"optimizer": "adamw", "learning_rate": 0.003}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"weight_decay": 0.1, "beta1": 0.7, "beta2": 0.9, "epsilon": 1e-3},
        {"amsgrad": True, "clip_norm": 0.0, "schedule": "cosine"},
    ],
)
def test_adamw_is_torch_s(settings):
    optimisation = Optimisation(epochs=2, batch_rows=30, **ADAMW, **settings)
    run = small_run(model=Model(hidden=()), optimisation=optimisation)
    trained = fit([run], DIGITS)
    source = loop.Batches([run], DIGITS, torch.device("cpu"))
    weights = loop.build_members([run], (1, 8, 8), 10).weights(0, 0)
    model = loop.build_members([run], (1, 8, 8), 10).skeleton[0].to_empty(device="cpu")
    model.load_state_dict(weights)
    bare = torch.optim.AdamW(
        model.parameters(),
        betas=(optimisation.beta1, optimisation.beta2),
        eps=optimisation.epsilon,
        weight_decay=optimisation.weight_decay,
        amsgrad=optimisation.amsgrad,
    )
    for step in range(4):
        inputs, labels, _ = source.train(step)
        bare.zero_grad()
        torch.nn.functional.cross_entropy(model(inputs[0]), labels[0]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), optimisation.clip_norm or math.inf)
        bare.param_groups[0]["lr"] = loop.learning_rate(optimisation, step, 2)
        bare.step()
    for one, other in zip(weights_of(trained, 0, 0), model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("model", [Model(hidden=(16,)), Model(hidden=(16,), dropout=0.2)])
@pytest.mark.parametrize(
    "settings",
    [
        {**ADAMW, "amsgrad": True, "weight_decay": 0.01},
        {"accumulate": 3},
        {"drop_last": True},
        {"best": "accuracy"},
    ],
)
def test_each_goes_on_with_its_bits(settings, model, tmp_path, monkeypatch):
    data = Data(train_rows=60, validation_rows=20)
    optimisation = Optimisation(epochs=3, batch_rows=15, **settings)
    runs = [
        dataclasses.replace(run, data=data, model=model, optimisation=optimisation)
        for run in runs_of("skl", 2)
    ]
    whole = fit(runs, DIGITS)
    for saves in (1, 5):  # within an epoch, and after some best one
        resumed, _ = interrupted(runs, tmp_path / str(saves), monkeypatch, saves)
        assert_same_bits(resumed, whole)


@pytest.mark.parametrize("method", ["skl-entropy", "ce-stale", "2-distillation"])
def test_parts_of_a_minibatch_add_up_to_it(method, monkeypatch):
    runs = runs_of(method, 2)
    teachers = fit([run.teacher() for run in runs], DIGITS).members if runs[0].teacher() else None
    seen, forward = [], loop.Loop._forward

    def looking(self, inputs, labels):
        seen.append(inputs.shape[1])
        return forward(self, inputs, labels)

    monkeypatch.setattr(loop.Loop, "_forward", looking)
    told = []
    for accumulate in (1, 5):
        optimisation = dataclasses.replace(runs[0].optimisation, accumulate=accumulate)
        some = [dataclasses.replace(run, optimisation=optimisation) for run in runs]
        told.append(fit(some, DIGITS, teachers=teachers, on_epoch=lambda e: e.cross_entropy))
    assert seen[:2] == [32, 28]
    assert seen[6:16] == [7, 7, 6, 6, 6, 6, 6, 6, 5, 5]
    whole, parts = told
    torch.testing.assert_close(whole.logits, parts.logits, rtol=1e-2, atol=1e-3)
    for one, other in zip(whole.history, parts.history, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=0)


def test_parts_draw_dropout_of_their_own():
    still = {"epochs": 1, "batch_rows": 60, "learning_rate": 1e-30, "momentum": 0.0}
    losses = []
    for accumulate in (1, 2):
        run = small_run(
            model=Model(hidden=(16,), dropout=0.5),
            optimisation=Optimisation(accumulate=accumulate, **still),
        )
        seen = []
        build = loop.build_members([run], (1, 8, 8), 10)
        build.part = accumulate - 1
        seen.append(build(torch.ones(1, 4, 1, 8, 8)))
        losses += seen
    assert not torch.equal(*losses)


def test_the_best_epoch_on_validation_rows_is_kept():
    data = Data(train_rows=60, validation_rows=20)
    wild = Optimisation(epochs=12, learning_rate=1.5, clip_norm=0.0, momentum=0.5)
    runs = [dataclasses.replace(run, data=data, optimisation=wild) for run in runs_of(count=2)]
    batches = loop.Batches(runs, DIGITS, torch.device("cpu"))
    assert batches.train_rows.shape[1] == 40
    for place in range(2):
        rows = [
            set(part[place].tolist())
            for part in (batches.train_rows, batches.validation_rows, batches.test_rows)
        ]
        assert len(set.union(*rows)) == sum(map(len, rows)) == 1797
    assert torch.equal(
        batches.test_rows, loop.Batches(runs_of(count=2), DIGITS, torch.device("cpu")).test_rows
    )
    for best in ("cross_entropy", "accuracy", "last"):
        told = []
        some = [
            dataclasses.replace(run, optimisation=dataclasses.replace(wild, best=best))
            for run in runs
        ]
        trained = fit(some, DIGITS, measured=range(1, 13), on_epoch=told.append)
        for place in range(2):
            if best == "last":
                assert trained.best_epochs == {}
                assert torch.equal(trained.logits[place], told[-1].logits[place])
                continue
            scores = []
            for epoch in told:
                logits, labels = (part[place] for part in epoch.validation)
                loss = torch.nn.functional.cross_entropy(logits.double(), labels)
                wrong = (logits.argmax(-1) != labels).double().mean()
                scores.append(float(loss if best == "cross_entropy" else wrong))
            kept = trained.best_epochs[place]
            assert scores[kept - 1] == pytest.approx(min(scores), rel=1e-6)
            assert kept < 12  # else the last would do
            assert torch.equal(trained.logits[place], told[kept - 1].logits[place])


def test_a_folder_says_which_epoch_was_kept(tmp_path):
    data = Data(train_rows=60, validation_rows=20)
    (folder,) = train([small_run(data=data)], tmp_path, Options(curve_points=3))
    rows = (folder.path / "curves.csv").read_text().splitlines()
    assert rows[0].endswith(",validation_accuracy,validation_cross_entropy")
    losses = [float(row.rsplit(",", 1)[1]) for row in rows[1:]]
    assert folder.metrics()["epoch"] == 1 + losses.index(min(losses))
    (plain,) = train([small_run()], tmp_path)
    assert "epoch" not in plain.metrics()
    assert "validation" not in (plain.path / "curves.csv").read_text()


# A finished run that goes on for more epochs ------------------------------------------------------


def longer(run, *epochs):
    *before, last = epochs
    optimisation = dataclasses.replace(run.optimisation, epochs=last, go_on_from=tuple(before))
    return dataclasses.replace(run, optimisation=optimisation)


@pytest.mark.parametrize("together", [1, 2])
@pytest.mark.parametrize("method", ["baseline", "2-ensemble"])
def test_a_finished_run_goes_on_to_the_bits_of_a_longer_one(method, together, tmp_path):
    runs = [independent(method, number) for number in range(together)]
    keeping = Options(keep_checkpoint=True, curve_points=2)
    train(runs, tmp_path / "runs", keeping)
    train([longer(run, 3, 4) for run in runs], tmp_path / "runs", keeping)
    told = []
    going_on = [longer(run, 3, 4, 6) for run in runs]
    folders = train(going_on, tmp_path / "runs", keeping, told.append)
    assert [event.detail for event in told if event.kind == "resumed"][-1] == "after step 8"
    whole = train([longer(run, 6) for run in runs], tmp_path / "whole", keeping)
    for one, other in zip(folders, whole, strict=True):
        assert torch.equal(one.logits()[0], other.logits()[0])
        assert len((one.path / "curves.csv").read_text().splitlines()) == 1 + 6
        assert one.predictions_along()[0].tolist() == [2, 3, 4, 6]
    train(going_on, tmp_path / "runs", tell=told.clear() or told.append)
    assert {event.kind for event in told} == {"skipped"}


def test_a_run_that_goes_on_can_be_killed_too(tmp_path, monkeypatch):
    run, options = independent("skl", 0), Options(checkpoint_seconds=0, keep_checkpoint=True)
    for root in ("whole", "cut"):
        train([run], tmp_path / root, options)
    with monkeypatch.context() as patch:
        dies_after(patch, 2)
        with pytest.raises(Killed):
            train([longer(run, 3, 5)], tmp_path / "cut", options)
    cut, whole = (
        train([longer(run, 3, 5)], tmp_path / root, options)[0] for root in ("cut", "whole")
    )
    assert torch.equal(cut.logits()[0], whole.logits()[0])


def test_what_a_run_goes_on_from_is_trained_before_it(tmp_path):
    run, told = independent("baseline", 0), []
    (folder,) = train([longer(run, 3, 5)], tmp_path, tell=told.append)
    assert [event.runs[0].id for event in told if event.kind == "finished"] == [
        run.id,
        longer(run, 3, 5).id,
    ]
    assert folder.status == "finished"


def test_a_run_without_its_checkpoint_cannot_go_on(tmp_path):
    run = independent("baseline", 0)
    train([run], tmp_path)
    message = r"checkpoint.pt must hold the end of the run that go_on_from names, got no such file"
    with pytest.raises(ValueError, match=message):
        train([longer(run, 3, 5)], tmp_path)
    assert RunFolder(tmp_path / run.id).status == "finished"


@pytest.mark.parametrize("studied", [False, True])
def test_a_stack_without_its_checkpoint_is_refused_before_anything_trains(studied, tmp_path):
    runs = [independent("baseline", number) for number in range(3)]
    train(runs[:2], tmp_path, Options(keep_checkpoint=True))
    before, told = sorted(tmp_path.rglob("*")), []
    going_on = [longer(run, 3, 5) for run in runs]
    begin = make_tasks if studied else partial(train, tell=told.append)
    message = r"no such file; pass the --runs that it was trained with, or delete .*/digits-mlp"
    with pytest.raises(ValueError, match=message):
        begin(going_on, tmp_path, Options())
    assert not told
    assert sorted(tmp_path.rglob("*")) == before
    train(going_on[:2], tmp_path, tell=told.append)
    assert sum(event.kind == "finished" for event in told) == 2


def test_a_run_goes_on_with_the_trace_of_the_one_before_it(tmp_path):
    run, options = independent("baseline", 0), Options(trace=True, keep_checkpoint=True)
    train([run], tmp_path, options)
    train([longer(run, 3, 5), longer(run, 5)], tmp_path, options)
    one, other = (
        audit.Trace.load(tmp_path / some.id / TRACE) for some in (longer(run, 3, 5), longer(run, 5))
    )
    assert audit.compare(one, other).difference is None
    assert len(one.steps) == len(other.steps) == 1 + 5 * 2


def test_what_diverged_stays_so_and_ends_at_once(tmp_path):
    wild = Optimisation(epochs=3, learning_rate=1e30, clip_norm=0.0)
    run = small_run(optimisation=wild)
    (folder,) = train([longer(run, 3, 5)], tmp_path, Options(keep_checkpoint=True))
    assert folder.status == "diverged"
    assert folder.metrics()["message"] == "its loss or gradient is not finite, epoch 1"


def test_checkpoints_stay_where_they_are_wanted(tmp_path):
    run = independent("baseline", 0)
    for keep in (True, False):
        (folder,) = train([run], tmp_path / str(keep), Options(keep_checkpoint=keep))
        assert (folder.path / "checkpoint.pt").exists() == keep
    many = [independent("baseline", number) for number in range(2)]
    train(many, tmp_path / "many", Options(keep_checkpoint=True))
    assert len(list(tmp_path.glob("many/.together/*.pt"))) == 1


@pytest.mark.parametrize("together", [1, 2])
def test_deleting_the_folders_of_runs_trains_them_from_the_start(together, tmp_path):
    runs = [independent("baseline", number) for number in range(together)]
    folders = train(runs, tmp_path, Options(keep_checkpoint=True))
    for folder in folders:
        shutil.rmtree(folder.path)
    told = []
    train(runs, tmp_path, Options(keep_checkpoint=True, trace=True), told.append)
    assert {event.kind for event in told} == {"started", "epoch", "finished"}
    assert len(audit.Trace.load(folders[0].path / TRACE).steps) == 1 + 3 * 2


def test_deleting_one_of_a_stack_restores_it_from_the_stack(tmp_path):
    runs, told = [independent("baseline", number) for number in range(2)], []
    _, folder = train(runs, tmp_path, Options(keep_checkpoint=True))
    before = folder.logits()[0]
    shutil.rmtree(folder.path)
    train(runs, tmp_path, Options(keep_checkpoint=True), told.append)
    assert "after step 6" in [event.detail for event in told if event.kind == "resumed"]
    assert torch.equal(folder.logits()[0], before)


@pytest.mark.parametrize("together", [1, 2])
def test_a_trace_that_cannot_go_on_names_the_checkpoint_to_delete(together, tmp_path, monkeypatch):
    runs = [independent("baseline", number) for number in range(together)]
    with monkeypatch.context() as patch:
        dies_after(patch, 2)
        with pytest.raises(Killed):
            train(runs, tmp_path, Options(checkpoint_seconds=0))
    checkpoint = next(tmp_path.glob("*/*.pt"))
    remedy = f"delete {checkpoint} and {checkpoint.name}.earlier to train from the start, or go on"
    with pytest.raises(ValueError, match=re.escape(remedy)):
        train(runs, tmp_path, Options(trace=True))
    checkpoint.unlink()
    checkpoint.with_name(checkpoint.name + ".earlier").unlink()
    folders = train(runs, tmp_path, Options(trace=True))
    assert len(audit.Trace.load(folders[0].path / TRACE).steps) == 1 + 3 * 2


@pytest.mark.parametrize("together", [1, 2])
def test_the_remedy_for_a_damaged_end_of_a_shorter_run_works(together, tmp_path):
    runs = [independent("baseline", number) for number in range(together)]
    folders = train(runs, tmp_path, Options(keep_checkpoint=True))
    checkpoint = next(tmp_path.glob(".together/*.pt"), folders[0].path / CHECKPOINT)
    checkpoint.write_bytes(checkpoint.read_bytes()[:-1])
    remedy = f"; delete {folders[0].path}"
    if together == 2:
        remedy += f", the folders of the 1 trained with it, and {checkpoint}"
    remedy += "; the same command then trains what go_on_from names again"
    with pytest.raises(ValueError, match=re.escape(remedy)):
        train([longer(run, 3, 5) for run in runs], tmp_path)
    for folder in folders:
        shutil.rmtree(folder.path)
    checkpoint.unlink(missing_ok=True)
    told = []
    train([longer(run, 3, 5) for run in runs], tmp_path, tell=told.append)
    assert sum(event.kind == "finished" for event in told) == 2 * together


def test_names_of_earlier_runs_stay_and_new_settings_have_their_own():
    run = small_run()
    changed = [
        small_run(data=Data(train_rows=60, validation_rows=20)),
        *(
            small_run(optimisation=Optimisation(epochs=3, **settings))
            for settings in (
                ADAMW,
                {"accumulate": 2},
                {"drop_last": True},
                {"go_on_from": (1,)},
                {"best": "last"},
            )
        ),
    ]
    assert len({one.id for one in [run, *changed]}) == 7


def test_kinds_come_after_what_they_need():
    run = independent("2-distillation", 0)
    kinds = training.kinds_of([longer(run, 3, 5), independent("skl", 0), run])
    place = {one.id: number for number, kind in enumerate(kinds) for one in kind}
    assert len(place) == sum(map(len, kinds)) == 5
    for kind in kinds:
        for one in kind:
            assert all(place[needed.id] < place[one.id] for needed in one.needs())
