"""From the records of the rows to the loss: terms, report, and their sums over the batch."""

import triton
import triton.language as tl

from churn_kernels.triton.batch import (
    divisors,
    labels,
    row_weights,
    target_weights,
    unit_weights,
    weight_of_classes,
)
from churn_kernels.triton.math import INFINITY, canonical, exp_nonpos, lowest_of, scalar
from churn_kernels.triton.record import load_field, load_indices, load_sums
from churn_kernels.triton.row import (
    cross_entropy,
    divergence,
    entropy,
    pair_index,
    regularizer,
)
from churn_kernels.triton.superaccumulator import (
    WORDS,
    add_words,
    load_words,
    parts_of,
    round_words,
    sum_parts,
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
    counts,
    classes,
    smoothing,
    temperature,
    sums,
    S: tl.constexpr,
):
    """CE of each student, R of each, D of each pair: the row's terms, 0 for an ignored row."""
    terms = ()
    total_weight = weight_of_classes(counts, classes, S)
    for k in tl.static_range(S.students):
        if S.has_target:
            place = logits[k] + row * row_strides[k] + y * column_strides[k]
            z = tl.load(place, mask=active, other=0.0).to(S.scalar)
            d_target = tl.maximum(z - sums.maximum[k], lowest_of(S.compute))
            d_target = tl.where(z == -INFINITY, z, d_target)
            value = cross_entropy(
                sums, k, d_target, target_weights(class_weight, y, active, S), total_weight,
                smoothing, classes, S,
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
            right = (winners[k] == y).to(S.scalar) + poison
            accuracy += (tl.where(active, right, 0.0),)
            gap = 1.0 - exp_nonpos(runners_up[k] - sums.maximum[k], S.exact)
            confidence += (tl.where(active, gap / sums.mass[k], 0.0),)
            entropies += (tl.where(active, entropy(sums, k, S), 0.0),)
    return accuracy + confidence + entropies + (tl.where(active, agreement, 0.0),)


@triton.jit
def result(x, S: tl.constexpr):
    """What is stored of a number that is returned."""
    if S.exact:
        return canonical(x.to(tl.float32))
    else:
        return x


@triton.constexpr_function
def takes_part(i, S):
    """Whether the options switch term i on; a weight that is 0 after a division counts."""
    return (S.ce if i < S.students else S.r if i < 2 * S.students else S.d).value


@triton.jit
def loss_parts(terms, ce, r, d, S: tl.constexpr):
    """(row loss, its cross entropy, the rest) of each row when the terms have these weights."""
    hard = tl.zeros_like(terms[0])
    rest = tl.zeros_like(terms[0])
    value = tl.zeros_like(terms[0])
    for i in tl.static_range(2 * S.students + S.pairs):
        if takes_part(i, S):
            weight = ce if i < S.students else r if i < 2 * S.students else d
            part = weight * terms[i]
            value += part
            if i < S.students:
                hard += part
            else:
                rest += part
    return value, hard, rest


@triton.jit
def sum_over_batch(
    values, partial, totals, arrivals, count: tl.constexpr, ATOMICS: tl.constexpr, S: tl.constexpr
):
    """Leaves each program's sums in memory; true in the last program to do so."""
    program = tl.program_id(0)
    for i in tl.static_range(count):
        if S.exact:
            add_words(totals + i * WORDS, sum_parts(parts_of(result(values[i], S))))
        elif ATOMICS:
            tl.atomic_add(totals + i, tl.sum(values[i], 0), sem="relaxed")
        else:
            tl.store(partial + i * tl.num_programs(0) + program, tl.sum(values[i], 0))
    tl.debug_barrier()  # every thread's store comes before the one thread's arrival
    return tl.atomic_add(arrivals, 1, sem="acq_rel") == tl.num_programs(0) - 1


@triton.jit
def batch_total(i: tl.constexpr, partial, totals, ATOMICS: tl.constexpr, S: tl.constexpr):
    """Sum over the programs, in an order that their number alone decides, or that has none."""
    if S.exact:
        return round_words(load_words(totals + i * WORDS))[1]
    elif ATOMICS:
        return tl.load(totals + i, cache_modifier=".cg")
    else:
        programs = tl.num_programs(0)
        total = tl.zeros((PARTIAL_BLOCK,), S.weight)
        for start in range(0, programs, PARTIAL_BLOCK):
            part = start + tl.arange(0, PARTIAL_BLOCK)
            place = partial + i * programs + part
            total += tl.load(place, mask=part < programs, other=0.0, cache_modifier=".cg")
        return tl.sum(total, 0)


@triton.jit
def reduced_loss(partial, totals, weight, count, ce, r, d, ATOMICS: tl.constexpr, S: tl.constexpr):
    """The loss out of the batch's sums: of its terms, or, in exact mode, of its rows' losses.

    There the cross entropy and the rest have sums of their own, for "mean" with class weights.
    """
    if S.exact and S.reduction == 2:
        value = round_words(load_words(totals))[0]
    elif S.exact and S.weighted and S.ce:
        value = batch_total(1, partial, totals, ATOMICS, S) / weight
        value += batch_total(2, partial, totals, ATOMICS, S) / count
    elif S.exact:
        value = batch_total(0, partial, totals, ATOMICS, S) / count
    else:
        value = tl.full((), 0.0, S.scalar)
        for i in tl.static_range(2 * S.students + S.pairs):
            if takes_part(i, S):
                unit = ce if i < S.students else r if i < 2 * S.students else d
                value += unit * batch_total(i, partial, totals, ATOMICS, S)
    if S.reduction == 1:
        value = tl.where(count == 0, float("nan"), value)
    return value


@triton.constexpr_function
def report_place(i, students, pairs, term_pairs):
    """Where the mean of the report's sum i stands: terms, what is read off the record, the rows."""
    terms = 2 * students + pairs
    if i < 2 * students:
        return i
    if i < terms:
        return i + 3 * students
    if i < terms + 3 * students:
        return i - pairs
    return 5 * students + term_pairs


@triton.jit
def write_report(report, partial, totals, weight, count, ATOMICS: tl.constexpr, S: tl.constexpr):
    """The means of the report, in the order of `LossInputs::reported_terms`."""
    terms: tl.constexpr = 2 * S.students + S.pairs
    for i in tl.static_range(terms + 3 * S.students + 1):
        total = batch_total(S.loss_sums + i, partial, totals, ATOMICS, S)
        mean = total / weight if i < S.students else total / count
        # Cross entropy and accuracy mean nothing without a target.
        if not S.has_target and (i < S.students or (i >= terms and i < terms + S.students)):
            mean = mean * float("nan")
        place = report + report_place(i, S.students, S.pairs, S.term_pairs)
        tl.store(place, result(mean, S))
    for p in tl.static_range(S.pairs, S.term_pairs):
        tl.store(report + 5 * S.students + p, result(0.0 / count, S))


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
    totals,  # (terms,), of exact mode (terms, words)
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
        logits, row_strides, column_strides, row, active, y, class_weight, counts, classes,
        scalar(label_smoothing, S.scalar), scalar(temperature, S.scalar), sums, S,
    )  # fmt: skip
    ce, r, d = unit_weights(
        counts, counters, rows, ce_weight, regularizer_weight, divergence_weight, S
    )
    if S.reduction == 0:
        value, _, _ = loss_parts(terms, ce, r, d, S)
        tl.store(loss + row, result(value, S), mask=present)
    if S.reduction == 3:
        width: tl.constexpr = 2 * S.students + S.term_pairs
        for i in tl.static_range(2 * S.students + S.pairs):
            tl.store(loss + row * width + i, result(terms[i], S), mask=present)
        for i in tl.static_range(2 * S.students + S.pairs, width):
            tl.store(loss + row * width + i, tl.zeros_like(terms[0]), mask=present)
    if S.total_terms > 0:
        values = terms
        if S.exact:
            values = terms if S.report else ()
            if S.reduces:
                unit_ce, unit_r, unit_d = row_weights(
                    ce_weight, regularizer_weight, divergence_weight, S
                )
                values = loss_parts(terms, unit_ce, unit_r, unit_d, S) + values
        if S.report:
            values = values + reports(record, rows, row, active, y, sums, S)
        last = sum_over_batch(values, partial, totals, arrivals, S.total_terms, ATOMICS, S)
        if last:
            weight, count = tl.full((), 0.0, S.scalar), tl.full((), 0.0, S.scalar)
            if S.reduction == 1 or S.report:  # the rows were counted
                weight, count = divisors(counts, counters, rows, S)
            if S.reduces:
                value = reduced_loss(partial, totals, weight, count, ce, r, d, ATOMICS, S)
                tl.store(loss, result(value, S))
            if S.report:
                write_report(report, partial, totals, weight, count, ATOMICS, S)
