"""Several processes: two ranks against one, and a study whose parent is killed."""

import fcntl
import json
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from churn_trainer.config import Model, Optimisation, Variant
from churn_trainer.loop import exact_mean
from churn_trainer.run_folder import RunFolder
from churn_trainer.settings import to_toml
from churn_trainer.train import Options, train
from small_study import local_study, small_run, small_study
from test_train import environment, rows_of

# Logits of which each is one product: the same bits whatever else is in the minibatch.
MODULE = """
import os

import torch

class Diagonal(torch.nn.Module):
    def __init__(self, shape, classes):
        super().__init__()
        self.calls = 0
        self.scale = torch.nn.Parameter(torch.linspace(0.5, 2, classes))

    def forward(self, inputs):
        self.calls += 1
        if self.calls == int(os.environ.get("DIES_AT", "0")):
            os._exit(1)
        return inputs.flatten(1)[:, 20 : 20 + len(self.scale)] * self.scale
"""


def start_two_ranks(run, tmp_path, *options, **variables):
    config = tmp_path / "run.toml"
    config.write_text(to_toml(run))
    line = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    line += ["--master-port", "0", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    line += ["-m", "churn_trainer", "train", "--config", str(config), "--devices", "2"]
    line += ["--accelerator", "cpu", "--out", str(tmp_path / "two"), *options]
    place = environment() | variables
    return subprocess.run(line, capture_output=True, text=True, env=place, check=False)


def train_on_two_ranks(run, tmp_path, *options):
    done = start_two_ranks(run, tmp_path, *options)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count(f"finished {run.id}") == 1
    two = RunFolder(tmp_path / "two" / run.id)
    assert two.metrics()["environment"]["processes"] == 2
    return two


def losses_of(folder):
    return [row["train_cross_entropy"] for row in rows_of(folder.path)]


# Two ranks ----------------------------------------------------------------------------------------


def test_two_gloo_ranks_train_to_the_metrics_of_one_process(tmp_path):
    run = small_run("skl-entropy", model=Model(name="cnn"), optimisation=Optimisation(epochs=8))
    (alone,) = train([run], tmp_path / "alone")
    two = train_on_two_ranks(run, tmp_path)
    torch.testing.assert_close(two.logits()[0], alone.logits()[0], rtol=1e-3, atol=1e-3)
    assert torch.equal(two.logits()[1], alone.logits()[1])
    for name, value in alone.metrics()["test"].items():
        assert two.metrics()["test"][name] == pytest.approx(value, abs=2e-3)
    wanted = [float(one) for one in losses_of(alone)]
    assert [float(one) for one in losses_of(two)] == pytest.approx(wanted, rel=1e-3)


def test_the_same_logits_have_the_same_loss_on_two_ranks(tmp_path, monkeypatch):
    code = tmp_path / "code"
    code.mkdir()
    (code / "diagonal_net.py").write_text(MODULE)
    monkeypatch.syspath_prepend(code)
    # Steps that change no bit of a weight, so that only the sums of the loss are left to differ;
    # the ranks' shares of a minibatch are not of one size.
    still = {"epochs": 2, "learning_rate": 1e-30, "momentum": 0.0, "reduction_mode": "exact"}
    run = small_run(
        model=Model(name="diagonal_net:Diagonal"),
        optimisation=Optimisation(batch_rows=7, **still),
    )
    (alone,) = train([run], tmp_path / "alone", Options(trust=("diagonal_net",)))
    two = train_on_two_ranks(run, tmp_path, "--trust", "diagonal_net")
    assert torch.equal(two.logits()[0], alone.logits()[0])
    assert losses_of(two) == losses_of(alone)
    assert 1 < float(losses_of(alone)[0]) < 10
    # Killed in the middle of an epoch, the ranks go on with the losses of all of them.
    options = ("--trust", "diagonal_net", "--checkpoint-seconds", "0")
    (tmp_path / "two").rename(tmp_path / "whole")
    assert start_two_ranks(run, tmp_path, *options, DIES_AT="6").returncode != 0
    assert (tmp_path / "two" / run.id / "checkpoint.pt").exists()
    assert losses_of(train_on_two_ranks(run, tmp_path, *options)) == losses_of(alone)
    monkeypatch.undo()
    sys.modules.pop("diagonal_net")


def test_a_mean_is_rounded_once_whatever_the_order():
    values = [1e8, 1.0, -1e8, 3e-9] * 1000
    assert exact_mean(values) == exact_mean(sorted(values)) == (1000 + 3e-6) / 4000
    assert sum(values) != sum(sorted(values))
    assert exact_mean([1.0, float("inf")]) == float("inf")
    assert exact_mean([1.0, float("nan")]) != exact_mean([1.0])


# A study whose parent is killed -------------------------------------------------------------------


def locked(folder):
    """Whether a process is training the run: it holds the lock as long as it lives."""
    with (folder.path / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def until(condition, process=None):
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        assert process is None or process.poll() is None
        time.sleep(0.02)


def descendants(pid):
    """The living processes that a process and its children have started."""
    children = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            state, parent, *_ = (folder / "stat").read_text().rpartition(")")[2].split()
            if state != "Z":
                children.setdefault(int(parent), []).append(int(folder.name))
    found, pending = [], [pid]
    while pending:
        started = children.get(pending.pop(), [])
        found += started
        pending += started
    return found


# A study whose workers take a minute to import what it is, before they take up their task.
SLOW = """
import sys, time
from pathlib import Path
from churn_trainer.tasks import Task
from churn_trainer.train import Options
from churn_trainer.workers import LocalWorkers
from small_study import small_run

if __name__ == "__mp_main__":
    Path(sys.argv[1]).touch()
    time.sleep(60)
if __name__ == "__main__":
    workers = LocalWorkers(2)
    for number in range(2):
        workers.start(Task(number, (small_run(),)), Path("nowhere"), Options())
    for _ in workers.wait():
        pass
"""


@pytest.mark.slow
@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT])
def test_workers_end_with_their_study_whatever_they_do(end, tmp_path):
    script, started = tmp_path / "study.py", tmp_path / "started"
    script.write_text(SLOW)
    study = subprocess.Popen([sys.executable, script, started], env=environment())
    try:
        until(started.exists, study)
        others = descendants(study.pid)
        assert len(others) >= 3  # the server and its workers
    finally:
        study.send_signal(end)
        study.wait()
    ended = time.monotonic()
    until(lambda: not set(others) & {int(path.name) for path in Path("/proc").glob("[0-9]*")})
    assert time.monotonic() - ended < 20


@pytest.mark.slow
def test_kill_9_of_a_study_ends_its_workers_and_loses_nothing(tmp_path):
    long = Optimisation(epochs=80, batch_rows=8)
    methods = [Variant.named(name) for name in ("baseline", "skl")]
    wanted = small_study(methods, runs=2, splits=1, optimisation=long, curve_points=2)
    (tmp_path / "study.json").write_text(json.dumps(wanted.to_mapping()))
    line = [sys.executable, "-m", "churn_trainer", "study", str(tmp_path / "study.json")]
    line += ["--out", str(tmp_path / "out"), "--workers", "2", "--accelerator", "cpu"]
    folders = [RunFolder(tmp_path / "out" / "runs" / run.id) for run in wanted.all_runs()]
    often = [*line, "--checkpoint-seconds", "0"]
    process = subprocess.Popen(
        often, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment()
    )
    try:
        checkpoints = tmp_path / "out" / "runs" / ".together"
        until(lambda: len(list(checkpoints.glob("*.pt"))) == 2, process)
        assert all(locked(folder) for folder in folders)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == -signal.SIGKILL
    until(lambda: not any(locked(folder) for folder in folders))
    assert not any(folder.done for folder in folders)

    done = subprocess.run(line, capture_output=True, text=True, env=environment(), check=False)
    assert done.returncode == 0, done.stderr
    assert not list(checkpoints.parent.rglob("*.pt.partial"))
    local_study(wanted, tmp_path / "whole")
    for run, folder in zip(wanted.all_runs(), folders, strict=True):
        whole = RunFolder(tmp_path / "whole" / run.id)
        assert torch.equal(folder.logits()[0], whole.logits()[0])
        assert losses_of(folder) == losses_of(whole)
