"""The measured machine: missing requirements, and its description in a record."""

import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def missing() -> list[str]:
    """The requirements of a GPU report that this Python lacks, each with its remedy.

    Loads torch and looks for a device, but does not use one.
    """
    python = sys.executable
    if find_spec("torch") is None:
        return [f"{python} has no torch: name a Python that has a CUDA build of it, PYTHON=..."]
    import torch

    if torch.version.cuda is None:
        return [
            f"torch {torch.__version__} of {python} is a build without CUDA: name a Python whose "
            f"torch has CUDA, PYTHON=..."
        ]
    found = []
    if not torch.cuda.is_available():
        found.append(
            f"torch {torch.__version__} sees no CUDA device: run on a host with an NVIDIA GPU, and "
            f"see that nvidia-smi lists it and CUDA_VISIBLE_DEVICES does not hide it"
        )
    if find_spec("triton") is None:
        found.append(
            f"{python} has no triton: install the one that torch {torch.__version__} names"
        )
    return found


def _output(*command: str) -> str | None:
    """The first line of a command's output, or None if it fails."""
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=20, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(done.stdout.strip().splitlines()), None)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if sys.platform == "linux" else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def facts(commit: str | None = None) -> dict[str, Any]:
    """The facts needed to judge or reproduce the numbers.

    Args:
        commit: of the tree, if it has no .git.
    """
    import torch

    record: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit or _output("git", "describe", "--always", "--dirty", "--abbrev=40"),
        "gpu": None,
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
        "cpu": _cpu(),
        "peers": {"liger-kernel": _version("liger-kernel"), "quack": _version("quack-kernels")},
    }
    if torch.cuda.is_available():
        device = torch.cuda.get_device_properties(0)
        record |= {
            "gpu": device.name,
            "capability": f"{device.major}.{device.minor}",
            "multiprocessors": device.multi_processor_count,
            "l2_bytes": device.L2_cache_size,
            "memory_bytes": device.total_memory,
        }
    return record


def slug(gpu: str) -> str:
    """The folder name of a GPU: its name in lower-case letters, digits and hyphens."""
    words = "".join(c if c.isascii() and c.isalnum() else " " for c in gpu.lower()).split()
    return "-".join(words) or "unknown"
