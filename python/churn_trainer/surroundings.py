"""What the bits of a training follow from beside its settings, and how it differs on going on."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from churn_kernels._printable import excerpt
from churn_kernels.audit.manifest import manifest

THREADS = "threads"
"""The entry that a training which goes on restores; all others it compares."""

_WITHOUT_BITS = frozenset({"interop_threads"})
"""Entries of the manifest that move no bit of a training."""

_OF_THREADS = frozenset({"OMP_NUM_THREADS", "MKL_NUM_THREADS"})
"""Variables that say what `THREADS` says."""

_OF_GPUS = frozenset(
    {"devices", "cuda", "cudnn", "cudnn_deterministic", "cudnn_benchmark", "tf32", "driver"}
)


def surroundings(device: torch.device, processes: int) -> dict[str, Any]:
    """Threads, instruction set, versions, flags, device and processes: plain values by name."""
    found: dict[str, Any] = {"processes": processes, "device": device.type}
    # As JSON has it: the versions of packages are classes of their own, which no checkpoint holds.
    for name, value in json.loads(json.dumps(manifest())).items():
        if name in _WITHOUT_BITS or (name in _OF_GPUS and device.type == "cpu"):
            continue
        if isinstance(value, Mapping):
            inner = {key: entry for key, entry in value.items() if key not in _OF_THREADS}
            found |= {f"{name}.{key}": entry for key, entry in inner.items()}
        else:
            found[name] = value
    return found


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """A clause for each entry that is another one now, such as "torch was 2.11.0, is 2.13.0"."""
    return [
        excerpt(f"{name} was {before.get(name, 'not there')}, is {now.get(name, 'not there')}")
        for name in dict.fromkeys((*before, *now))
        if before.get(name) != now.get(name)
    ]


@contextmanager
def threads_kept() -> Iterator[None]:
    """After the block this process computes with as many threads as before it."""
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
