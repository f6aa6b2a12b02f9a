"""Many runs as tasks: order, failures, kills, and the workers that do them."""

import importlib
import multiprocessing
import os
import sys
from dataclasses import replace
from multiprocessing import forkserver
from types import SimpleNamespace

import pytest
import torch
from churn_trainer import workers as workers_module
from churn_trainer.config import Model, Optimisation, Seeds
from churn_trainer.run_folder import RunFolder, read_runs
from churn_trainer.tasks import Ended, Task, make_tasks, train_all
from churn_trainer.train import Event, Options, train
from churn_trainer.workers import (
    VISIBLE,
    WAITING,
    LocalWorkers,
    RayWorkers,
    _Working,
    visible_gpus,
)
from small_study import SMALL, small_run

# A network that the test's own workers die of, once for each file that `killed` names.
MODULE = """
import os, pathlib, signal
import torch

class Net(torch.nn.Module):
    def __init__(self, shape, classes, killed="", starved=False):
        super().__init__()
        self.layer = torch.nn.Linear(64, classes)
        self.norm = torch.nn.BatchNorm1d(classes)  # not to be stacked: each run is a task
        self.killed, self.starved, self.steps = killed, starved, 0

    def forward(self, inputs):
        if self.training and len(inputs) > 20:  # a step, not the trainer's check on zeros
            self.steps += 1
            if self.killed and self.steps == 3 and not os.path.exists(self.killed):
                pathlib.Path(self.killed).touch()
                if self.starved:
                    torch.empty(1 << 60)
                os.kill(os.getpid(), signal.SIGKILL)
        return self.norm(self.layer(inputs.flatten(1)))
"""


@pytest.fixture
def deadly(tmp_path, monkeypatch):
    """Makes runs of the network above; `killed` says by which run's worker it is killed."""
    code = tmp_path / "code"
    code.mkdir()
    (code / "deadly_net.py").write_text(MODULE)
    monkeypatch.syspath_prepend(code)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
    importlib.invalidate_caches()

    def make(count, killed=()):
        runs = []
        for number in range(count):
            options = {"killed": str(tmp_path / f"killed-{number}")} if number in killed else {}
            model = Model(name="deadly_net:Net", options=options)
            runs.append(small_run(model=model, seeds=Seeds(initialisation=number)))
        return runs

    yield make
    sys.modules.pop("deadly_net", None)


class Recorded:
    """Workers that do tasks one by one in this process, as they are told to by `outcomes`."""

    count = 1

    def __init__(self, root=None, outcomes=()):
        self.root, self.outcomes = root, list(outcomes)
        self.order, self.stopped, self.current = [], 0, None

    def start(self, task, root, options):
        assert self.current is None
        self.current = task
        self.order.append(task.runs[0].method.name)

    def wait(self):
        task, self.current = self.current, None
        ended = self.outcomes.pop(0) if self.outcomes else Ended()
        if isinstance(ended, BaseException):
            raise ended
        if ended.failure is None and self.root is not None:
            train(task.runs, self.root)
        yield task, Event("epoch", task.runs, 1)
        yield task, ended

    def stop(self):
        self.stopped += 1


def train_recorded(names, root, outcomes=(), **options):
    workers, told = Recorded(outcomes=outcomes), []
    runs = [small_run(name) for name in names]
    failed = train_all(runs, root, workers, Options(), tell=told.append, **options)
    assert workers.stopped == 1
    return workers, {run.method.name: failed.get(run.id) for run in runs}, told


# What starts when ---------------------------------------------------------------------------------


def test_the_longest_comes_first_and_teachers_before_their_students(tmp_path):
    names = ("baseline", "skl", "self-distillation", "ensemble", "distillation")
    workers, failed, _ = train_recorded(names, tmp_path)
    # ensemble (10, and 13/3 after it), distillation, baseline (1, and 4/3 after it), skl (2) ...
    assert workers.order == [
        "ensemble",
        "distillation",
        "baseline",
        "skl",
        "self-distillation",
    ] or (workers.order == ["ensemble", "distillation", "baseline", "self-distillation", "skl"])
    assert not any(failed.values())


def test_a_stack_is_a_task_and_so_is_each_run_that_cannot_be_stacked(tmp_path):
    seeds = [Seeds(initialisation=number) for number in range(3)]
    stacked = [small_run(seeds=one) for one in seeds]
    alone = [small_run(model=Model(hidden=(4,), dropout=0.5), seeds=one) for one in seeds]
    tasks = make_tasks([*stacked, *alone], tmp_path, Options())
    assert [len(task.runs) for task in tasks] == [3, 1, 1, 1]
    assert tasks[0].runs == tuple(stacked)


def test_repetitions_take_turns_with_the_numbers_of_threads(tmp_path):
    runs = [small_run(repeat=number) for number in range(4)]
    tasks = make_tasks(runs, tmp_path, Options(), threads=(1, 2, 5))
    assert [task.threads for task in tasks] == [1, 2, 5, 1]


def test_what_a_run_goes_on_from_comes_before_it_and_leaves_its_checkpoint(tmp_path, threads):
    threads(1)
    runs = [
        small_run(seeds=Seeds(order=number), optimisation=Optimisation(epochs=5, go_on_from=(1, 3)))
        for number in (0, 1)
    ]
    tasks = make_tasks(runs, tmp_path, Options())
    assert [task.runs[0].optimisation.epochs for task in tasks] == [1, 3, 5]
    assert [task.keep for task in tasks] == [True, True, False]
    assert [task.after for task in tasks] == [set(), {0}, {0, 1}]
    assert [task.cost for task in tasks] == [2, 4, 4]
    for task in tasks:
        task.train(tmp_path, Options(), lambda event: None)
    assert all(RunFolder(tmp_path / run.id).status == "finished" for run in runs)


def test_finished_runs_are_no_task(tmp_path):
    runs = [small_run("baseline"), small_run("self-distillation")]
    train(runs[:1], tmp_path)
    (task,) = make_tasks(runs, tmp_path, Options())
    assert task.runs == (runs[1],)
    assert task.after == frozenset()
    train(runs, tmp_path)
    told = []
    assert train_all(runs, tmp_path, Recorded(), Options(), tell=told.append) == {}
    assert [(event.kind, list(event.runs)) for event in told] == [("skipped", runs)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"retries": -1}, "retries must be at least 0, got -1; 0 gives up after the first failure"),
        ({"threads": (1, 0)}, "threads must be at least 1, got 0; 1 computes with one thread"),
    ],
)
def test_wrong_options_are_refused(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        train_all([small_run()], tmp_path, Recorded(), Options(), **options)


# What fails ---------------------------------------------------------------------------------------


def details(told):
    return [(event.runs[0].method.name, event.detail) for event in told if event.kind == "failed"]


def test_a_failed_task_is_tried_again_after_those_that_wait(tmp_path):
    workers, failed, told = train_recorded(("l1", "baseline"), tmp_path, [Ended("it broke")])
    assert workers.order == ["l1", "baseline", "l1"]
    assert not any(failed.values())
    assert details(told) == [("l1", "it broke; attempt 1 of 3, again later")]


def test_a_task_that_keeps_failing_is_given_up_and_the_others_are_not(tmp_path):
    outcomes = [Ended("one"), Ended(), Ended("two")]
    workers, failed, told = train_recorded(("l1", "baseline"), tmp_path, outcomes, retries=1)
    assert workers.order == ["l1", "baseline", "l1"]
    assert failed == {"l1": "two", "baseline": None}
    assert details(told)[-1] == ("l1", "two; given up")


def test_what_another_attempt_cannot_mend_gets_none(tmp_path):
    workers, failed, _ = train_recorded(
        ("l1", "baseline"), tmp_path, [Ended("wrong", again=False)], retries=5
    )
    assert workers.order == ["l1", "baseline"]
    assert failed["l1"] == "wrong"


def test_students_of_failed_teachers_are_given_up(tmp_path):
    workers, failed, _ = train_recorded(
        ("self-distillation", "skl"), tmp_path, [Ended("broke")], retries=0
    )
    assert workers.order == ["baseline", "skl"]
    assert failed == {"self-distillation": "a run that it needs failed", "skl": None}


def test_an_interruption_stops_the_workers(tmp_path):
    workers = Recorded(outcomes=[KeyboardInterrupt()])
    with pytest.raises(KeyboardInterrupt):
        train_all([small_run()], tmp_path, workers, Options())
    assert workers.stopped == 1


@pytest.mark.parametrize(
    ("error", "failure", "again"),
    [
        (ValueError("no such model"), "no such model", False),
        (OSError("disk full"), "disk full", True),
        (RuntimeError("out of memory"), "RuntimeError: out of memory", True),
    ],
)
def test_what_a_training_raises_becomes_a_failure(error, failure, again, monkeypatch, tmp_path):
    def fail(*_):
        raise error

    monkeypatch.setattr(Task, "train", fail)
    ended = workers_module._attempt(Task(0, (small_run(),)), tmp_path, Options(), print)
    assert ended == Ended(failure, again)


# Processes of this machine ------------------------------------------------------------------------


def test_a_killed_worker_takes_nothing_with_it(deadly, tmp_path, threads):
    threads(1)  # as many as a worker's
    runs = deadly(4, killed=(1,))
    root, told = tmp_path / "runs", []
    options = Options(checkpoint_seconds=0, trust=("deadly_net",))
    assert train_all(runs, root, LocalWorkers(2), options, tell=told.append) == {}
    assert (tmp_path / "killed-1").exists()
    assert [(event.runs[0], event.detail) for event in told if event.kind == "failed"] == [
        (
            runs[1],
            "its process was killed by SIGKILL, which is what a system does without memory; "
            "attempt 1 of 3, again later",
        )
    ]
    assert {folder.run().id for folder in read_runs(root)} == {run.id for run in runs}
    # The killed run has gone on from its checkpoint: the bits are those of one never killed.
    whole = replace(runs[1], model=replace(runs[1].model, options={}))
    (folder,) = train([whole], tmp_path / "whole", options)
    killed = RunFolder(root / runs[1].id)
    assert torch.equal(killed.logits()[0], folder.logits()[0])


def test_a_worker_without_memory_is_tried_again(deadly, tmp_path):
    starved, other = deadly(2, killed=(0,))
    options = {**starved.model.options, "starved": True}
    starved, told = replace(starved, model=replace(starved.model, options=options)), []
    failed = train_all(
        [starved, other],
        tmp_path,
        LocalWorkers(1),
        Options(trust=("deadly_net",)),
        tell=told.append,
    )
    assert failed == {}
    ((run, detail),) = [(event.runs[0], event.detail) for event in told if event.kind == "failed"]
    assert run == starved
    assert "can't allocate memory" in detail
    assert detail.endswith("; attempt 1 of 3, again later")


@pytest.mark.parametrize("part", [b"", b"\x00", b"\x00\x00\x01\x00half"])
def test_a_worker_that_dies_in_the_middle_of_a_message_takes_nothing_with_it(part):
    workers, task = LocalWorkers(1), Task(0, (small_run(),))
    ours, theirs = multiprocessing.Pipe(duplex=False)
    os.write(theirs.fileno(), part)
    theirs.close()
    process = SimpleNamespace(join=lambda: None, exitcode=-11)
    workers._running[ours] = _Working(task, process, None)
    ((told, ended),) = workers.wait()
    assert told == task
    assert ended == Ended("its process was killed by signal 11 (Segmentation fault)")
    assert not workers._running


def test_a_run_whose_every_attempt_fails_is_given_up_alone(deadly, tmp_path):
    runs = deadly(3, killed=(0,))
    nowhere = str(tmp_path / "no" / "folder")  # its forward pass raises
    runs[0] = replace(runs[0], model=replace(runs[0].model, options={"killed": nowhere}))
    root, options = tmp_path / "runs", Options(trust=("deadly_net",))
    failed = train_all(runs, root, LocalWorkers(1), options, retries=1)
    assert list(failed) == [runs[0].id]
    assert "No such file" in failed[runs[0].id]
    assert len(read_runs(root)) == 2


def test_a_stopped_pool_leaves_no_process(tmp_path):
    endless = small_run(optimisation=Optimisation(epochs=10**6))
    workers = LocalWorkers(1)
    workers.start(Task(0, (endless,)), tmp_path, Options())
    ((_, event),) = workers.wait()
    assert event.kind == "started"
    ((_, process, _),) = workers._running.values()
    workers.stop()
    assert not process.is_alive()
    assert not RunFolder(tmp_path / endless.id).done


class Looking(Task):
    """A task that says what its process is."""

    def train(self, root, options, tell):
        seen = [os.environ.get(name) for name in (VISIBLE, WAITING)]
        tell(Event("seen", self.runs, detail=" ".join(map(str, seen))))


def seen_by(workers, count, root, accelerator):
    """What `count` tasks see that are started at once, and the GPUs they were given."""
    for number in range(count):
        workers.start(Looking(number, (small_run(),)), root, Options(accelerator=accelerator))
    given = [working.gpu for working in workers._running.values()]
    seen = {}
    while workers._running:
        for task, told in workers.wait():
            assert isinstance(told, Event) or told == Ended()
            if isinstance(told, Event):
                seen[task.number] = told.detail
    return [seen[number] for number in range(count)], given


def test_each_process_sees_a_gpu_of_its_own_in_turn(tmp_path, monkeypatch):
    monkeypatch.delenv(WAITING, raising=False)
    monkeypatch.setenv(VISIBLE, "7")
    forkserver._forkserver._stop()  # what another test started has that test's environment
    seen, given = seen_by(LocalWorkers(3, ("7", "GPU-1b")), 3, tmp_path, "auto")
    assert given == ["7", "GPU-1b", "7"]
    # Nor does a thread without work keep a core that another process needs.
    assert seen == [f"{gpu} PASSIVE" for gpu in given]
    assert WAITING not in os.environ
    assert seen_by(LocalWorkers(1, ()), 1, tmp_path, "auto")[1] == [None]
    assert seen_by(LocalWorkers(1, ("7",)), 1, tmp_path, "cpu")[1] == [None]


@pytest.mark.parametrize(
    ("named", "gpus"),
    [(None, ["0", "1"]), ("5,GPU-1b,3", ["5", "GPU-1b"]), ("4", ["4"])],
)
def test_gpus_are_those_that_this_process_may_use(named, gpus, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2 if named != "4" else 1)
    monkeypatch.delenv(VISIBLE, raising=False)
    if named is not None:
        monkeypatch.setenv(VISIBLE, named)
    assert visible_gpus() == gpus


def test_the_least_used_gpu_is_next():
    workers = LocalWorkers(3, ("0", "1"))
    working = [_Working(Task(0, (small_run(),)), None, gpu) for gpu in ("0", "1", "1")]
    workers._running = dict(enumerate(working))
    assert workers._least_used_gpu() == "0"


def test_numbers_of_workers_are_checked(tmp_path):
    with pytest.raises(ValueError, match="workers must be at least 1, got 0; leave it out for all"):
        LocalWorkers(0)


# Ray ----------------------------------------------------------------------------------------------


def test_without_ray_the_way_to_it_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r"ray must be installed .* pip install 'churn-kernels\[r"):
        RayWorkers("local")


def test_ray_s_number_of_workers_is_checked(tmp_path):
    pytest.importorskip("ray")
    with pytest.raises(ValueError, match="workers must be at least 1, got 0; leave it out for all"):
        RayWorkers("local", 0)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_a_ray_study_with_a_killed_worker_ends_complete(deadly, tmp_path):
    pytest.importorskip("ray")
    runs = deadly(8, killed=(2,))
    root, told = tmp_path / "runs", []
    options = Options(checkpoint_seconds=0, trust=("deadly_net",))
    workers = RayWorkers("local", 2)
    assert workers.count == 2
    assert train_all(runs, root, workers, options, tell=told.append) == {}
    assert (tmp_path / "killed-2").exists()
    ((run, detail),) = [(one.runs[0], one.detail) for one in told if one.kind == "failed"]
    assert run == runs[2]
    assert detail.startswith("its worker died: ")
    assert detail.endswith("; attempt 1 of 3, again later")
    assert {folder.run().id for folder in read_runs(root)} == {run.id for run in runs}
    assert sorted(one.runs[0].id for one in told if one.kind == "finished") == sorted(
        run.id for run in runs
    )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_an_address_without_a_ray_cluster_is_explained(tmp_path):
    pytest.importorskip("ray")
    with pytest.raises(
        ValueError, match=r"ray must be the address of a running cluster, got 'auto'"
    ):
        RayWorkers("auto")


def test_the_cost_is_that_of_members_and_teachers():
    seeds = (Seeds(), Seeds(order=1))
    task = Task(0, tuple(small_run("skl", seeds=one) for one in seeds))
    assert task.cost == 2 * SMALL["optimisation"].epochs * 2
    assert Task(0, (small_run("distillation"),)).cost > Task(0, (small_run(),)).cost
