"""`make mutants`: one-line faults of tests/mutants.toml, each of which some test has to see.

In a copy of the tree, build/mutants, every fault is made on its own, what it touches is compiled
for one instruction set, and the tests named with it are run. It is killed if one of them fails,
crashes or takes too long. A survivor needs a test, or an explanation why none can see it.

    python tests/mutants.py [--only TEXT] [--list]
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
TREE = ROOT / "build/mutants"
PRISTINE = TREE / "build/pristine"  # the library's build without a fault
UNFINISHED = TREE / "build/unfinished"  # there while the tree holds a fault
NOT_COPIED = (".*", "build", "dist", "out", "*.egg-info", "__pycache__", "*.so")

LIMIT = 300  # seconds for tests that take a few


class Mutant(NamedTuple):
    """One fault, and the tests that should see it."""

    file: str
    old: str
    new: str
    tests: str  # those of pytest, in the order in which they are run
    isa: str = ""  # the instruction set that it shows in; else the machine's best
    marks: str = "not nightly"  # the tests that have them alone
    explained: str = ""  # why no test can see it

    def __str__(self) -> str:
        line = (ROOT / self.file).read_text().split(self.old)[0].count("\n") + 1
        change = f"{self.old} -> {self.new or '(nothing)'}"
        return f"{self.file}:{line}: {' '.join(change.split())}"

    def applied(self) -> str:
        """The file with the fault in it."""
        text = (ROOT / self.file).read_text()
        if (count := text.count(self.old)) != 1:
            raise ValueError(
                f"tests/mutants.toml: {self.file} must hold {self.old!r} once, and has it "
                f"{count} times; write what the line says now"
            )
        return text.replace(self.old, self.new)


def load() -> list[Mutant]:
    """The mutants of the list, those of one file side by side."""
    tables = tomllib.loads((ROOT / "tests/mutants.toml").read_text())
    return [Mutant(file, **entry) for file, entries in tables.items() for entry in entries]


def run(
    *command: object, cwd: Path = TREE, limit: float | None = None, **environment: str
) -> tuple[int | None, str]:
    """Exit status, or None if it took longer than `limit` seconds, and what it wrote."""
    process = subprocess.Popen(
        list(map(str, command)),
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": f"{TREE}:{TREE}/python", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=limit)
        status = process.returncode
    except subprocess.TimeoutExpired:
        status = None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # with the processes that the tests started
            output, _ = process.communicate()
    return status, output


def copy_tree() -> None:
    """The sources as they are now; what was built stays, unless a fault was left in it."""
    if UNFINISHED.exists():
        shutil.rmtree(TREE)
    for path in TREE.glob("*"):
        if path.name != "build":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    ignored = shutil.ignore_patterns(*NOT_COPIED)
    shutil.copytree(ROOT, TREE, ignore=ignored, dirs_exist_ok=True)


class Library:
    """The compiled library of the copy."""

    def __init__(self) -> None:
        status, output = run(sys.executable, "setup.py", "--quiet", "build_ext", "--inplace")
        if status != 0:
            sys.exit(f"the tree does not build:\n{output}")
        self.folder = next(TREE.glob("build/cmake-*"))
        cache = (self.folder / "CMakeCache.txt").read_text()
        self.ninja = cache.split("CMAKE_MAKE_PROGRAM:")[1].split("\n")[0].split("=")[1]
        asks = "import torch, churn_kernels; print(torch.ops.churn_kernels.cpu_isa(''))"
        self.best = run(sys.executable, "-c", asks)[1].split()[-1]
        shutil.rmtree(PRISTINE, ignore_errors=True)
        shutil.copytree(self.folder, PRISTINE)

    def rebuild(self, isa: str) -> str:
        """Compile the fault for one instruction set, the others stay; what the compiler says."""
        targets = ["ops", "isa", "_C", f"kernels_{isa}"]
        if isa == "baseline":
            targets.append("kernels_baseline_exact")
        status, output = run(self.ninja, *targets, cwd=self.folder)
        if status != 0:
            return output
        link = [self.ninja, "-t", "commands", "-s", "libchurn_kernels.so"]
        status, output = run("sh", "-c", run(*link, cwd=self.folder)[1], cwd=self.folder)
        self.install()
        return output if status != 0 else ""

    def install(self) -> None:
        """Put what is built where Python finds it."""
        for path in self.folder.glob("*.so"):
            shutil.copy(path, TREE / "churn_kernels")

    def restore(self) -> None:
        """The build without a fault, with the times by which ninja knows it."""
        shutil.rmtree(self.folder)
        shutil.copytree(PRISTINE, self.folder)
        self.install()


def run_tests(tests: str, isa: str, marks: str, limit: float | None = None):
    """Exit status and output of tests, whatever is in the tree."""
    options = ["-x", "-q", "-p", "no:cacheprovider", "-m", marks]
    command = [sys.executable, "-m", "pytest", *options, *tests.split()]
    return run(*command, limit=limit, CHURN_CPU_ISA=isa)


def check_without_faults(mutants: list[Mutant], library: Library) -> None:
    """The tests pass in the copy as it is, or what follows means nothing."""
    ways = dict.fromkeys((mutant.isa, mutant.marks) for mutant in mutants)
    for isa, marks in ways:
        named = [mutant.tests for mutant in mutants if (mutant.isa, mutant.marks) == (isa, marks)]
        tests = " ".join(dict.fromkeys(" ".join(named).split()))
        status, output = run_tests(tests, isa or library.best, marks)
        if status != 0:
            sys.exit(f"these tests do not pass without a fault:\n{output}")
        print(f"without a fault: {output.splitlines()[-1]}", flush=True)


def verdict(mutant: Mutant, library: Library) -> str:
    """Make the fault, run its tests, and take it back."""
    place, compiled = TREE / mutant.file, mutant.file.startswith("csrc/")
    isa = mutant.isa or library.best
    UNFINISHED.touch()
    try:
        place.write_text(mutant.applied())
        if compiled and (output := library.rebuild(isa)):
            sys.exit(f"{mutant} does not compile:\n{output}")
        status, output = run_tests(mutant.tests, isa, mutant.marks, LIMIT)
    finally:
        shutil.copy2(ROOT / mutant.file, place)
        if compiled:
            library.restore()
        UNFINISHED.unlink()
    if status == pytest.ExitCode.USAGE_ERROR:
        sys.exit(f"{mutant}: {output}")
    if mutant.explained:
        return "explained" if status == 0 else "KILLED, though explained"
    return "SURVIVED" if status == 0 else "killed"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="", metavar="TEXT", help="mutants whose line holds it")
    parser.add_argument("--list", action="store_true", help="show them, and run nothing")
    arguments = parser.parse_args()
    mutants = [mutant for mutant in load() if arguments.only in str(mutant)]
    if arguments.list:
        for mutant in mutants:
            print(mutant, f"[{mutant.tests}]", mutant.explained)
        return
    copy_tree()
    library = Library()
    check_without_faults(mutants, library)
    verdicts: Counter[str] = Counter()
    for mutant in mutants:
        begin = time.monotonic()
        found = verdict(mutant, library)
        verdicts[found] += 1
        print(f"{found:9} {time.monotonic() - begin:4.0f} s  {mutant}", flush=True)
    print(", ".join(f"{count} {name}" for name, count in sorted(verdicts.items())))
    sys.exit(bool(set(verdicts) - {"killed", "explained"}))


if __name__ == "__main__":
    main()
