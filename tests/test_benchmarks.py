"""The benchmarks run, and their table says what their record holds."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SHAPES = ["1024x1000", "64x131072"]


def run(*arguments):
    return subprocess.run(
        [sys.executable, "-m", *map(str, arguments)],
        cwd=ROOT,
        check=False,
        capture_output=True,
        text=True,
    )


def case(group, seconds, **extra_info):
    stats = dict.fromkeys(["median", "min", "max"], seconds) | {"iqr": 0.0, "data": [seconds]}
    stats |= {"rounds": 1, "iterations": 1}
    return {"group": group, "name": "a name", "extra_info": extra_info, "stats": stats}


def record(ours=0.002, ours_overhead=50e-6, peak=1_000, bare=1000.0, recording=0.02, hashed=0.025):
    """Ours takes `ours` seconds at both shapes, a copy 1 ms, torch.compile 44 ms, eager 104 ms.

    The trainer's step takes 1040 ms, the bare loop's `bare`.
    """
    seconds = {"churn_kernels": ours, "copy": 0.001, "torch.compile": 0.044, "eager": 0.104}
    cases = [
        case("pair", time, shape=shape, peer=peer)
        for shape in SHAPES
        for peer, time in seconds.items()
    ]
    for peer, time in (("churn_kernels", 0.003), ("copy", 0.0005)):
        cases.append(case("variants", time, shape="1024x8142", variant="bfloat16", peer=peer))
    for peer, time in (("churn_kernels", ours_overhead), ("F.cross_entropy", 25e-6)):
        cases.append(case("overhead", time, shape="8x10", peer=peer))
    for peer, time in (("churn_kernels", 0.003), ("torch.sum", 0.001), ("copy", 0.002)):
        cases.append(case("exact sum", time, shape="1000", peer=peer))
    for peer, time in (("churn_kernels", hashed), ("copy", 0.02)):
        cases.append(case("hash", time, shape="200,000,000 uint8", peer=peer))
    for peer, time in (("recording", recording), ("step", 2.0)):
        cases.append(case("recording", time, shape="128", peer=peer))
    peaks = {"churn_kernels": peak, "torch.compile": 2e6, "eager": 4e6, "gradients alone": 0}
    for peer, size in peaks.items():
        cases.append(
            case("memory", 1.0, shape="100x64", peer=peer, bytes={"peak": size, "kept": 0})
        )
    times = {"bare": bare, "loss": 20.0}
    cases.append(case("trainer", 1.04, models=2, rows=128, ms=times))
    return {
        "machine_info": {
            "cpu": {"brand_raw": "A CPU", "count": 2, "arch": "X86_64", "flags": ["avx2"]},
            "threads": 2,
            "cpu_isa": "avx2",
            "torch": "2.13.0",
            "python_version": "3.11.0",
            "system": "Linux",
        },
        "commit_info": {"id": "0123456789abcdef", "time": None, "dirty": True, "branch": "main"},
        "datetime": "2026-01-02T03:04:05+00:00",
        "benchmarks": cases,
    }


def table(tmp_path, content, *options):
    path = tmp_path / "benchmarks.json"
    path.write_text(json.dumps(content))
    done = run("benchmarks.table", path, *options)
    assert done.returncode == 0, done.stderr
    return done.stdout


def targets(text):
    """What is measured and the verdict, by target."""
    lines = text.partition("## Targets")[2].strip().splitlines()[2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {what: (measured, verdict) for what, _, measured, verdict in cells}


def test_the_table_says_medians_ratios_and_machine(tmp_path):
    text = table(tmp_path, record())
    first, *_ = text.splitlines()
    assert first == (
        "A CPU, 2 cores, 2 threads, avx2; torch 2.13.0, Python 3.11.0, Linux; "
        "commit 0123456789ab with changes; 2026-01-02"
    )
    assert "| 64x131072 | 2 | 1 | 44 | 104 | 52 | 22 | 2 |" in text
    assert "| bfloat16 | 3 | 0.5 | 6 |" in text
    assert "| 8x10 | 50 | 25 | 2 |" in text
    assert "| 1000 | 3e+03 | 1e+03 | 2e+03 | 3 |" in text
    assert "| 200,000,000 uint8 | 2.5e+04 | 2e+04 | 80 |" in text
    assert "| 128 | 2e+03 | 20 | 1 |" in text
    assert "| 100x64 | 10 | 20,000 | 40,000 | 0 | 0 |" in text
    assert "| 2 x 128 | 1,040 | 1,000 | 20 | 4 | 2 |" in text


def test_targets_within_their_bounds_are_met(tmp_path):
    assert targets(table(tmp_path, record(peak=12_800))) == {
        "speed over eager": ("52x", "met"),
        "speed over torch.compile": ("22x", "met"),
        "time over a copy of the same bytes": ("2x", "met"),
        "host overhead over one F.cross_entropy": ("2x", "met"),
        "speed of a hash, 200,000,000 uint8": ("80 % of a copy", "met"),
        "recording, share of a training step of 128 images": ("1 %", "met"),
        "memory beyond inputs and gradients, 100x64": ("128 bytes per row", "met"),
        "trainer step over a bare step, 2 models": ("4 %", "met"),
        "loss and metrics, share of a bare step, 2 models": ("2 %", "met"),
    }


def test_targets_beyond_their_bounds_are_missed(tmp_path):
    slow = record(0.004, 100e-6, 20_000, bare=500.0, recording=0.05, hashed=0.05)
    assert targets(table(tmp_path, slow)) == {
        "speed over eager": ("26x", "**missed**"),
        "speed over torch.compile": ("11x", "**missed**"),
        "time over a copy of the same bytes": ("4x", "**missed**"),
        "host overhead over one F.cross_entropy": ("4x", "**missed**"),
        "speed of a hash, 200,000,000 uint8": ("40 % of a copy", "**missed**"),
        "recording, share of a training step of 128 images": ("2.5 %", "**missed**"),
        "memory beyond inputs and gradients, 100x64": ("200 bytes per row", "**missed**"),
        "trainer step over a bare step, 2 models": ("108 %", "**missed**"),
        "loss and metrics, share of a bare step, 2 models": ("4 %", "**missed**"),
    }


def test_means_over_shapes_are_geometric(tmp_path):
    content = record()
    for entry in content["benchmarks"]:
        if entry["extra_info"] == {"shape": SHAPES[0], "peer": "eager"}:
            entry["stats"]["median"] = 0.416  # 208x there, 52x at the other shape
    assert targets(table(tmp_path, content))["speed over eager"] == ("104x", "met")


def test_a_part_of_the_benchmarks_makes_a_part_of_the_table(tmp_path):
    content = record()
    content["benchmarks"] = [c for c in content["benchmarks"] if c["group"] == "overhead"]
    assert list(targets(table(tmp_path, content))) == ["host overhead over one F.cross_entropy"]


def test_a_saved_record_makes_the_same_table(tmp_path):
    kept = tmp_path / "results" / "here.json"
    text = table(tmp_path, record(), "--save", kept)
    saved = json.loads(kept.read_text())
    assert "flags" not in saved["machine_info"]["cpu"]
    assert all("data" not in entry["stats"] for entry in saved["benchmarks"])
    assert table(tmp_path, saved) == text


@pytest.mark.slow
def test_every_benchmark_runs():
    # Each memory case is a process that imports torch; one shows that they work.
    cases = "not test_memory or (1024x8142 and churn_kernels)"
    done = run("pytest", "-q", "benchmarks", "--tiny", "--benchmark-disable", "-k", cases)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "skipped" not in done.stdout
