"""What kernels know of the batch: labels, the rows that take part, the weights of their terms."""

import triton
import triton.language as tl

from churn_kernels.triton.math import scalar

COUNTERS = tl.constexpr(64)  # programs that count the rows, at most; a power of two
COUNT_BLOCK = tl.constexpr(1024)


@triton.jit
def target_weights(class_weight, label, S: tl.constexpr):
    """Weight of each label's cross entropy."""
    if S.weighted:
        return tl.load(class_weight + label).to(S.compute)
    else:
        return label.to(S.compute) * 0.0 + 1.0


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
    counts,  # (2, COUNTERS): rows that take part, and their weights, by program
    rows,
    classes,
    ignore_index,
    S: tl.constexpr,
):
    program = tl.program_id(0)
    count = tl.zeros((COUNT_BLOCK,), S.compute)
    weight = tl.zeros((COUNT_BLOCK,), S.compute)
    for step in range(0, tl.cdiv(rows, tl.num_programs(0) * COUNT_BLOCK)):
        block = (step * tl.num_programs(0) + program).to(tl.int64)
        row = block * COUNT_BLOCK + tl.arange(0, COUNT_BLOCK)
        y, active, _ = labels(target, row, row < rows, ignore_index, classes, S)
        count += active.to(S.compute)
        weight += tl.where(active, target_weights(class_weight, y, S), 0.0)
    tl.store(counts + program, tl.sum(count, 0))
    tl.store(counts + COUNTERS + program, tl.sum(weight, 0))


@triton.jit
def divisors(counts, programs, rows, S: tl.constexpr):
    """What "mean" divides the cross entropy by, and what the rest."""
    if S.has_target:
        part = tl.arange(0, COUNTERS)
        count = tl.sum(tl.load(counts + part, mask=part < programs, other=0.0), 0)
        weight = tl.sum(tl.load(counts + COUNTERS + part, mask=part < programs, other=0.0), 0)
        return weight, count
    else:
        count = tl.full((), rows, S.compute)
        return count, count


@triton.jit
def weighted(weight, x):
    """weight * x, or 0 where the weight is: what is left out cannot make a NaN."""
    return tl.where(weight != 0, weight * x, 0.0)


@triton.jit
def unit_weights(
    counts, programs, rows, ce_weight, regularizer_weight, divergence_weight, S: tl.constexpr
):
    """Weight of each row's CE, R and D when the loss's upstream gradient is 1; 0 if left out."""
    ce = scalar(ce_weight, S.compute) if S.ce else scalar(0.0, S.compute)
    r = scalar(regularizer_weight, S.compute) if S.r else scalar(0.0, S.compute)
    d = scalar(divergence_weight, S.compute) if S.d else scalar(0.0, S.compute)
    if S.pairs > 1:
        d = d / S.pairs
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
