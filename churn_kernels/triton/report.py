"""Row metrics of several runs for `churn_report`: one program a row, every run in it.

The first sweep over a row's classes finds, of each run, the two largest logits, mass and moment;
the second, from the last class to the first so that it begins with what the caches still hold, adds
up the distances of each pair. A thread keeps one sum of each pair, so the pairs take turns where
there are more than its registers hold: each turn is another second sweep.

The order of a row's sums depends on the number of classes, the number of runs, the dtype, and the
multiple of elements at which the rows begin; never on the number of rows.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import combinations, product
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from churn_kernels.triton.launch import on_device, start
from churn_kernels.triton.math import (
    INFINITY,
    at_least_lowest,
    exp_nonpos,
    log_pos,
    mul_add,
    scalar,
)
from churn_kernels.triton.plan import VECTOR_BYTES, WARP, power_of_two
from churn_kernels.triton.spec import Spec
from churn_kernels.triton.tile import aligned

LAUNCH_RUNS = 16
"""Runs of one launch, at most; half of them in float64. More are launched two groups at a time."""

TURN_PAIRS = 48
"""Pairs whose sums a thread holds at a time; half of them in float64."""

WARP_CLASSES = 4096
"""Classes of a row for each warp: few, as the sums of a row's pairs meet across warps."""

MAX_WARPS = 8

NO_CLASS = tl.constexpr(2**31 - 1)


class Softmax(NamedTuple):
    """What the first sweep knows of each run, by lane (lanes,) or of the row ()."""

    largest: tl.tuple  # logit
    winner: tl.tuple  # its class, the first of equals
    second: tl.tuple  # largest logit of the other classes
    mass: tl.tuple  # sum of exp(d), d = z - largest
    moment: tl.tuple  # sum of exp(d) d


@triton.jit
def load_part(starts, block, part: tl.constexpr, classes, S: tl.constexpr):
    """Classes (lanes, vector) and each run's logits of them; -inf behind the last class."""
    first = ((block * S.parts + part) * S.lanes + tl.arange(0, S.lanes)[:, None]) * S.vector
    c = first + tl.arange(0, S.vector)[None, :]
    z = ()
    for k in tl.static_range(S.runs):
        # A vector lies in the row whole or not at all, and shows it by having one mask.
        value = tl.load(starts[k] + c, mask=first < classes, other=float("-inf"))
        z += (value.to(S.compute),)
    return c, z


@triton.jit
def add_part(a, c, z, S: tl.constexpr):
    """The lanes' state with more classes, all of them behind those it knows."""
    largest, winner, second, mass, moment = (), (), (), (), ()
    for k in tl.static_range(S.runs):
        new = tl.max(z[k], 1)
        place = tl.min(tl.where(z[k] == new[:, None], c, NO_CLASS), 1)
        next_new = tl.max(tl.where(c == place[:, None], float("-inf"), z[k]), 1)
        total = tl.maximum(a.largest[k], new)
        base = tl.where(total == -INFINITY, 0.0, total)
        # A lane without a class has sums of 0; nothing is to become of them.
        by = at_least_lowest(tl.where(a.largest[k] == -INFINITY, 0.0, a.largest[k] - base))
        scale = exp_nonpos(by)
        d = z[k] - base[:, None]
        e = exp_nonpos(d)  # exp(-inf) = 0: a class at -inf weighs nothing
        largest += (total,)
        winner += (tl.where(new > a.largest[k], place, a.winner[k]),)
        loser = tl.minimum(a.largest[k], new)
        second += (tl.maximum(loser, tl.maximum(a.second[k], next_new)),)
        mass += (mul_add(scale, a.mass[k], tl.sum(e, 1)),)
        old = mul_add(scale * by, a.mass[k], scale * a.moment[k])  # 0 of lanes left far below
        moment += (old + tl.sum(e * at_least_lowest(d), 1),)
    return Softmax(largest, winner, second, mass, moment)


@triton.jit
def over_lanes(a, S: tl.constexpr):
    """The row's state out of that of its lanes."""
    largest, winner, second, mass, moment = (), (), (), (), ()
    for k in tl.static_range(S.runs):
        total = tl.max(a.largest[k], 0)
        place = tl.min(tl.where(a.largest[k] == total, a.winner[k], NO_CLASS), 0)
        by = at_least_lowest(tl.where(a.largest[k] == -INFINITY, 0.0, a.largest[k] - total))
        scale = exp_nonpos(by)
        largest += (total,)
        winner += (place,)
        second += (tl.max(tl.where(a.winner[k] == place, a.second[k], a.largest[k]), 0),)
        mass += (tl.sum(scale * a.mass[k], 0),)
        moment += (tl.sum(mul_add(scale * by, a.mass[k], scale * a.moment[k]), 0),)
    return Softmax(largest, winner, second, mass, moment)


@triton.jit
def first_sweep(starts, classes, count, S: tl.constexpr):
    """The row's state, out of `count` blocks."""
    nothing = (tl.full((S.lanes,), float("-inf"), S.compute),) * S.runs
    zero = (tl.zeros((S.lanes,), S.compute),) * S.runs
    nowhere = (tl.full((S.lanes,), NO_CLASS, tl.int32),) * S.runs
    state = Softmax(nothing, nowhere, nothing, zero, zero)
    for block in range(count):
        for part in tl.static_range(S.parts):
            c, z = load_part(starts, block, part, classes, S)
            state = add_part(state, c, z, S)
    return over_lanes(state, S)


@triton.jit
def add_distances(sums, z, largest, inverse, alpha, turn: tl.constexpr, S: tl.constexpr):
    """The lanes' sums of a turn's pairs, two for each, with more classes."""
    p = ()
    scaled = ()
    for k in tl.static_range(S.runs):
        d = z[k] - largest[k]
        e = exp_nonpos(d)
        p += (e * inverse[k],)
        scaled += (e if S.alpha_is_one else exp_nonpos(alpha * d),)
    added = ()
    first: tl.constexpr = S.turns[turn]
    for n in tl.static_range(len(sums) // 2):
        difference = p[S.lefts[first + n]] - p[S.rights[first + n]]
        added += (sums[2 * n] + tl.sum(tl.abs(difference), 1),)
        difference = scaled[S.lefts[first + n]] - scaled[S.rights[first + n]]
        added += (sums[2 * n + 1] + tl.sum(tl.abs(difference), 1),)
    return added


@triton.jit
def second_sweep(
    starts, classes, count, largest, inverse, alpha, turn: tl.constexpr, S: tl.constexpr
):
    """The lanes' sums of a turn's pairs."""
    pairs: tl.constexpr = S.turns[turn + 1] - S.turns[turn]
    sums = (tl.zeros((S.lanes,), S.compute),) * (2 * pairs)
    for step in range(count):
        for part in tl.static_range(S.parts):
            _, z = load_part(starts, count - 1 - step, part, classes, S)
            sums = add_distances(sums, z, largest, inverse, alpha, turn, S)
    return sums


@triton.jit(do_not_specialize=["classes"])
def report_kernel(
    logits,  # runs x (N, C)
    row_strides,
    predicted,  # (runs, N) int64
    values,  # (3, runs, N): largest probability, confidence, entropy
    distances,  # (2, N, runs, runs), cleared: of the probabilities, and of the scaled ones
    classes,
    alpha: "fp64",
    S: tl.constexpr,
):
    """Everything about one row."""
    row = tl.program_id(0).to(tl.int64)
    rows = tl.num_programs(0).to(tl.int64)
    count = tl.cdiv(classes, S.parts * S.lanes * S.vector)
    starts = ()
    for k in tl.static_range(S.runs):
        starts += (aligned(logits[k] + row * row_strides[k], S),)
    state = first_sweep(starts, classes, count, S)
    inverse = ()
    for k in tl.static_range(S.runs):
        inverse += (1.0 / state.mass[k],)
        margin = 1.0 - exp_nonpos(state.second[k] - state.largest[k])
        entropy = log_pos(state.mass[k]) - state.moment[k] * inverse[k]
        tl.store(predicted + k * rows + row, state.winner[k].to(tl.int64))
        tl.store(values + k * rows + row, inverse[k])
        tl.store(values + (S.runs + k) * rows + row, margin * inverse[k])
        tl.store(values + (2 * S.runs + k) * rows + row, entropy)
    exponent = scalar(alpha, S.compute)
    for turn in tl.static_range(S.turn_count):
        sums = second_sweep(starts, classes, count, state.largest, inverse, exponent, turn, S)
        for n in tl.static_range(len(sums)):
            i = S.lefts[S.turns[turn] + n // 2]
            j = S.rights[S.turns[turn] + n // 2]
            matrix = distances + (n % 2 * rows + row) * S.runs * S.runs
            total = tl.sum(sums[n], 0)
            tl.store(matrix + i * S.runs + j, total)
            tl.store(matrix + j * S.runs + i, total)


@lru_cache(maxsize=512)
def make_spec(
    classes: int, runs: int, split: int, dtype: torch.dtype, multiple: int, alpha_is_one: bool
) -> Spec:
    """What the kernel is compiled for; of the number of classes only the tile depends.

    Args:
        split: 0 to pair all runs; else only the first `split` with the others.
        multiple: elements at whose multiples every row begins, a power of two.
    """
    double = dtype == torch.float64
    crossed = product(range(split), range(split, runs))
    pairs = list(crossed if split else combinations(range(runs), 2))
    turn = TURN_PAIRS // (2 if double else 1)
    turns = (*range(0, len(pairs), turn), len(pairs))
    warps = min(MAX_WARPS, power_of_two(math.ceil(classes / WARP_CLASSES)))
    lanes = warps * WARP
    needed = power_of_two(math.ceil(classes / lanes))
    # Classes that a thread takes at a time of each run.
    depth = min(needed, max(1, 32 // power_of_two(runs) // (4 if double else 1)))
    vector = min(depth, multiple, VECTOR_BYTES // dtype.itemsize)
    return Spec(
        runs=runs,
        lefts=tuple(i for i, _ in pairs),
        rights=tuple(j for _, j in pairs),
        turns=turns,
        turn_count=len(turns) - 1,
        compute=tl.float64 if double else tl.float32,
        element_size=dtype.itemsize,
        lanes=lanes,
        vector=vector,
        parts=depth // vector,
        warps=warps,
        alpha_is_one=alpha_is_one,
        wide=True,
        strided=False,
    )


def groups(runs: int, most: int) -> list[range]:
    """Runs shared out evenly to groups of which one, or any two, fit into a launch of `most`."""
    count = 1 if runs <= most else math.ceil(runs / (most // 2))
    return [range(runs * g // count, runs * (g + 1) // count) for g in range(count)]


def multiple_of_rows(logits: Sequence[Tensor]) -> int:
    """Elements, a power of two, at whose multiples every row begins and ends."""
    classes = logits[0].shape[1]
    full = VECTOR_BYTES // logits[0].element_size()
    starts = (run.data_ptr() // run.element_size() for run in logits)
    return math.gcd(full, classes, *starts, *(run.stride(0) for run in logits))


def launch(logits: Sequence[Tensor], split: int, alpha: float) -> tuple[Tensor, Tensor, Tensor]:
    """Of the runs of one launch predicted, values and distances, as the kernel has them."""
    first, device = logits[0], logits[0].device
    runs, (rows, classes) = len(logits), first.shape
    dtype = torch.float64 if first.dtype == torch.float64 else torch.float32
    predicted = torch.empty((runs, rows), dtype=torch.int64, device=device)
    values = torch.empty((3, runs, rows), dtype=dtype, device=device)
    distances = torch.zeros((2, rows, runs, runs), dtype=dtype, device=device)
    spec = make_spec(classes, runs, split, first.dtype, multiple_of_rows(logits), alpha == 1)
    # In the range of the arithmetic, where neither 0 nor infinity meets an infinite logit.
    alpha = min(max(alpha, torch.finfo(dtype).tiny), torch.finfo(dtype).max)
    strides = tuple(run.stride(0) for run in logits)
    with on_device(device):
        start(
            report_kernel, (rows,), spec.warps.value,
            tuple(logits), strides, predicted, values, distances, classes, alpha, spec,
        )  # fmt: skip
    return predicted, values, distances


def row_results(
    logits: Sequence[Tensor], schurn_alpha: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What `churn_report` needs to know of each row; nothing here waits for the GPU.

    Args:
        logits: R tensors (N, C) of one dtype and device, their columns next to each other.
        schurn_alpha: the exponent a.
    Returns: class of the largest logit (R, N) int64, its probability (R, N), the two largest
        probabilities' difference (R, N), entropy in nats (R, N), and (R, R, N) sum |p_i - p_j| and
        sum |(p_i / max p_i)^a - (p_j / max p_j)^a|; float64 for float64 logits, else float32. A row
        without a softmax has a probability that is not finite.
    """
    runs, rows = len(logits), logits[0].shape[0]
    most = LAUNCH_RUNS // (2 if logits[0].dtype == torch.float64 else 1)
    parts = groups(runs, most)
    alone = [launch([logits[k] for k in part], 0, schurn_alpha) for part in parts]
    predicted = torch.cat([result[0] for result in alone])
    values = torch.cat([result[1] for result in alone], dim=1)
    distances = values.new_empty((2, rows, runs, runs))
    for part, (_, _, among) in zip(parts, alone, strict=True):
        distances[:, :, part.start : part.stop, part.start : part.stop] = among
    for a, b in combinations(parts, 2):
        _, _, between = launch([logits[k] for k in (*a, *b)], len(a), schurn_alpha)
        between = between[:, :, : len(a), len(a) :]
        distances[:, :, a.start : a.stop, b.start : b.stop] = between
        distances[:, :, b.start : b.stop, a.start : a.stop] = between.mT
    of_probabilities, of_scaled = distances.permute(0, 2, 3, 1)
    return predicted, *values, of_probabilities, of_scaled
