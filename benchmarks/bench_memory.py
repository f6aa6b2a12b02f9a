"""Peak memory of forward + backward, each peer in a process of its own; its time means nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.memory import CONTROL
from benchmarks.peers import PEERS

ROOT = Path(__file__).parents[1]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("peer", [CONTROL, *PEERS])
@pytest.mark.benchmark(group="memory")
def test_memory(benchmark, request, peer):
    command = [sys.executable, "-m", "benchmarks.memory", peer]
    if request.config.getoption("--tiny"):
        command.append("--tiny")
    # Whatever is freed goes back to the system, so that no step lives on the memory of the last.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = benchmark.pedantic(
        subprocess.run,
        args=(command,),
        kwargs={"cwd": ROOT, "env": environment, "check": True, "stdout": subprocess.PIPE},
        rounds=1,
    )
    benchmark.extra_info.update(peer=peer, extra_bytes=json.loads(done.stdout))
