"""Peak memory of a step beyond its inputs and gradients: `python -m benchmarks.memory PEER`.

Prints a JSON object from shape to bytes. A process measures one peer: the highest resident set
during a step less the resident set before it and the gradients' bytes. Linux only.
"""

import argparse
import ctypes
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor

from benchmarks.peers import PEERS, SHAPES, TINY, batch, shape_name, step

# The bytes of many short rows are the easiest to tell from the kernel's rounding of its counts.
MEMORY_SHAPES = (*SHAPES, (262144, 64))
CONTROL = "gradients alone"


def resident(field: str) -> int:
    """A field of the process's status, in bytes: VmRSS is the resident set, VmHWM its peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"field must be in /proc/self/status, got {field!r}; VmRSS and VmHWM are")


def extra_bytes(run: Callable[[], object], logits: Sequence[Tensor]) -> int:
    """Peak of a step less what was there before and less the gradients."""
    run()  # compiles, starts threads
    for z in logits:
        z.grad = None
    ctypes.CDLL(None).malloc_trim(0)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    run()
    return resident("VmHWM") - before - sum(z.nbytes for z in logits if z.requires_grad)


def only_gradients(logits: Sequence[Tensor]) -> None:
    """The control: what it adds to the gradients is the error of the measurement."""
    for z in logits:
        z.grad = z.detach().clone()


def measure(peer: str, shape: tuple[int, int]) -> int:
    logits, target = batch(shape)
    if peer == CONTROL:
        return extra_bytes(lambda: only_gradients(logits), logits)
    return extra_bytes(step(PEERS[peer], logits, target), logits)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("peer", choices=[CONTROL, *PEERS])
    parser.add_argument("--tiny", action="store_true")
    arguments = parser.parse_args()
    shapes = (TINY,) if arguments.tiny else MEMORY_SHAPES
    print(json.dumps({shape_name(shape): measure(arguments.peer, shape) for shape in shapes}))


if __name__ == "__main__":
    main()
