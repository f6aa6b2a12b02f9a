"""The timings of a GPU report: `python -m benchmarks.gpu.bench JSON`, most important first.

With --warm every case runs one untimed step, to fill the compilers' caches.
"""

import argparse
import math
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import churn_kernels as ck
from benchmarks.cases import (
    PAIR,
    VARIANTS,
    Variant,
    check,
    codistillation,
    expectation,
    moved_bytes,
)
from benchmarks.gpu.journal import Case, Journal, work
from benchmarks.gpu.published import (
    AUTOTUNED_PAIR,
    CROSS_ENTROPY_PEERS,
    DIVERGENCE_PEERS,
    OURS_PAIR,
    PAIR_PEERS,
    Peer,
    cross_entropy,
)
from benchmarks.gpu.stages import Deadline
from benchmarks.gpu.table import MODES
from benchmarks.gpu.timing import make_pass, timed, wall_time
from benchmarks.peers import TINY, batch, fused, shape_name, step
from benchmarks.table import COPY, CROSS_ENTROPY, OURS
from churn_kernels.hashing import words_of

CLASSES = (1000, 8142, 21841, 128256, 1_000_000)
DTYPES = (torch.bfloat16, torch.float32)
VARIANT_SHAPE = (4096, 8142)
OVERHEAD_SHAPE = (8, 10)
CHURN_RUNS, CHURN_SHAPE = 4, (8192, 1000)
HASH_DTYPES = (torch.float32, torch.bfloat16, torch.uint8)
HASH_TENSORS = (1, 200)  # with this many bytes in total:
HASH_BYTES, TINY_BYTES = 2**32, 2**12

# A pair moves at least this many bytes, far more than an L2 cache holds.
PAIR_BYTES = 512 * 2**20
# Inputs and gradients of all sets are at least this many times the L2 cache.
L2_CACHES = 8
MIN_SETS, MAX_SETS = 3, 8


class Plan(NamedTuple):
    """Shapes, devices and durations of the measurements; tests use tiny shapes on the CPU."""

    device: str = "cuda"
    seconds: float = 0.3  # approximate duration of a timing
    warm: bool = False
    tiny: bool = False
    calls: int = 200  # in a batch whose wall time is measured

    def pair_shape(self, classes: int, dtype: torch.dtype) -> tuple[int, int]:
        """(N, C): the smallest power of two of rows that moves enough bytes."""
        if self.tiny:
            return TINY
        a_row = 4 * classes * dtype.itemsize  # two logits read, two gradients written
        return 1 << math.ceil(math.log2(PAIR_BYTES / a_row)), classes

    def shape(self, shape: tuple[int, int]) -> tuple[int, int]:
        return TINY if self.tiny else shape

    def sets(self, moved: int) -> int:
        """Number of input sets that take turns, so that none is in the L2 cache when read."""
        if self.warm:
            return 1
        if self.device == "cpu":
            return MIN_SETS
        l2 = torch.cuda.get_device_properties(0).L2_cache_size
        return min(MAX_SETS, max(MIN_SETS, math.ceil(L2_CACHES * l2 / moved)))


class Problem(NamedTuple):
    sets: list[tuple[list[Tensor], Tensor]]  # logits and target of each
    expected: list[Tensor]  # the first set's loss and gradients in float64


@lru_cache(maxsize=1)
def problem(variant: Variant, shape: tuple[int, int], plan: Plan) -> Problem:
    """Batches and the first one's expected loss; cached for the peers that follow."""
    make = partial(
        batch, shape, variant.dtype, variant.models, variant.teachers, device=plan.device
    )
    first = make(seed=0)
    others = [make(seed=seed) for seed in range(1, plan.sets(moved_bytes(first[0])))]
    expected = expectation(variant.loss, *first, variant.upstream)
    return Problem([first, *others], expected)


def own_copy(logits: list[Tensor]) -> list[Tensor]:
    return [z.detach().clone().requires_grad_(z.requires_grad) for z in logits]


def extra_bytes(run: Callable[[], object], logits: list[Tensor]) -> int:
    """Peak memory of a step, less its inputs and gradients."""
    for z in logits:
        z.grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    gradients = sum(z.nbytes for z in logits if z.requires_grad)
    return torch.cuda.max_memory_allocated() - before - gradients


def time_peer(peer: Peer, shape: tuple[int, int], plan: Plan) -> dict[str, Any]:
    """Check a step, then time it on sets of inputs that take turns, then check what was timed."""
    loss = peer.load()
    variant = peer.variant
    task = problem(variant, shape, plan)
    sets = task.sets
    try:
        if peer.overwrites:
            sets = [(own_copy(logits), target) for logits, target in sets]
        logits, _ = sets[0]
        steps = [step(loss, *inputs, variant.upstream) for inputs in sets]
        errors = check(steps[0](), logits, task.expected)
        if plan.warm:
            return {}
        result: dict[str, Any] = {"bytes": moved_bytes(logits), "errors": errors}
        if plan.device != "cpu":
            result["extra_bytes"] = extra_bytes(steps[0], logits)
        every = make_pass(steps, plan.device, capturable=not peer.waits)
        timing = timed(every.run, len(steps), plan.device, plan.seconds)
        if not peer.overwrites:
            for z in logits:  # a replay must write what the first step wrote
                if z.requires_grad:
                    z.grad.fill_(torch.nan)
            check(every.run()[0], logits, task.expected)
        note = {"note": peer.note} if peer.note else {}
        return result | timing._asdict() | {"graph": every.graph, "sets": len(sets)} | note
    finally:
        for logits, _ in sets:
            for z in logits:
                z.grad = None
        if plan.device != "cpu":
            torch.cuda.empty_cache()


def time_steps(
    steps: list[Callable[[], Tensor]], moved: int, plan: Plan, capturable: bool = True
) -> dict[str, Any]:
    """Time alternating steps that move this many bytes each."""
    every = make_pass(steps, plan.device, capturable)
    timing = timed(every.run, len(steps), plan.device, plan.seconds)
    return {"bytes": moved, "graph": every.graph, "sets": len(steps)} | timing._asdict()


def time_copy(moved: int, plan: Plan) -> dict[str, Any]:
    """Time copies that read and write this many bytes in total, between alternating sets."""
    sources = [
        torch.ones(moved // 2, dtype=torch.uint8, device=plan.device)
        for _ in range(plan.sets(moved))
    ]
    copies = [partial(torch.zeros_like(source).copy_, source) for source in sources]
    return {} if plan.warm else time_steps(copies, moved, plan)


def bytes_of(variant: Variant, shape: tuple[int, int]) -> int:
    """Bytes that a loss of the variant moves: logits read, students' gradients written."""
    a_set = shape[0] * shape[1] * variant.dtype.itemsize
    return a_set * (2 * variant.models - variant.teachers)


def time_hash(dtype: torch.dtype, tensors: int, moved: int, plan: Plan) -> dict[str, Any]:
    """Time the words of this many tensors with this many bytes in total."""
    like = {"dtype": dtype, "device": plan.device}
    size = moved // dtype.itemsize // tensors
    sets = [[torch.ones(size, **like) for _ in range(tensors)] for _ in range(plan.sets(moved))]
    steps = [partial(words_of, each) for each in sets]
    if plan.warm:
        steps[0]()
        return {}
    return time_steps(steps, moved, plan, capturable=False)


def time_call(make: Callable[[], Callable[[], object]], calls: int, plan: Plan) -> dict[str, Any]:
    """Wall time of a call, from batches of calls that end with a wait for the GPU."""
    run = make()
    if plan.warm:
        run()
        return {}
    return wall_time(run, plan.device, calls)._asdict()


def small_step(loss: Any, models: int, plan: Plan) -> Callable[[], object]:
    return step(loss, *batch(OVERHEAD_SHAPE, models=models, device=plan.device))


def churn_report(device: str, plan: Plan) -> Callable[[], object]:
    runs, target = batch(plan.shape(CHURN_SHAPE), models=CHURN_RUNS)
    runs = [run.detach().to(device) for run in runs]
    return partial(ck.metrics.churn_report, runs, target.to(device))


def names(dtype: torch.dtype, shape: tuple[int, int]) -> dict[str, str]:
    return {"dtype": str(dtype).removeprefix("torch."), "shape": shape_name(shape)}


def _group(
    group: str,
    peers: tuple[Peer, ...],
    classes: int,
    dtype: torch.dtype,
    plan: Plan,
    with_copy: bool = False,
) -> Iterator[Case]:
    shape = plan.pair_shape(classes, dtype)
    facts = {"group": group, "classes": classes, **names(dtype, shape)}
    if with_copy:
        variant = peers[0].variant._replace(dtype=dtype)
        copy = partial(time_copy, bytes_of(variant, shape), plan)
        yield Case({**facts, "peer": COPY}, copy)
    for peer in peers:
        typed = peer._replace(variant=peer.variant._replace(dtype=dtype))
        yield Case({**facts, "peer": peer.name}, partial(time_peer, typed, shape, plan))


def _modes() -> tuple[Peer, ...]:
    """The loss of a pair in each mode stronger than the default."""
    return tuple(
        Peer(f"{OURS} {mode}", lambda mode=mode: codistillation(mode=mode), PAIR) for mode in MODES
    )


def _variants(plan: Plan) -> Iterator[Case]:
    shape = plan.shape(VARIANT_SHAPE)
    # With an upstream gradient other than 1, the backward pass scales the written gradients.
    variants = {**VARIANTS, "upstream 0.5": PAIR._replace(upstream=0.5)}
    for name, variant in variants.items():
        facts = {"group": "variants", "variant": name, **names(variant.dtype, shape)}
        peer = Peer(OURS, lambda loss=variant.loss: loss, variant)
        copy = partial(time_copy, bytes_of(variant, shape), plan)
        yield Case({**facts, "peer": COPY}, copy)
        yield Case({**facts, "peer": OURS}, partial(time_peer, peer, shape, plan))


def _calls(plan: Plan) -> Iterator[Case]:
    """Measurements by the host's clock: small calls, and the churn report."""
    facts = {"group": "overhead", "shape": shape_name(OVERHEAD_SHAPE)}
    for name, loss, models in ((OURS, fused, 2), (CROSS_ENTROPY, cross_entropy, 1)):
        make = partial(small_step, loss, models, plan)
        yield Case({**facts, "peer": name}, partial(time_call, make, plan.calls, plan))
    shape = plan.shape(CHURN_SHAPE)
    facts = {"group": "churn_report", "runs": CHURN_RUNS, "shape": shape_name(shape)}
    for name, device in (("GPU", plan.device), ("CPU", "cpu")):
        make = partial(churn_report, device, plan)
        yield Case({**facts, "peer": name}, partial(time_call, make, 1, plan))


def _hashes(plan: Plan) -> Iterator[Case]:
    for dtype, tensors in product(HASH_DTYPES, HASH_TENSORS):
        size = HASH_BYTES // dtype.itemsize // tensors
        facts = {"group": "hash", "tensors": tensors, **names(dtype, (tensors, size))}
        moved = TINY_BYTES if plan.tiny else HASH_BYTES
        yield Case({**facts, "peer": COPY}, partial(time_copy, moved, plan))
        yield Case({**facts, "peer": OURS}, partial(time_hash, dtype, tensors, moved, plan))


def cases(plan: Plan) -> list[Case]:
    """Every case, most important first, with the cases of one input set together."""
    grid = [(classes, dtype) for classes in CLASSES for dtype in DTYPES]
    found: list[Case] = []
    for classes, dtype in grid:
        found += _group("pair", (OURS_PAIR, *_modes()), classes, dtype, plan, with_copy=True)
    for classes, dtype in grid:
        found += _group("pair", PAIR_PEERS, classes, dtype, plan)
    found += [*_calls(plan), *_hashes(plan), *_variants(plan)]
    for classes, dtype in grid:
        found += _group("pair", (AUTOTUNED_PAIR,), classes, dtype, plan)
    for classes, dtype in grid:
        found += _group("one model", CROSS_ENTROPY_PEERS, classes, dtype, plan, with_copy=True)
    for classes, dtype in grid:
        found += _group("divergence", DIVERGENCE_PEERS, classes, dtype, plan, with_copy=True)
    return found


def failures(entries: list[dict[str, Any]]) -> list[str]:
    """Failures of our own cases; a peer's failure is recorded but does not fail the run."""
    return [
        f"{' '.join(str(entry[key]) for key in entry if key != 'failed')}: {entry['failed']}"
        for entry in entries
        if "failed" in entry and entry["peer"].startswith((OURS, COPY, "GPU"))
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("json", type=Path)
    parser.add_argument("--seconds", type=float, default=240.0, help="begin no case after so long")
    parser.add_argument("--warm", action="store_true", help="run every case once, time nothing")
    arguments = parser.parse_args()
    plan = Plan(warm=arguments.warm)
    if plan.warm:  # the tests run on the same GPU
        torch.cuda.set_per_process_memory_fraction(0.5)
    every = cases(plan)
    journal = Journal(arguments.json, every)
    with ck.backend("triton"):  # no silent fallback
        status = work(every, journal, Deadline(arguments.seconds), plan.device)
    return status or int(bool(failures(journal.entries)))


if __name__ == "__main__":
    raise SystemExit(main())
