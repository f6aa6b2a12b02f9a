"""`make sanitize`: the library under the sanitizers of g++, and that these see planted faults.

AddressSanitizer and UndefinedBehaviorSanitizer watch the tests below, hostile arguments of the ops
among them (test_hostile_ops.py), in a copy of the package that has a library of its own.
ThreadSanitizer watches tests/cpp/threads_test.cpp. All of it lies in build/sanitize.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "build/sanitize"
TREE = FOLDER / "tree"

# Without Triton and the reference, which have no memory of their own to watch.
TESTS = [
    "tests/test_hostile_ops.py",
    "tests/test_losses.py",
    "tests/test_exact.py",
    "tests/test_exact_sum.py",
    "tests/test_audit_hash.py",
]
NOT_HERE = "triton or reference or compile or digest"
# Once more with the plainest instruction set, whose code has no intrinsics to hide behind.
BASELINE_TESTS = ["tests/test_hostile_ops.py", "tests/test_exact_sum.py"]

# A fault of tests/cpp/planted.cpp, and what the sanitizers say of it.
FAULTS = {
    "read": "heap-buffer-overflow",
    "buffer": "use-after-poison",
    "returned": "use-after-poison",
    "overflow": "signed integer overflow",
    "cast": "outside the range of representable values",
}


def tool(name: str) -> str:
    """Path of a build tool, the one beside this Python first."""
    places = [sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)]
    return shutil.which(name, path=os.pathsep.join(places)) or sys.exit(f"{name} is not installed")


def build(kind: str) -> Path:
    """The tree of CMake that holds what a kind of sanitizers watches, built."""
    tree = FOLDER / kind
    configure = [tool("cmake"), "-S", ROOT, "-B", tree, "-G", "Ninja", "--log-level=ERROR"]
    configure += [f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}", f"-DCMAKE_CXX_COMPILER={tool('g++')}"]
    configure += [f"-DCK_SANITIZE={kind}"]
    if kind == "address":
        configure += [f"-DPython_EXECUTABLE={sys.executable}"]
    # A tree configured for another torch or tool starts over.
    record, words = tree / "configured_for.txt", f"{configure} torch {version('torch')}"
    if not record.is_file() or record.read_text() != words:
        configure.append("--fresh")
    subprocess.run(configure, check=True, stdout=subprocess.DEVNULL)
    record.write_text(words)
    subprocess.run([tool("cmake"), "--build", tree], check=True, stdout=subprocess.DEVNULL)
    return tree


def copy_package(built: Path) -> None:
    """A tree with the package, the library just built and the tests."""
    shutil.rmtree(TREE, ignore_errors=True)
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "churn_kernels", TREE / "churn_kernels", ignore=ignored)
    install = [tool("cmake"), "--install", built, "--prefix", TREE / "churn_kernels"]
    subprocess.run(install, check=True, stdout=subprocess.DEVNULL)
    shutil.copytree(ROOT / "tests", TREE / "tests", ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", TREE)
    (TREE / "csrc").symlink_to(ROOT / "csrc")


def watched(*command: object, **environment: str) -> tuple[int, str, str]:
    """Run Python in the tree: exit status, what it wrote, and the sanitizers' reports."""
    for report in FOLDER.glob("report.*"):
        report.unlink()
    runtimes = ["libasan.so", "libubsan.so", "libstdc++.so"]
    preloaded = [
        subprocess.check_output([tool("g++"), f"-print-file-name={name}"], text=True).strip()
        for name in runtimes
    ]
    environment = {
        **os.environ,
        "LD_PRELOAD": ":".join(preloaded),
        # Python and torch keep memory until the end; a size too large is to raise, as without.
        "ASAN_OPTIONS": f"detect_leaks=0:allocator_may_return_null=1:log_path={FOLDER}/report",
        "UBSAN_OPTIONS": "print_stacktrace=1",  # beside the other it writes to stderr alone
        "TRITON_INTERPRET": "0",
        "PYTHONPATH": str(TREE),
        **environment,
    }
    words = [sys.executable, *map(str, command)]
    done = subprocess.run(words, cwd=TREE, env=environment, text=True, capture_output=True)
    found = [report.read_text() for report in FOLDER.glob("report.*")]
    reports = "".join(text for text in found if "ERROR" in text)  # not: too large to allocate
    return done.returncode, done.stdout + done.stderr, reports


def check_planted() -> None:
    """Every planted fault ends the process, and is named."""
    program = "import sys, torch, churn_kernels; torch.ops.churn_kernels.plant(sys.argv[1])"
    status, output, reports = watched("-c", program, "none")
    if status != 0 or reports:
        sys.exit(f"the library does not run under the sanitizers:\n{output}\n{reports}")
    for fault, message in FAULTS.items():
        status, output, reports = watched("-c", program, fault)
        if status == 0 or message not in output + reports:
            sys.exit(f"the planted fault {fault!r} was not seen:\n{output}\n{reports}")


def check_library(tests: list[str], **environment: str) -> None:
    """The tests pass, and the sanitizers say nothing."""
    options = ["-q", "-s", "-x", "-n", "2", "-p", "no:cacheprovider", "-m", "not slow"]
    options += ["-k", f"not ({NOT_HERE})"]
    status, output, reports = watched("-m", "pytest", *options, *tests, **environment)
    if status != 0 or reports:
        sys.exit(f"{output}\n{reports}")
    print(output.splitlines()[-1], *environment.values(), flush=True)


def check_threads(tree: Path) -> None:
    """The planted race is seen, and there is no other."""
    planted = subprocess.run([tree / "threads_test", "race"], text=True, capture_output=True)
    if planted.returncode == 0 or "data race" not in planted.stderr:
        sys.exit(f"the planted race was not seen:\n{planted.stderr}")
    done = subprocess.run([tree / "threads_test"], text=True, capture_output=True)
    if done.returncode != 0:
        sys.exit(f"{done.stdout}\n{done.stderr}")


def main() -> None:
    print("==> ThreadSanitizer", flush=True)
    check_threads(build("thread"))
    print("==> AddressSanitizer, UndefinedBehaviorSanitizer", flush=True)
    copy_package(build("address"))
    check_planted()
    check_library(TESTS)
    if "x86_64" in os.uname().machine:
        check_library(BASELINE_TESTS, CHURN_CPU_ISA="baseline")
    print("sanitize: clean", flush=True)


if __name__ == "__main__":
    main()
