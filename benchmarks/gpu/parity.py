"""Compares a GPU's results with the CPU's: `python -m benchmarks.gpu.parity JSON`.

Compares loss, terms and gradients with the CPU backend's on the same inputs, in memory that was
filled with NaN before the call; and compares bytes where a mode guarantees them.
"""

import argparse
import math
import time
import zlib
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from importlib import import_module
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor

import churn_kernels as ck
from benchmarks.cases import NORM_ERROR, relative_error
from benchmarks.gpu.journal import Case, Journal, work
from benchmarks.gpu.stages import Deadline
from benchmarks.peers import ALPHA, shape_name
from churn_kernels.audit.settings import thread_count
from churn_kernels.hashing import words_of

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SHAPES = ((256, 10), (128, 1000), (32, 8142), (16, 21841), (8, 128256))
BIT_SHAPES = ((2048, 1000), (256, 8142), (32, 128256), (4, 1_000_000))
BIT_DTYPES = (torch.bfloat16, torch.float32)
HASH_DTYPES = (torch.uint8, torch.bfloat16, torch.float32, torch.float64)
REPLAYS = {"exact": 1000, "run_to_run": 100, "invariant": 100, "fast": 100}
REPLAY_SECONDS = 5.0  # maximum per case
SETTINGS = ({"VALUES": 16}, {"SWEEP_WARPS": 8})  # of resident rows and of sweeps
IGNORED = -100


class Option(NamedTuple):
    """Keyword arguments of a loss, and properties of its inputs."""

    arguments: dict[str, Any]
    models: int = 2
    teachers: int = 0  # number of trailing models, for distillation
    weighted: bool = False  # by class
    ignored: bool = False  # every third row
    masked: bool = False  # a class at -inf in every model
    labelled: bool = True


OPTIONS = {
    "pair": Option({"alpha": ALPHA}),
    "entropy": Option({"alpha": 0.3, "beta": 0.0}),
    "uniform_skl": Option({"alpha": 0.01, "regularizer": "uniform_skl"}),
    "top_k": Option({"alpha": 0.3, "top_k": 5}),
    "top_k of the whole": Option({"alpha": 0.3, "top_k": 5, "renormalize_top_k": False}),
    "uniform_skl, top_k": Option({"alpha": 0.01, "regularizer": "uniform_skl", "top_k": 5}),
    "uniform_skl, top_k of the whole": Option(
        {"alpha": 0.01, "regularizer": "uniform_skl", "top_k": 5, "renormalize_top_k": False}
    ),
    "l1": Option({"alpha": ALPHA, "divergence": "l1"}),
    "ce": Option({"alpha": ALPHA, "divergence": "ce"}),
    "temperature": Option({"alpha": ALPHA, "temperature": 3.0}),
    "l1, temperature": Option({"divergence": "l1", "temperature": 0.5}),
    "label_smoothing, class_weight": Option({"label_smoothing": 0.1}, weighted=True),
    "ignore_index": Option({"alpha": ALPHA}, ignored=True),
    "a class at -inf": Option({"alpha": ALPHA}, masked=True),
    "no target": Option({"alpha": ALPHA}, labelled=False),
    "two teachers": Option({"alpha": 0.5, "temperature": 3.0}, models=3, teachers=2),
    "one model": Option({"alpha": ALPHA}, models=1),
    "three models": Option({"alpha": ALPHA}, models=3),
    "reduction none": Option({"alpha": ALPHA, "reduction": "none"}),
    "reduction sum": Option({"alpha": ALPHA, "reduction": "sum"}),
    "run_to_run": Option({"alpha": ALPHA, "mode": "run_to_run"}),
    "invariant": Option({"alpha": ALPHA, "mode": "invariant"}),
}


class Inputs(NamedTuple):
    logits: list[Tensor]
    target: Tensor | None
    class_weight: Tensor | None
    upstream: Tensor  # (N,) the upstream gradient of a per-row loss

    def to(self, device: str) -> "Inputs":
        move = partial(_moved, device=device)
        moved = map(move, (self.target, self.class_weight, self.upstream))
        return Inputs([move(z) for z in self.logits], *moved)

    def row(self, row: int) -> "Inputs":
        """A batch of one row."""
        one = slice(row, row + 1)
        target = None if self.target is None else self.target[one]
        return Inputs([z[one] for z in self.logits], target, self.class_weight, self.upstream[one])


def _moved(tensor: Tensor | None, device: str) -> Tensor | None:
    return None if tensor is None else tensor.to(device)


def inputs(option: Option, dtype: torch.dtype, shape: tuple[int, int], seed: int = 0) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    logits = [(2 * torch.randn(shape, generator=generator)).to(dtype) for _ in range(option.models)]
    target = torch.randint(0, shape[1], shape[:1], generator=generator) if option.labelled else None
    if option.ignored and target is not None:
        target[::3] = IGNORED
    if option.masked:
        for z in logits:
            z[:, 3] = -math.inf
        if target is not None:
            target[target == 3] = 4
    result_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    weight = torch.linspace(0.5, 2.0, shape[1], dtype=result_dtype) if option.weighted else None
    upstream = torch.linspace(0.5, 1.5, shape[0], dtype=result_dtype)
    return Inputs(logits, target, weight, upstream)


def poison(logits: Sequence[Tensor]) -> None:
    """Allocate memory like a loss's outputs, fill it with NaN, and free it."""
    rows = logits[0].shape[0]
    like = [torch.full_like(z, torch.nan) for z in logits]
    small = [
        torch.full((rows * width,), torch.nan, device=logits[0].device)
        for width in (1, 2, 4, 8, 16, 32)
        for _ in range(4)
    ]
    del like, small


class Results(NamedTuple):
    """The results of a loss, on any device."""

    loss: Tensor
    terms: list[Tensor]
    gradients: list[Tensor]

    def to(self, device: str) -> "Results":
        move = partial(_moved, device=device)
        return Results(move(self.loss), [*map(move, self.terms)], [*map(move, self.gradients)])

    def by_kind(self) -> dict[str, list[Tensor]]:
        return {"loss": [self.loss], "terms": self.terms, "gradient": self.gradients}


def evaluate(option: Option, given: Inputs, backend: str) -> Results:
    """Loss, terms and the students' gradients, in memory that was poisoned just before."""
    leaves = [z.detach().clone().requires_grad_() for z in given.logits]
    arguments = {**option.arguments, "class_weight": given.class_weight, "return_terms": True}
    students = leaves[: len(leaves) - option.teachers]
    poison(leaves)
    with ck.backend(backend):
        if option.teachers:
            teachers = leaves[len(students) :]
            loss, terms = ck.distillation_loss(students[0], teachers, given.target, **arguments)
        else:
            loss, terms = ck.codistillation_loss(leaves, given.target, **arguments)
        upstream = given.upstream if loss.dim() else torch.ones_like(loss)
        gradients = torch.autograd.grad(loss, students, upstream)
    return Results(loss.detach(), list(terms), list(gradients))


def errors(got: Sequence[Tensor], want: Sequence[Tensor]) -> tuple[dict[str, float | None], bool]:
    """Largest absolute and relative error, and whether each tensor is within its dtype's bound.

    Non-finite values must be equal; otherwise the error is None.
    """
    absolute = relative = 0.0
    passed = True
    for actual, expected in zip(got, want, strict=True):
        bound = NORM_ERROR[actual.dtype]
        actual, expected = actual.cpu().double(), expected.cpu().double()
        finite = expected.isfinite() & actual.isfinite()
        same = (actual == expected) | (actual.isnan() & expected.isnan())
        if not bool((finite | same).all()):
            return {"absolute": None, "relative": None}, False
        actual, expected = actual[finite], expected[finite]
        if actual.numel():
            error = relative_error(actual, expected)
            absolute = max(absolute, (actual - expected).abs().max().item())
            relative = max(relative, error)
            passed = passed and error <= bound
    return {"absolute": absolute, "relative": relative}, passed


def compare(
    option: Option, dtype: torch.dtype, shape: tuple[int, int], device: str, backend: str
) -> dict[str, Any]:
    """The largest errors of a backend on a device against the CPU backend."""
    judge = "cpu" if "cpu" in ck.available_backends() else "reference"
    seed = zlib.crc32(repr((option, dtype, shape)).encode())
    given = inputs(option, dtype, shape, seed)
    got = evaluate(option, given.to(device), backend).by_kind()
    want = evaluate(option, given, judge).by_kind()
    found = {kind: errors(got[kind], want[kind]) for kind in want}
    return {
        "against": judge,
        "errors": {kind: error for kind, (error, _) in found.items()},
        "passed": all(passed for _, passed in found.values()),
    }


def same_bits(a: Tensor, b: Tensor) -> bool:
    def as_bytes(tensor: Tensor) -> Tensor:
        return tensor.detach().contiguous().reshape(-1).view(torch.uint8)

    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(as_bytes(a), as_bytes(b))


def _same(a: Results, b: Results) -> bool:
    pairs = zip([a.loss, *a.terms, *a.gradients], [b.loss, *b.terms, *b.gradients], strict=True)
    return all(same_bits(x, y) for x, y in pairs)


def replay(
    mode: str,
    dtype: torch.dtype,
    shape: tuple[int, int],
    device: str,
    backend: str,
    replays: int,
) -> dict[str, Any]:
    """Count repeated calls with different bytes, under concurrent load; "fast" may have some.

    Runs the requested number of replays, or as many as REPLAY_SECONDS allow.
    """
    option = Option({"alpha": ALPHA, "mode": mode})
    given = inputs(option, dtype, shape).to(device)
    first = evaluate(option, given, backend)
    done = differing = 0
    # The host thread that launches the load has its own core.
    with thread_count(1), ck.audit.AXES["contention"](1):
        end = time.monotonic() + REPLAY_SECONDS
        while done < replays and (done == 0 or time.monotonic() < end):
            differing += not _same(evaluate(option, given, backend), first)
            done += 1
    return {"replays": done, "differing": differing, "passed": mode == "fast" or differing == 0}


def launch_settings(
    dtype: torch.dtype, shape: tuple[int, int], device: str, backend: str
) -> dict[str, Any]:
    """Whether exact mode gives the same bytes with other block sizes and numbers of warps."""
    plan, launch = map(import_module, ("churn_kernels.triton.plan", "churn_kernels.triton.launch"))
    option = Option({"alpha": ALPHA, "mode": "exact"})
    given = inputs(option, dtype, shape).to(device)
    used = []

    def noted(*kind: Any) -> Any:
        used.append(plan.plan(*kind))
        return used[-1]

    with patch.object(launch, "plan", noted):
        want = evaluate(option, given, backend)
        differing = []
        for settings in SETTINGS:
            with ExitStack() as stack:
                for module, (name, value) in product((plan, launch), settings.items()):
                    if hasattr(module, name):
                        stack.enter_context(patch.object(module, name, value))
                if not _same(evaluate(option, given, backend), want):
                    differing.append(settings)
    plans = len(set(used))
    return {"plans": plans, "differing": differing, "passed": plans > 1 and not differing}


def alone(
    reduction: str, dtype: torch.dtype, shape: tuple[int, int], device: str, backend: str
) -> dict[str, Any]:
    """Whether a row's loss and gradients have the same bytes alone and in its batch."""
    option = Option({"alpha": ALPHA, "mode": "invariant", "reduction": reduction})
    given = inputs(option, dtype, shape).to(device)
    batch = evaluate(option, given, backend)
    rows = sorted({0, shape[0] // 2, shape[0] - 1})
    differing = []
    for row in rows:
        one = evaluate(option, given.row(row), backend)
        same = all(
            same_bits(g[row : row + 1], h)
            for g, h in zip(batch.gradients, one.gradients, strict=True)
        )
        if reduction == "none":
            same = same and same_bits(batch.loss[row : row + 1], one.loss)
        if not same:
            differing.append(row)
    return {"rows": rows, "differing": differing, "passed": not differing}


def bits_of_the_cpu(
    name: str, dtype: torch.dtype, shape: tuple[int, int], device: str, backend: str
) -> dict[str, Any]:
    """Whether exact mode gives the same bytes as on the CPU."""
    option = OPTIONS[name]._replace(arguments={**OPTIONS[name].arguments, "mode": "exact"})
    given = inputs(option, dtype, shape)
    got, want = evaluate(option, given.to(device), backend), evaluate(option, given, "cpu")
    return {"passed": _same(got.to("cpu"), want)}


def churn(device: str, runs: int = 4, shape: tuple[int, int] = (2000, 1000)) -> dict[str, Any]:
    """The churn report on a device against the same on the CPU."""
    logits, target, *_ = inputs(Option({}, models=runs), torch.float32, shape)
    want = ck.metrics.churn_report(logits, target).metrics()
    got = ck.metrics.churn_report([z.to(device) for z in logits], target.to(device)).metrics()
    error, passed = errors([got[name] for name in want], list(want.values()))
    return {"errors": {"metrics": error}, "passed": passed}


def hashes(dtype: torch.dtype, device: str, backend: str, size: int = 1_000_003) -> dict[str, Any]:
    """Whether hashes equal the CPU's, for any address, for columns and for many tensors.

    Addresses and offsets decide how the kernel can load the bytes.
    """
    generator = torch.Generator().manual_seed(0)
    whole = torch.randint(256, (size * dtype.itemsize,), generator=generator, dtype=torch.uint8)
    x = whole.view(dtype)
    matrix = x[: size // 64 * 64].view(-1, 64)
    pieces = {f"from element {i}": x[i:] for i in (0, 1, 2, 3, 4, 16)}
    pieces |= {"columns": matrix[:, 3:7], "transposed": matrix.t(), "none": x[:0]}
    moved, differing = x.to(device), []
    for name, piece in pieces.items():
        there = moved.as_strided(piece.shape, piece.stride(), piece.storage_offset())
        for first in (0, 1, 5):
            with ck.backend(backend):
                got = ck.audit.hash_words(there, first).cpu()
            if not torch.equal(got, ck.audit.hash_words(piece, first)):
                differing.append(f"{name}, first {first}")
    parts = x.split(size // 300)
    with ck.backend(backend):
        got = words_of(moved.split(size // 300)).cpu()
    if not torch.equal(got, words_of(parts)):
        differing.append(f"{len(parts)} tensors")
    return {"differing": differing, "passed": not differing}


def _grid(shapes: Sequence[tuple[int, int]]) -> list[tuple[str, torch.dtype, tuple[int, int]]]:
    """Every option, dtype and shape; first the plain pair everywhere, then options one by one."""
    first = [("pair", dtype, shape) for shape in shapes for dtype in DTYPES]
    # Each option with each shape and each dtype, before all combinations of the two.
    turns = [(DTYPES[i % len(DTYPES)], shape) for i, shape in enumerate(shapes)]
    then = [(name, dtype, shape) for dtype, shape in turns for name in OPTIONS]
    every = list(product(OPTIONS, DTYPES, shapes))
    return list(dict.fromkeys([*first, *then, *every]))


def cases(
    device: str = "cuda",
    backend: str = "triton",
    shapes: Sequence[tuple[int, int]] = SHAPES,
    bit_shapes: Sequence[tuple[int, int]] = BIT_SHAPES,
    most_replays: int = max(REPLAYS.values()),
) -> list[Case]:
    """The comparisons, most important first."""
    bits, replays = [], []
    for dtype, shape in product(BIT_DTYPES, bit_shapes):
        facts = {"dtype": str(dtype).removeprefix("torch."), "shape": shape_name(shape)}
        for reduction in ("sum", "none"):
            run = partial(alone, reduction, dtype, shape, device, backend)
            bits.append(Case({"check": "row alone", "reduction": reduction, **facts}, run))
        for name in OPTIONS:
            run = partial(bits_of_the_cpu, name, dtype, shape, device, backend)
            bits.append(Case({"check": "bits of the cpu", "options": name, **facts}, run))
        for mode, wanted in REPLAYS.items():
            number = min(wanted, most_replays)
            run = partial(replay, mode, dtype, shape, device, backend, number)
            replays.append(Case({"check": "replay", "mode": mode, **facts}, run))
        if backend == "triton" and shape in bit_shapes[:2]:  # resident rows, and sweeps
            run = partial(launch_settings, dtype, shape, device, backend)
            replays.append(Case({"check": "launch settings", **facts}, run))
    grid = [
        Case(
            {
                "check": "cpu",
                "options": name,
                "dtype": str(dtype).removeprefix("torch."),
                "shape": shape_name(shape),
            },
            partial(compare, OPTIONS[name], dtype, shape, device, backend),
        )
        for name, dtype, shape in _grid(shapes)
    ]
    plain = len(shapes) * len(DTYPES)
    for dtype in HASH_DTYPES:
        facts = {"check": "hash", "dtype": str(dtype).removeprefix("torch.")}
        bits.append(Case(facts, partial(hashes, dtype, device, backend)))
    report = Case({"check": "churn_report"}, partial(churn, device))
    return [*grid[:plain], *bits, report, *replays, *grid[plain:]]


def failures(entries: list[dict[str, Any]]) -> list[str]:
    return [
        " ".join(f"{key}={value}" for key, value in entry.items() if key != "passed")
        for entry in entries
        if not entry.get("passed", False)
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("json", type=Path)
    parser.add_argument("--seconds", type=float, default=150.0, help="begin no case after so long")
    arguments = parser.parse_args()
    every = cases()
    journal = Journal(arguments.json, every)
    status = work(every, journal, Deadline(arguments.seconds), "cuda")
    failed = failures(journal.entries)
    print(*failed, sep="\n")
    return status or int(bool(failed))


if __name__ == "__main__":
    raise SystemExit(main())
