"""From the records of the rows to the loss: terms, report, and their sums over the batch."""

import triton
import triton.language as tl

from churn_kernels.triton.batch import divisors, labels, target_weights, unit_weights, weighted
from churn_kernels.triton.math import exp_nonpos, scalar
from churn_kernels.triton.record import load_field, load_indices, load_sums
from churn_kernels.triton.row import (
    cross_entropy,
    divergence,
    entropy,
    pair_index,
    regularizer,
)

FINISH_ROWS = tl.constexpr(256)  # rows of a program
PARTIAL_BLOCK = tl.constexpr(1024)


@triton.jit
def row_terms(
    logits,
    row_strides,
    column_strides,
    row,
    active,
    y,
    class_weight,
    record,
    rows,
    classes,
    smoothing,
    temperature,
    sums,
    S: tl.constexpr,
):
    """CE of each student, R of each, D of each pair: the row's terms, 0 for an ignored row."""
    terms = ()
    total_weight = tl.full((), classes, S.compute)
    if S.smooths and S.weighted:
        total_weight = load_field(record, rows, row, active, S.at_total_weight, 1)[0]
    for k in tl.static_range(S.students):
        if S.has_target:
            place = logits[k] + row * row_strides[k] + y * column_strides[k]
            d_target = tl.load(place, mask=active, other=0.0).to(S.compute) - sums.maximum[k]
            value = cross_entropy(
                sums, k, d_target, target_weights(class_weight, y, S), total_weight, smoothing,
                classes, S,
            )  # fmt: skip
            terms += (tl.where(active, value, 0.0),)
        else:
            terms += (tl.zeros_like(sums.mass[k]),)
    for k in tl.static_range(S.students):
        if S.regularizer != 0:
            terms += (tl.where(active, regularizer(sums, k, S), 0.0),)
        else:
            terms += (tl.zeros_like(sums.mass[k]),)
    if S.pairs > 0:
        if S.divergence == 4:
            value = divergence(sums, 0, 0, 0, temperature, S)
            terms += (tl.where(active, value, 0.0),)
        else:
            for i in tl.static_range(S.models):
                for j in tl.static_range(i + 1, S.models):
                    value = divergence(sums, i, j, pair_index(i, j, S.models), temperature, S)
                    terms += (tl.where(active, value, 0.0),)
    return terms


@triton.jit
def reports(record, rows, row, active, y, sums, S: tl.constexpr):
    """Accuracy, confidence and entropy of each student, and the agreement, of each row."""
    accuracy = ()
    confidence = ()
    entropies = ()
    winners = load_indices(record, rows, row, active, S.at_winner, S.models, S)
    runners_up = load_field(record, rows, row, active, S.at_runner_up, S.students)
    agreement = tl.zeros_like(sums.mass[0]) + 1.0
    for k in tl.static_range(S.models):
        poison = tl.where(sums.mass[k] == sums.mass[k], 0.0, float("nan"))
        agreement += poison  # a row that holds a NaN predicts nothing
        agreement = tl.where(winners[k] != winners[0], agreement * 0.0, agreement)
        if k < S.students:
            right = (winners[k] == y).to(S.compute) + poison
            accuracy += (tl.where(active, right, 0.0),)
            gap = 1.0 - exp_nonpos(runners_up[k] - sums.maximum[k])
            confidence += (tl.where(active, gap / sums.mass[k], 0.0),)
            entropies += (tl.where(active, entropy(sums.mass[k], sums.moment[k]), 0.0),)
    return accuracy + confidence + entropies + (tl.where(active, agreement, 0.0),)


@triton.jit
def sum_over_batch(
    values, partial, totals, arrivals, count: tl.constexpr, ATOMICS: tl.constexpr, S: tl.constexpr
):
    """Leaves each program's sums in memory; true in the last program to do so."""
    program = tl.program_id(0)
    for i in tl.static_range(count):
        value = tl.sum(values[i], 0)
        if ATOMICS:
            tl.atomic_add(totals + i, value, sem="relaxed")
        else:
            tl.store(partial + i * tl.num_programs(0) + program, value)
    tl.debug_barrier()  # every thread's store comes before the one thread's arrival
    return tl.atomic_add(arrivals, 1, sem="acq_rel") == tl.num_programs(0) - 1


@triton.jit
def batch_total(i: tl.constexpr, partial, totals, ATOMICS: tl.constexpr, S: tl.constexpr):
    """Sum over the programs, in an order that their number alone decides."""
    if ATOMICS:
        return tl.load(totals + i, cache_modifier=".cg")
    else:
        programs = tl.num_programs(0)
        total = tl.zeros((PARTIAL_BLOCK,), S.compute)
        for start in range(0, programs, PARTIAL_BLOCK):
            part = start + tl.arange(0, PARTIAL_BLOCK)
            place = partial + i * programs + part
            total += tl.load(place, mask=part < programs, other=0.0, cache_modifier=".cg")
        return tl.sum(total, 0)


@triton.jit
def write_results(
    loss, report, partial, totals, counts, counters, rows, ce, r, d,
    ATOMICS: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    """The reduced loss and the means of the report, out of the batch's sums."""
    value = tl.full((), 0.0, S.compute)
    if S.reduction == 1 or S.report:  # the rows were counted
        weight, count = divisors(counts, counters, rows, S)
    else:
        weight, count = value, value
    terms: tl.constexpr = 2 * S.students + S.pairs
    for i in tl.static_range(terms):
        total = batch_total(i, partial, totals, ATOMICS, S)
        if i < S.students:
            value += weighted(ce, total)
            mean = total / weight if S.has_target else total * float("nan")
        elif i < 2 * S.students:
            value += weighted(r, total)
            mean = total / count
        else:
            value += weighted(d, total)
            mean = total / count
        if S.report:
            if i < 2 * S.students:
                tl.store(report + i, mean)
            else:
                tl.store(report + i + 3 * S.students, mean)
    if S.reduction == 1:
        value = tl.where(count == 0, float("nan"), value)
    if S.reduction == 1 or S.reduction == 2:
        tl.store(loss, value)
    if S.report:
        for p in tl.static_range(S.pairs, S.term_pairs):
            tl.store(report + 5 * S.students + p, 0.0 / count)
        for i in tl.static_range(3 * S.students + 1):
            mean = batch_total(terms + i, partial, totals, ATOMICS, S) / count
            if i < S.students and not S.has_target:
                mean = mean * float("nan")
            if i < 3 * S.students:
                tl.store(report + 2 * S.students + i, mean)
            else:
                tl.store(report + 5 * S.students + S.term_pairs, mean)


@triton.jit(do_not_specialize=["rows", "classes", "counters", "ignore_index"])
def finish_kernel(
    logits,
    row_strides,
    column_strides,
    target,
    class_weight,
    counts,
    record,
    loss,  # () reduced, (N,) by row, (N, terms) by term
    report,  # (5 students + pairs + 1,)
    partial,  # (terms, programs)
    totals,  # (terms,)
    arrivals,
    rows,
    classes,
    counters,
    ignore_index,
    ce_weight: "fp64",
    regularizer_weight: "fp64",
    divergence_weight: "fp64",
    label_smoothing: "fp64",
    temperature: "fp64",
    ATOMICS: tl.constexpr,
    S: tl.constexpr,
):
    """Terms of each row, a thread a row; the last program to finish reduces them to the loss."""
    row = tl.program_id(0).to(tl.int64) * FINISH_ROWS + tl.arange(0, FINISH_ROWS)
    present = row < rows
    y, active, _ = labels(target, row, present, ignore_index, classes, S)
    sums = load_sums(record, rows, row, active, S)
    terms = row_terms(
        logits, row_strides, column_strides, row, active, y, class_weight, record, rows, classes,
        scalar(label_smoothing, S.compute), scalar(temperature, S.compute), sums, S,
    )  # fmt: skip
    ce, r, d = unit_weights(
        counts, counters, rows, ce_weight, regularizer_weight, divergence_weight, S
    )
    if S.reduction == 0:
        value = tl.zeros_like(terms[0])
        for i in tl.static_range(2 * S.students + S.pairs):
            weight = ce if i < S.students else r if i < 2 * S.students else d
            value += weighted(weight, terms[i])
        tl.store(loss + row, value, mask=present)
    if S.reduction == 3:
        width: tl.constexpr = 2 * S.students + S.term_pairs
        for i in tl.static_range(2 * S.students + S.pairs):
            tl.store(loss + row * width + i, terms[i], mask=present)
        for i in tl.static_range(2 * S.students + S.pairs, width):
            tl.store(loss + row * width + i, tl.zeros_like(terms[0]), mask=present)
    if S.total_terms > 0:
        values = terms
        if S.report:
            values = terms + reports(record, rows, row, active, y, sums, S)
        last = sum_over_batch(values, partial, totals, arrivals, S.total_terms, ATOMICS, S)
        if last:
            write_results(
                loss, report, partial, totals, counts, counters, rows, ce, r, d, ATOMICS, S
            )
