"""Memory of a step: `python -m benchmarks.memory PEER ROWS CLASSES`.

Prints a JSON object of bytes. "peak": the highest resident set during a step, less the inputs
and the gradients. "kept": the memory resident between steps, when the gradients are freed. A
process measures one peer at one shape, because the next would reuse the kept memory. Linux only.
"""

import argparse
import ctypes
import gc
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor

from benchmarks.peers import PEERS, TINY, batch, step

MEMORY_SHAPES = ((1024, 8142), (64, 131072), (262144, 64))
CONTROL = "gradients alone"


def resident(field: str) -> int:
    """A field of the process's status, in bytes: VmRSS is the resident set, VmHWM its peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"field must be in /proc/self/status, got {field!r}; VmRSS and VmHWM are")


def only_gradients(logits: Sequence[Tensor]) -> None:
    """The control: its memory beyond the gradients is the measurement error."""
    for z in logits:
        z.grad = z.detach().clone()


def prepared(peer: str, shape: tuple[int, int]) -> tuple[Callable[[], object], list[Tensor]]:
    """A step of the peer, and its logits."""
    logits, target = batch(shape)
    if peer == CONTROL:
        return lambda: only_gradients(logits), logits
    return step(PEERS[peer], logits, target), logits


def settled() -> int:
    """The resident set after the allocator has returned its free memory."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return resident("VmRSS")


def measure(peer: str, shape: tuple[int, int]) -> dict[str, int]:
    prepared(peer, TINY)[0]()  # starts threads, loads the compiler
    run, logits = prepared(peer, shape)
    before = settled()
    run()  # compiles for this shape
    gradients = sum(z.nbytes for z in logits)
    for z in logits:
        z.grad = None
    kept = settled() - before
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    run()
    return {"peak": resident("VmHWM") - before - gradients, "kept": kept}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("peer", choices=[CONTROL, *PEERS])
    parser.add_argument("rows", type=int)
    parser.add_argument("classes", type=int)
    arguments = parser.parse_args()
    print(json.dumps(measure(arguments.peer, (arguments.rows, arguments.classes))))


if __name__ == "__main__":
    main()
