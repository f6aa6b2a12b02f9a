"""Peak memory of forward + backward, each peer in its own process; the times are meaningless."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.memory import CONTROL, MEMORY_SHAPES
from benchmarks.peers import PEERS, shape_name

ROOT = Path(__file__).parents[1]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("peer", [CONTROL, *PEERS])
@pytest.mark.parametrize("shape", MEMORY_SHAPES, ids=shape_name, indirect=True)
@pytest.mark.benchmark(group="memory")
def test_memory(benchmark, shape, peer):
    command = [sys.executable, "-m", "benchmarks.memory", peer, *map(str, shape)]
    # Freed memory returns to the system at once, so resident memory is what the peer keeps.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = benchmark.pedantic(
        subprocess.run,
        args=(command,),
        kwargs={"cwd": ROOT, "env": environment, "check": True, "stdout": subprocess.PIPE},
        rounds=1,
    )
    benchmark.extra_info.update(shape=shape_name(shape), peer=peer, bytes=json.loads(done.stdout))
