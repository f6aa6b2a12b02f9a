"""What kernels know of the batch: labels, the rows that take part, the weights of their terms."""

import triton
import triton.language as tl

from churn_kernels.triton.math import scalar
from churn_kernels.triton.superaccumulator import WORDS, round_words, words_of
from churn_kernels.triton.tuples import add_each

COUNTERS = tl.constexpr(64)  # programs that count the rows, at most; a power of two
COUNT_BLOCK = tl.constexpr(1024)


@triton.jit
def target_weights(class_weight, label, active, S: tl.constexpr):
    """Weight of each label's cross entropy; 0, whatever weighs class 0, of rows without one."""
    if S.weighted:
        return tl.load(class_weight + label, mask=active, other=0.0).to(S.weight)
    else:
        return label.to(S.weight) * 0.0 + 1.0


@triton.jit
def labels(target, row, present, ignore_index, classes, S: tl.constexpr):
    """(class of each row, takes part, is out of range); class 0 where there is none."""
    if S.has_target:
        y = tl.load(target + row, mask=present, other=0)
        active = present & (y != ignore_index)
        wrong = active & ((y < 0) | (y >= classes))
        return tl.where(active & (wrong == 0), y, 0), active, wrong
    else:
        return row * 0, present, row < 0


@triton.jit(do_not_specialize=["rows", "classes", "ignore_index"])
def count_kernel(
    target,  # (N,)
    class_weight,  # (C,)
    counts,  # (3, COUNTERS): rows that take part, their weights, and the weights of all classes
    rows,
    classes,
    ignore_index,
    S: tl.constexpr,
):
    program = tl.program_id(0)
    count = tl.zeros((COUNT_BLOCK,), S.weight)
    weight = tl.zeros((COUNT_BLOCK,), S.weight)
    for step in range(0, tl.cdiv(rows, tl.num_programs(0) * COUNT_BLOCK)):
        block = (step * tl.num_programs(0) + program).to(tl.int64)
        row = block * COUNT_BLOCK + tl.arange(0, COUNT_BLOCK)
        y, active, _ = labels(target, row, row < rows, ignore_index, classes, S)
        count += active.to(S.weight)
        weight += tl.where(active, target_weights(class_weight, y, active, S), 0.0)
    tl.store(counts + program, tl.sum(count, 0))
    tl.store(counts + COUNTERS + program, tl.sum(weight, 0))
    if S.exact and S.weighted:  # one program: sums of weights that have no order
        exact_weights(target, class_weight, counts, rows, classes, ignore_index, S)
    elif S.smooths and S.weighted:  # one program, so that no number of rows shows
        total = tl.zeros((COUNT_BLOCK,), S.weight)
        for step in range(0, tl.where(program == 0, tl.cdiv(classes, COUNT_BLOCK), 0)):
            c = step * COUNT_BLOCK + tl.arange(0, COUNT_BLOCK)
            total += tl.load(class_weight + c, mask=c < classes, other=0.0).to(S.weight)
        tl.store(counts + 2 * COUNTERS, tl.sum(total, 0), mask=program == 0)


@triton.jit
def exact_weights(target, class_weight, counts, rows, classes, ignore_index, S: tl.constexpr):
    lane = tl.arange(0, COUNT_BLOCK)
    taken = repeat(tl.full((), 0, tl.int64), WORDS)
    total = repeat(tl.full((), 0, tl.int64), WORDS)
    for step in range(0, tl.cdiv(rows, COUNT_BLOCK)):
        row = tl.full((), step, tl.int64) * COUNT_BLOCK + lane
        y, active, _ = labels(target, row, row < rows, ignore_index, classes, S)
        taken = add_each(taken, words_of(tl.load(class_weight + y), active))
    for step in range(0, tl.cdiv(classes, COUNT_BLOCK)):
        c = step * COUNT_BLOCK + lane
        weight = tl.load(class_weight + c, mask=c < classes, other=0.0)
        total = add_each(total, words_of(weight, c < classes))
    tl.store(counts + COUNTERS, round_words(taken)[1])
    tl.store(counts + 2 * COUNTERS, round_words(total)[1])


@triton.jit
def weight_of_classes(counts, classes, S: tl.constexpr):
    """The weights of all classes, for label smoothing."""
    if S.smooths and S.weighted:
        return tl.load(counts + 2 * COUNTERS)
    else:
        return tl.full((), classes, S.weight)


@triton.jit
def divisors(counts, programs, rows, S: tl.constexpr):
    """What "mean" divides the cross entropy by, and what the rest."""
    if S.has_target:
        part = tl.arange(0, COUNTERS)
        count = tl.sum(tl.load(counts + part, mask=part < programs, other=0.0), 0)
        weight = tl.sum(tl.load(counts + COUNTERS + part, mask=part < programs, other=0.0), 0)
        return weight, count.to(S.scalar)
    else:
        count = tl.full((), rows, S.scalar)
        return count, count


@triton.jit
def weighted(weight, x):
    """weight * x, or 0 where the weight is: what is left out cannot make a NaN."""
    return tl.where(weight != 0, weight * x, 0.0)


@triton.jit
def row_weights(ce_weight, regularizer_weight, divergence_weight, S: tl.constexpr):
    """Weight of CE, R and D in a row's own loss; 0 if left out."""
    ce = scalar(ce_weight, S.weight) if S.ce else scalar(0.0, S.weight)
    r = scalar(regularizer_weight, S.scalar) if S.r else scalar(0.0, S.scalar)
    d = scalar(divergence_weight, S.scalar) if S.d else scalar(0.0, S.scalar)
    if S.pairs > 1:
        d = d / S.pairs
    return ce, r, d


@triton.jit
def unit_weights(
    counts, programs, rows, ce_weight, regularizer_weight, divergence_weight, S: tl.constexpr
):
    """Weight of each row's CE, R and D when the loss's upstream gradient is 1; 0 if left out."""
    ce, r, d = row_weights(ce_weight, regularizer_weight, divergence_weight, S)
    if S.reduction == 1:
        weight, count = divisors(counts, programs, rows, S)
        ce = tl.where(ce != 0, ce / weight, ce)
        r = tl.where(r != 0, r / count, r)
        d = tl.where(d != 0, d / count, d)
    return ce, r, d


@triton.jit
def repeat(x, count: tl.constexpr):
    values = ()
    for _ in tl.static_range(count):
        values += (x,)
    return values
