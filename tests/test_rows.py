"""csrc/rows on its own: compiled without torch for the host, and for GPUs where nvcc is at hand."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
COMPILER = shutil.which("c++") or shutil.which("g++")
NVCC = shutil.which("nvcc")
FLAGS = ["-std=c++20", "-O2", "-Wall", "-Wextra", "-Werror", "-ffp-contract=off"]
CUDA_SOURCE = ROOT / "csrc/cuda/rows_check.cu"
CUDA_FLAGS = ["-std=c++20", "--fmad=false", "--expt-relaxed-constexpr", "-Werror=all-warnings"]
CUDA_FLAGS += ["-Xptxas", "-v", "-cubin"]


def machine_has(feature: str) -> bool:
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and bool(re.search(rf"\b{feature}\b", cpuinfo.read_text()))


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
@pytest.mark.parametrize("features", [[], ["avx2", "fma"]], ids=["baseline", "fma"])
def test_row_mathematics(tmp_path, features):
    if not all(map(machine_has, features)):
        pytest.skip(f"this machine has no {' '.join(features)}")
    program = tmp_path / "rows_test"
    source = ROOT / "tests/cpp/rows_test.cpp"
    flags = [f"-m{feature}" for feature in features]
    subprocess.run([COMPILER, *FLAGS, *flags, source, "-o", program], check=True)
    every = "31"  # every 31st float32; without an argument the program takes them all
    result = subprocess.run([program, every], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
    assert result.stdout.count("ok ") == 11


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
def test_superaccumulator(tmp_path):
    program = tmp_path / "superaccumulator_test"
    source = ROOT / "tests/cpp/superaccumulator_test.cpp"
    subprocess.run([COMPILER, *FLAGS, source, "-o", program], check=True)
    result = subprocess.run([program], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
    assert result.stdout.count("ok ") == 15


@pytest.mark.skipif(NVCC is None, reason="no nvcc")
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100"])
def test_rows_compile_for_gpus_without_spills(tmp_path, architecture):
    result = subprocess.run(
        [NVCC, *CUDA_FLAGS, f"-arch={architecture}", "-o", tmp_path / "rows.cubin", CUDA_SOURCE],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", result.stderr)
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", result.stderr)]
    # Stores and loads of two kernels, each in float32 and float64, and of one in float32 alone.
    assert spills == ["0"] * 10
    assert len(registers) == 5
    assert min(registers) > 16, "the kernel was optimised away"
