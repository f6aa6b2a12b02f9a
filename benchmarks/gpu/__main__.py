"""The GPU report: `make gpu-report`, or `python -m benchmarks.gpu FOLDER`.

Builds the library in place, runs the GPU tests, compares results with the CPU and times the losses,
within nine minutes and without a network. Writes its results to FOLDER, and otherwise only to
build/ and, by the build, next to the sources.

Exit status: 0, or 1 if a stage failed, or 2 if there is no GPU to report on.
"""

import argparse
import json
import os
import signal
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.gpu import host, stages, table
from benchmarks.gpu.stages import Deadline, Stage

# Total time in seconds: nine minutes, less startup and shutdown.
TOTAL = 510.0
BUILD = 180.0
CHECKS = 170.0  # tests, parity and churn, in parallel
TIMINGS = 200.0  # minimum that the checks leave for the timings
# A stage that watches its own deadline gets this much less, so that it ends by itself.
MARGIN = 8.0

LOG = "log.txt"
WARM = "warm.json"
LOG_CHARACTERS = 4_000_000  # of each stage
TEST_PROCESSES = 8

BUILD_TREE = host.ROOT / "build" / "gpu-report"


def environment() -> dict[str, str]:
    """Environment variables that place all caches in the build tree."""
    folders = {
        "TMPDIR": "tmp",
        "TRITON_CACHE_DIR": "triton",
        "TRITON_HOME": "triton-home",
        "TORCHINDUCTOR_CACHE_DIR": "inductor",
        "TORCH_EXTENSIONS_DIR": "torch-extensions",
        "CUDA_CACHE_PATH": "cuda",
        "QUACK_CACHE_DIR": "quack",
        "HYPOTHESIS_STORAGE_DIRECTORY": "hypothesis",
        "MPLCONFIGDIR": "matplotlib",
        "XDG_CACHE_HOME": "cache",
    }
    path = [str(host.ROOT), str(host.ROOT / "python"), os.environ.get("PYTHONPATH", "")]
    placed = {name: str(BUILD_TREE / folder) for name, folder in folders.items()}
    for folder in placed.values():
        Path(folder).mkdir(parents=True, exist_ok=True)
    return {
        **os.environ,
        **placed,
        "PYTHONPATH": os.pathsep.join(filter(None, path)),
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONUNBUFFERED": "1",
    }


def gpu_tests() -> list[str]:
    """The files with GPU tests: other files may need packages that a GPU host lacks."""
    marker = "mark." + "gpu"
    files = sorted((host.ROOT / "tests").rglob("test_*.py"))
    return [str(path.relative_to(host.ROOT)) for path in files if marker in path.read_text()]


def module(name: str, *arguments: object) -> list[str]:
    return [sys.executable, "-m", name, *map(str, arguments)]


def build_stage() -> Stage:
    return Stage("build", [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"])


def check_stages(folder: Path, seconds: float) -> list[Stage]:
    """Tests, parity, churn, and compilation ahead of the kernels to be timed."""
    options = ["-q", "--color=no", "-m", "gpu and not nightly", "-p", "no:cacheprovider"]
    options += ["--basetemp", BUILD_TREE / "pytest"]
    if find_spec("xdist"):  # most of the time is compilation, which runs on the CPU
        options += ["-n", min(TEST_PROCESSES, os.cpu_count() or 1)]
    tests = module("pytest", *options, *(gpu_tests() or ["tests"]))
    limit = ["--seconds", max(0.0, seconds - MARGIN)]
    parity, churn = folder / table.PARITY, folder / table.CHURN
    warm = BUILD_TREE / WARM
    return [
        Stage("tests", tests),
        Stage("parity", module("benchmarks.gpu.parity", *limit, parity), parity),
        Stage("churn", module("benchmarks.gpu.churn", *limit, churn), churn),
        Stage(
            "compilation ahead",
            module("benchmarks.gpu.bench", "--warm", *limit, warm),
            warm,
            required=False,
        ),
    ]


def timing_stage(folder: Path, seconds: float) -> Stage:
    limit, journal = ["--seconds", max(0.0, seconds - MARGIN)], folder / table.BENCHMARKS
    return Stage("benchmarks", module("benchmarks.gpu.bench", *limit, journal), journal)


class Report:
    """The folder of a report, written after each stage so that an early end keeps its results."""

    def __init__(self, folder: Path, facts: dict[str, Any]) -> None:
        self.folder, self._facts = folder, facts
        self.outcomes: list[dict[str, Any]] = []
        folder.mkdir(parents=True, exist_ok=True)
        for name in (*table.RECORDS, table.PAGE, LOG):
            (folder / name).unlink(
                missing_ok=True
            )  # the journal of an earlier run would be resumed

    def run(self, group: list[Stage], seconds: float, place: dict[str, str]) -> None:
        """Run stages in parallel, and add their outcomes."""
        outcomes = stages.run(group, seconds, BUILD_TREE, place, host.ROOT)
        self.outcomes += outcomes
        record = {"host": self._facts, "stages": self.outcomes}
        (self.folder / table.REPORT).write_text(json.dumps(record, indent=1) + "\n")
        (self.folder / table.PAGE).write_text(table.page(table.load(self.folder)))
        with (self.folder / LOG).open("a") as log:
            for stage, outcome in zip(group, outcomes, strict=True):
                log.write(f"==> {stage.name}: {outcome['status']}\n")
                log.write(stage.log(BUILD_TREE).read_text(errors="replace")[-LOG_CHARACTERS:])
                print(f"==> {stage.name}: {outcome['status']}, {outcome['seconds']:.0f} s")


def report(folder: Path, facts: dict[str, Any], total: float = TOTAL) -> int:
    """Run every stage; a failing stage does not stop the others."""
    folder = folder.resolve()
    found, deadline, place = Report(folder, facts), Deadline(total), environment()
    (BUILD_TREE / WARM).unlink(missing_ok=True)

    found.run([build_stage()], min(BUILD, deadline.left()), place)
    seconds = max(0.0, min(CHECKS, deadline.left() - TIMINGS))
    found.run(check_stages(folder, seconds), seconds, place)
    seconds = deadline.left()
    found.run([timing_stage(folder, seconds)], seconds, place)

    failed = stages.failed(found.outcomes)
    print(f"report: {folder / table.PAGE}")
    if failed:
        print(f"failed: {', '.join(failed)}; see {folder / LOG}", file=sys.stderr)
    return int(bool(failed))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--commit", help="the commit, for a tree without .git")
    arguments = parser.parse_args()
    missing = host.missing()
    if missing:
        print("gpu-report: nothing to report on", *missing, sep="\n  ", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # ends the stages' processes, too
    return report(arguments.folder, host.facts(arguments.commit))


if __name__ == "__main__":
    raise SystemExit(main())
