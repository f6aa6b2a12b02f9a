"""What the Triton kernels compile to, found without a GPU.

Nothing spills, loads are wide, sums have one order, and the numbers are those of
benchmarks/results/compiled.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

from benchmarks.compiled.cases import PAIR, cases_like
from benchmarks.compiled.table import lines_of, triton_version

triton = pytest.importorskip("triton", reason="no Triton here")

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results/compiled"
NVIDIA_GLOBS = ["sm_90/pair/*/bfloat16", "sm_80/pair/8142/bfloat16", "sm_100/pair/8142/bfloat16"]
INVARIANT_GLOBS = [f"sm_90/invariant{layout}/8142/*" for layout in ("", "_padded", "_offset")]
OTHER_GLOBS = [
    "gfx942/pair/*/bfloat16",
    "sm_90/exact/8142/*",
    "sm_90/top_k/8142/*",
    "sm_90/label_smoothing/128256/*",
]
GLOBS = [*NVIDIA_GLOBS, *INVARIANT_GLOBS, *OTHER_GLOBS]
CASES = cases_like(GLOBS)
NVIDIA_PAIRS = cases_like(NVIDIA_GLOBS)


def ids(cases):
    return [case.key(target) for target, case in cases]


every_case = pytest.mark.parametrize(("target", "case"), CASES, ids=ids(CASES))
every_nvidia_pair = pytest.mark.parametrize(("target", "case"), NVIDIA_PAIRS, ids=ids(NVIDIA_PAIRS))


def compile_into(folder):
    """Runs the command without Triton's interpreter; what it prints goes beside what it keeps."""
    command = [sys.executable, "-m", "benchmarks.compiled", "--keep", folder]
    for glob in GLOBS:
        command += ["--only", glob]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    folder.mkdir(exist_ok=True)
    (folder / "failures.txt").write_text(result.stderr)
    (folder / "tables.md").write_text(result.stdout)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """The kernels' files, below the keys of their cases; compiled once for all workers."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    found = shared / "compiled"
    with FileLock(shared / "compiled.lock"):
        if not (found / "tables.md").exists():
            compile_into(found)
    return found


@pytest.fixture(scope="session")
def tables(folder):
    """The lines that were printed, by target, kernel and case."""
    return lines_of((folder / "tables.md").read_text())


def kernels_of(tables, target, case):
    """A case's lines, by kernel."""
    found = {
        kernel: line
        for (name, kernel, label), line in tables.items()
        if (name, label) == (target, case.label)
    }
    assert found, f"{case.key(target)} did not compile"
    return found


@every_case
def test_it_compiles(folder, tables, target, case):
    found = {kernel for name, kernel, label in tables if (name, label) == (target, case.label)}
    kernels = {"count_kernel", "rows_kernel", "finish_kernel", "gradient_kernel", "scale_kernel"}
    assert found == kernels, (folder / "failures.txt").read_text()


def files_of(folder, target, case, kind):
    """A case's files of one kind, by kernel."""
    files = (folder / case.key(target)).glob(f"*.{kind}")
    found = {file.stem: file.read_text() for file in files}
    assert "rows_kernel" in found, f"{case.key(target)} did not compile"
    return found


@every_case
def test_nothing_spills_and_every_program_fits(tables, target, case):
    for kernel, line in kernels_of(tables, target, case).items():
        assert (kernel, line["stack"], line["spills"]) == (kernel, "0", "0")
        assert int(line["programs"]) >= 1, kernel


@every_case
def test_numbers_are_those_of_the_committed_tables(tables, target, case):
    committed = (RESULTS / f"{target}.md").read_text()
    made_with = triton_version(committed)
    if made_with != triton.__version__:
        pytest.skip(f"the tables are of Triton {made_with}, this is {triton.__version__}")
    lines = lines_of(committed)
    for kernel, line in kernels_of(tables, target, case).items():
        assert line == lines.get((target, kernel, case.label)), (
            f"{kernel} of {case.key(target)} changed; look at what `python -m benchmarks.compiled "
            f"--check` shows, and commit what it writes without --check"
        )


WIDE = [(target, case) for target, case in NVIDIA_PAIRS if case.classes >= 1000]
every_wide_pair = pytest.mark.parametrize(("target", "case"), WIDE, ids=ids(WIDE))


def plan_of(line):
    """Name, parts, vector and ending of a line's plan."""
    found = re.fullmatch(r"(\w+) (\d+) x \d+ by (\d+)\+?(, again)?", line["plan"])
    assert found, line["plan"]
    return found[1], int(found[2]), int(found[3]), bool(found[4])


@every_wide_pair
def test_logits_and_gradients_move_in_16_bytes_at_any_width(tables, target, case):
    lines = kernels_of(tables, target, case)
    for kernel in ("rows_kernel", "gradient_kernel"):
        name, parts, vector, _ = plan_of(lines[kernel])
        assert (name, vector) == ("resident" if case.classes < 10000 else "sweeps", 8)
        assert int(lines[kernel]["loads"]) >= case.models * parts
        assert int(lines[kernel]["stores"]) >= case.models * parts


@every_wide_pair
def test_logits_are_read_once_where_rows_are_resident(tables, target, case):
    line = kernels_of(tables, target, case)["rows_kernel"]
    name, parts, _, again = plan_of(line)
    if name != "resident":
        pytest.skip("rows are read in sweeps")
    # "again": once for the gradient, and once on the branch of rows with a class at -inf. The
    # compiler may drop a load whose value it still has.
    reads = int(line["loads"]) / (case.models * parts)
    assert 2 <= reads <= 3 if again else reads == 1


@every_wide_pair
def test_wide_tiles_keep_one_layout(folder, target, case):
    for kernel, text in files_of(folder, target, case, "ttgir").items():
        assert "convert_layout" not in text, kernel


def without_facts_about_arguments(ttgir):
    """A kernel's TTGIR without locations, and without what is known of a call's arguments."""
    text = re.sub(r"^#loc.*\n", "", ttgir, flags=re.MULTILINE)
    text = re.sub(r" loc\((?:[^()]|\([^()]*\))*\)", "", text)
    return re.sub(r" \{tt\.divisibility = \d+ : i32\}", "", text)


def test_alignment_decides_nothing_in_invariant_mode(folder):
    contiguous, *others = (case for _, case in cases_like(INVARIANT_GLOBS))
    files = files_of(folder, "sm_90", contiguous, "ttgir")
    specialised = 0
    for case in others:
        assert case.options == contiguous.options == PAIR._replace(mode=2)
        for kernel, text in files_of(folder, "sm_90", case, "ttgir").items():
            specialised += text != files[kernel]
            assert "#ttg.blocked" in text
            got = without_facts_about_arguments(text)
            assert got == without_facts_about_arguments(files[kernel]), f"{case.name}: {kernel}"
    assert specialised > 0, "all were compiled for the same arguments"


@every_nvidia_pair
def test_the_compiler_fuses_nothing(folder, target, case):
    sources = files_of(folder, target, case, "ttgir")
    fused = 0
    for kernel, text in files_of(folder, target, case, "ptx").items():
        assert not re.search(
            r"^\s*(@\S+ )?(add|sub|mul)(\.ftz)?\.f(32|64)\b", text, re.MULTILINE
        ), f"{kernel}: without .rn ptxas may contract it"
        assert ("fma.rn.f32" in text) == ("math.fma" in sources[kernel]), kernel
        fused += "fma.rn.f32" in text
    assert fused > 0, "the sums say fma"


@every_nvidia_pair
def test_float32_kernels_compute_nothing_in_float64(folder, target, case):
    for kernel, text in files_of(folder, target, case, "ptx").items():
        found = set(re.findall(r"\b[a-z.0-9]*\.f64\b", text)) - {".param.f64"}
        assert found <= {"cvt.rn.f32.f64", ".f64"}, kernel
