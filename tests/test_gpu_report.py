"""The GPU report: cases until a deadline, stages, what a host lacks, and the whole run of them."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gpu_record import HOST

from benchmarks.gpu import __main__ as report
from benchmarks.gpu import host, journal, stages
from benchmarks.gpu.journal import Case, Journal
from benchmarks.gpu.stages import BROKEN_CONTEXT, STOP, Deadline, Stage

ROOT = Path(__file__).parents[1]


def python(program, *arguments):
    return [sys.executable, "-c", program, *map(str, arguments)]


class Clock:
    """A clock that only a test moves."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


class TestJournal:
    def case(self, name, run=dict):
        return Case({"group": "a group", "peer": name}, run)

    def test_no_case_begins_after_the_deadline(self, tmp_path):
        clock = Clock()

        def slow():
            clock.now += 3.0
            return {"ms": 1.0}

        cases = [self.case(name, slow) for name in "abcd"]
        written = Journal(tmp_path / "cases.json", cases)
        assert journal.work(cases, written, Deadline(5.0, clock), "cpu") == 0
        content = json.loads((tmp_path / "cases.json").read_text())
        assert [entry["peer"] for entry in content["entries"]] == ["a", "b"]
        assert content["left_out"] == ["a group c", "a group d"]
        assert content["running"] is None

    def test_what_is_not_importable_and_what_fails_is_recorded(self, tmp_path):
        def absent():
            raise ModuleNotFoundError("No module named 'quack'")

        def full():
            raise torch.OutOfMemoryError("Tried to allocate 1 TiB")

        def wrong():
            raise AssertionError("gradient: relative error 1e-1\nmore lines")

        runs = {"absent": absent, "full": full, "wrong": wrong, "right": lambda: {"ms": 1.0}}
        cases = [self.case(name, run) for name, run in runs.items()]
        written = Journal(tmp_path / "cases.json", cases)
        assert journal.work(cases, written, Deadline(60.0), "cpu") == 0
        assert [{k: v for k, v in e.items() if k != "group"} for e in written.entries] == [
            {"peer": "absent", "absent": "No module named 'quack'"},
            {"peer": "full", "failed": "out of memory"},
            {"peer": "wrong", "failed": "AssertionError: gradient: relative error 1e-1"},
            {"peer": "right", "ms": 1.0},
        ]

    def test_a_process_goes_on_after_the_case_that_ended_the_last_one(self, tmp_path):
        path, cases = tmp_path / "cases.json", [self.case(name) for name in "abc"]
        first = Journal(path, cases)
        first.begin(cases[0])
        first.end(cases[0], {"ms": 1.0})
        first.begin(cases[1])  # and here its process dies
        second = Journal(path, cases)
        assert second.left_out == ["a group c"]
        assert journal.work(cases, second, Deadline(60.0), "cpu") == 0
        results = {e["peer"]: {*e} - {"group", "peer"} for e in second.entries}
        assert results == {"a": {"ms"}, "b": {"failed"}, "c": set()}

    def test_a_broken_context_ends_the_process_with_a_status_of_its_own(
        self, tmp_path, monkeypatch
    ):
        def illegal():
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

        monkeypatch.setattr(journal, "_context_works", lambda device: False)
        cases = [self.case("bad", illegal), self.case("good")]
        written = Journal(tmp_path / "cases.json", cases)
        assert journal.work(cases, written, Deadline(60.0), "cuda") == BROKEN_CONTEXT
        assert written.left_out == ["a group good"]

    def test_a_signal_leaves_out_the_case_it_met(self, tmp_path):
        def stopped():
            os.kill(os.getpid(), STOP)
            return {"ms": 1.0}

        cases = [self.case("a"), self.case("b", stopped), self.case("c")]
        written = Journal(tmp_path / "cases.json", cases)
        before = signal.getsignal(STOP)
        assert journal.work(cases, written, Deadline(60.0), "cpu") == 0
        assert written.left_out == ["a group b", "a group c"]
        assert signal.getsignal(STOP) is before


class TestStages:
    def run(self, tmp_path, *group, seconds=60.0):
        return stages.run(group, seconds, tmp_path / "logs", dict(os.environ), tmp_path)

    def test_a_failing_stage_is_recorded_with_its_output(self, tmp_path):
        bad, good = self.run(
            tmp_path,
            Stage("bad one", python("import sys; print('what went wrong'); sys.exit(3)")),
            Stage("good one", python("print('well')")),
        )
        assert (bad["status"], bad["exit_status"]) == ("failed", 3)
        assert "what went wrong" in bad["output"]
        assert (good["status"], good["output"]) == ("passed", "")
        assert stages.failed([bad, good]) == ["bad one"]

    def test_a_stage_ends_at_its_deadline_and_its_children_with_it(self, tmp_path):
        pid = tmp_path / "pid"
        program = (
            "import pathlib, subprocess, sys;"
            "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']);"
            "pathlib.Path(sys.argv[1]).write_text(str(child.pid)); child.wait()"
        )
        (outcome,) = self.run(tmp_path, Stage("endless", python(program, pid)), seconds=3.0)
        assert outcome["status"] == "stopped at its deadline"
        state = Path(f"/proc/{pid.read_text()}/stat")
        assert not state.exists() or state.read_text().split()[2] == "Z"

    def test_a_stage_that_keeps_a_journal_is_started_again_after_a_crash(self, tmp_path):
        path = tmp_path / "journal.json"
        program = (
            "import os, pathlib, sys; path = pathlib.Path(sys.argv[1]);"
            "lives = len(path.read_text()) if path.exists() else 0;"
            "path.write_text('x' * (lives + 1));"
            f"sys.exit({BROKEN_CONTEXT}) if lives == 0 else os.abort() if lives == 1 else None"
        )
        (outcome,) = self.run(tmp_path, Stage("crashing", python(program, path), path))
        assert (outcome["status"], path.read_text()) == ("passed", "xxx")

    def test_a_stage_that_dies_before_its_first_case_is_not_started_for_ever(self, tmp_path):
        command = python("import os; os.abort()")
        (outcome,) = self.run(tmp_path, Stage("dead", command, tmp_path / "journal.json"))
        assert outcome["status"] == "failed"

    def test_what_is_not_required_ends_with_the_others_and_fails_nothing(self, tmp_path):
        outcomes = self.run(
            tmp_path,
            Stage("short", python("pass")),
            Stage("long", python("import time; time.sleep(600)"), required=False),
        )
        assert [outcome["status"] for outcome in outcomes] == ["passed", "stopped at its deadline"]
        assert stages.failed(outcomes) == []


class TestMissing:
    def status(self, monkeypatch, capsys, tmp_path):
        """Exit status, and what is said, of a report on the host as it is."""
        monkeypatch.setattr(sys, "argv", ["gpu-report", str(tmp_path / "out")])
        status = report.main()
        assert not (tmp_path / "out").exists()
        return status, capsys.readouterr().err

    def test_torch_without_cuda(self, monkeypatch, capsys, tmp_path):
        monkeypatch.setattr(torch.version, "cuda", None)
        status, said = self.status(monkeypatch, capsys, tmp_path)
        assert status == 2
        assert f"torch {torch.__version__} of {sys.executable} is a build without CUDA" in said
        assert "PYTHON=..." in said

    def test_no_device_and_no_triton(self, monkeypatch, capsys, tmp_path):
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(host, "find_spec", lambda name: None if name == "triton" else name)
        status, said = self.status(monkeypatch, capsys, tmp_path)
        assert status == 2
        assert "sees no CUDA device: run on a host with an NVIDIA GPU" in said
        assert "has no triton" in said

    def test_no_torch(self, tmp_path):
        program = (
            "import sys; sys.modules['torch'] = None;"
            "from benchmarks.gpu.__main__ import main; sys.exit(main())"
        )
        done = subprocess.run(
            python(program, tmp_path / "out"), cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert (done.returncode, f"{sys.executable} has no torch" in done.stderr) == (2, True)
        assert not (tmp_path / "out").exists()


class TestReport:
    @pytest.fixture
    def tree(self, monkeypatch, tmp_path):
        """A build tree of the test's own, and the environment as it was."""
        monkeypatch.setattr(report, "BUILD_TREE", tmp_path / "build")
        return tmp_path / "build"

    def test_every_cache_is_in_the_build_tree(self, tree, monkeypatch):
        monkeypatch.setenv("PYTHONPATH", "/of/the/user")
        place = report.environment()
        for name in ("TMPDIR", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "XDG_CACHE_HOME"):
            assert Path(place[name]).is_relative_to(tree)
            assert Path(place[name]).is_dir()
        assert place["PYTHONPATH"].split(os.pathsep) == [
            str(ROOT),
            str(ROOT / "python"),
            "/of/the/user",
        ]

    def test_a_failing_stage_keeps_none_of_the_others_from_running(
        self, tree, monkeypatch, tmp_path
    ):
        write = "import pathlib, sys; pathlib.Path(sys.argv[1]).write_text(sys.argv[2])"
        content = json.dumps({"entries": [], "left_out": ["a case"]})
        monkeypatch.setattr(
            report, "build_stage", lambda: Stage("build", python("raise OSError('no compiler')"))
        )
        monkeypatch.setattr(
            report, "check_stages", lambda *_: [Stage("tests", python("print('1 passed')"))]
        )
        monkeypatch.setattr(
            report,
            "timing_stage",
            lambda folder, _: Stage(
                "benchmarks", python(write, folder / "benchmarks.json", content)
            ),
        )
        folder = tmp_path / "out"
        folder.mkdir()
        (folder / "parity.json").write_text("of another run")
        assert report.report(folder, HOST) == 1
        names = sorted(path.name for path in folder.iterdir())
        assert names == ["benchmarks.json", "log.txt", "report.json", "report.md"]
        assert all(re.fullmatch(r"[A-Za-z0-9._-]+", name) for name in names)
        page = (folder / "report.md").read_text()
        assert "| build | failed |" in page
        assert "OSError: no compiler" in page
        assert "| tests | passed |" in page
        assert "| benchmarks | passed |" in page
        assert "- benchmarks: 1 cases, the first a case" in page
        assert "1 passed" in (folder / "log.txt").read_text()

    def test_the_commands_of_the_stages(self, tree, tmp_path):
        tests, parities, churned, ahead = report.check_stages(tmp_path, 100.0)
        assert "gpu and not nightly" in tests.command
        assert parities.command[-2:] == ["92.0", str(tmp_path / "parity.json")]
        assert churned.command[-2:] == ["92.0", str(tmp_path / "churn.json")]
        assert "--warm" in ahead.command
        assert (tests.required, parities.required, ahead.required) == (True, True, False)
        timings = report.timing_stage(tmp_path, 100.0)
        assert timings.command[1:3] == ["-m", "benchmarks.gpu.bench"]
        assert timings.journal == tmp_path / "benchmarks.json"


@pytest.mark.parametrize(
    ("gpu", "folder"),
    [
        ("NVIDIA H200", "nvidia-h200"),
        ("NVIDIA GeForce RTX 4090 (Laptop)", "nvidia-geforce-rtx-4090-laptop"),
        ("", "unknown"),
    ],
)
def test_folder_names(gpu, folder):
    assert host.slug(gpu) == folder
