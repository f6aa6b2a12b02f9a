"""The kernels: count rows, sum and differentiate rows, differentiate again, finish, scale.

| kernel | reads | writes |
|---|---|---|
| `count_kernel` | target | rows that take part and their weights, for "mean" |
| `rows_kernel` | logits | each row's record, and the gradients of a reduced loss |
| `gradient_kernel` | logits, records, upstream | gradients for any upstream |
| `finish_kernel` | records | loss, row terms, report |
| `scale_kernel` | gradients, upstream | gradients, unless the upstream is 1 |
"""

import triton
import triton.language as tl

from churn_kernels.triton.gradient import gradients
from churn_kernels.triton.math import exp_nonpos, scalar
from churn_kernels.triton.record import (
    load_field,
    load_indices,
    load_sums,
    load_top_k,
    save_field,
    save_indices,
    save_sums,
    save_top_k,
)
from churn_kernels.triton.row import (
    RowState,
    coefficients,
    cross_entropy,
    divergence,
    entropy,
    pair_index,
    regularizer,
)
from churn_kernels.triton.second import second_sums
from churn_kernels.triton.select import best_two, select_top_k
from churn_kernels.triton.sums import find_mismatches, finish_sums, row_sums
from churn_kernels.triton.tile import (
    blocks,
    classes_of,
    exact_places,
    find,
    load_block,
    load_places,
    load_weights,
    row_full,
    row_sum,
    rows_of_program,
    store_exact,
    store_part,
)

COUNTERS = tl.constexpr(64)  # programs that count the rows, at most; a power of two
COUNT_BLOCK = tl.constexpr(1024)
FINISH_ROWS = tl.constexpr(256)  # rows of a finish_kernel program
PARTIAL_BLOCK = tl.constexpr(1024)


@triton.jit
def target_weights(class_weight, label, S: tl.constexpr):
    """Weight of each label's cross entropy."""
    if S.weighted:
        return tl.load(class_weight + label).to(S.compute)
    else:  # noqa: RET505 - the compiler wants both branches of a compile-time choice
        return label.to(S.compute) * 0.0 + 1.0


@triton.jit
def labels(target, row, present, ignore_index, classes, S: tl.constexpr):
    """(class of each row, takes part, is out of range); class 0 where there is none."""
    if S.has_target:
        y = tl.load(target + row, mask=present, other=0)
        active = present & (y != ignore_index)
        wrong = active & ((y < 0) | (y >= classes))
        return tl.where(active & (wrong == 0), y, 0), active, wrong
    else:  # noqa: RET505
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
    else:  # noqa: RET505
        count = tl.full((), rows, S.compute)
        return count, count


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
def weighted(weight, x):
    """weight * x, or 0 where the weight is: what is left out cannot make a NaN."""
    return tl.where(weight != 0, weight * x, 0.0)


@triton.jit
def repeat(x, count: tl.constexpr):
    values = ()
    for _ in tl.static_range(count):
        values += (x,)
    return values


@triton.jit
def write_block(
    z,
    at,
    out,
    block,
    edge: tl.constexpr,
    labelled: tl.constexpr,
    target,
    class_weight,
    row,
    temperature,
    S: tl.constexpr,
):
    """Gradients of a block, but for what `write_exact` is there for."""
    for part in tl.static_range(S.parts):
        c = classes_of(at, block, part, S)
        weights = load_weights(class_weight, at, c, S) if S.smooths else 0.0
        g = gradients(z[part], c, weights, target, row, temperature, labelled, S)
        for i in tl.static_range(S.students):
            store_part(out.starts[i], out, block, part, edge, g[i], S)


@triton.jit
def write_exact(at, out, target, class_weight, row, temperature, S: tl.constexpr):
    """Gradients class by class: of the vectors at the row's ends, and of that with the target.

    A wide program's sweep leaves the target to this: one test for each class would cost more.
    """
    t = exact_places(at, target, S)
    c = t - at.shift
    weights = load_weights(class_weight, at, c, S) if S.smooths else 0.0
    z = load_places(at, t, S)
    g = gradients(z, c, weights, target, row, temperature, True, S)
    tl.debug_barrier()  # the sweep's stores to the target's vector come first
    for i in tl.static_range(S.students):
        store_exact(out.starts[i], out, t, g[i], S)


@triton.jit
def write_rows(z, at, out, target, class_weight, row, temperature, S: tl.constexpr):
    """Gradients of the program's rows, the last block first.

    Backwards, because what the sums read last is what the second-level cache still holds.
    """
    if S.resident:
        z = load_block(at, 0, True, S) if S.again else z
        write_block(z, at, out, 0, True, not S.wide, target, class_weight, row, temperature, S)
    else:
        count = blocks(at, S)
        parts = load_block(at, count - 1, True, S)
        last = count - 1
        write_block(parts, at, out, last, True, False, target, class_weight, row, temperature, S)
        for step in range(2, count):
            block = count - step
            parts = load_block(at, block, False, S)
            write_block(
                parts, at, out, block, False, False, target, class_weight, row, temperature, S
            )
        parts = load_block(at, 0, True, S)
        write_block(parts, at, out, 0, True, False, target, class_weight, row, temperature, S)
    if S.wide or S.shift:
        write_exact(at, out, target, class_weight, row, temperature, S)


@triton.jit(do_not_specialize=["rows", "classes", "counters", "ignore_index", "wanted"])
def rows_kernel(
    logits,  # models x (N, C)
    row_strides,
    column_strides,
    out,  # students x (N, C) gradients, or None: none wanted
    target,
    class_weight,
    counts,
    record,  # (fields, N)
    totals,  # cleared for finish_kernel: its sums by term, and
    arrivals,  # how many of its programs are done
    rows,
    classes,
    counters,
    ignore_index,
    wanted,  # top k
    ce_weight: "fp64",  # noqa: F722 - a dtype of Triton
    regularizer_weight: "fp64",  # noqa: F722
    divergence_weight: "fp64",  # noqa: F722
    label_smoothing: "fp64",  # noqa: F722
    temperature: "fp64",  # noqa: F722
    S: tl.constexpr,
):
    """One sweep where the rows are resident, two where not."""
    row = rows_of_program(S)
    present = row < rows
    y, active, wrong = labels(target, row, present, ignore_index, classes, S)
    at = find(logits, row_strides, column_strides, row, active, classes, S)
    smoothing = scalar(label_smoothing, S.compute)
    temperature = scalar(temperature, S.compute)
    z = load_block(at, 0, True, S) if S.resident else ()

    thresholds = ()
    last_ties = ()
    if S.top:
        for k in tl.static_range(S.students):
            threshold, last_tie = select_top_k(z, at, k, wanted, S)
            thresholds += (threshold,)
            last_ties += (last_tie,)
    sums = row_sums(z, at, class_weight, thresholds, last_ties, temperature, S)
    sums = finish_sums(sums, wrong, S)
    if S.couples:
        sums = find_mismatches(z, at, sums, S)
    if S.sweeps_twice:
        sums = second_sums(z, at, sums, temperature, S)
    total_weight = tl.full((), classes, S.compute)
    if S.smooths and S.weighted:
        total_weight = row_full(0.0, S.compute, S)
        for block in range(0, blocks(at, S)):
            for part in tl.static_range(S.parts):
                c = classes_of(at, block, part, S)
                total_weight += row_sum(load_weights(class_weight, at, c, S), S)
        save_field(record, rows, row, present, S.at_total_weight, (total_weight,))

    save_sums(record, rows, row, present, sums, S)
    save_top_k(record, rows, row, present, thresholds, last_ties, S)
    if S.report:
        winners, runners_up = best_two(z, at, sums, S)
        save_indices(record, rows, row, present, S.at_winner, winners, S)
        save_field(record, rows, row, present, S.at_runner_up, runners_up)
    if tl.program_id(0) == 0:
        for i in tl.static_range(S.total_terms):
            tl.store(totals + i, tl.full((), 0, S.compute))
        tl.store(arrivals, 0)

    if out is not None:
        ce, r, d = unit_weights(
            counts, counters, rows, ce_weight, regularizer_weight, divergence_weight, S
        )
        ce, r, d = tl.where(active, ce, 0.0), tl.where(active, r, 0.0), tl.where(active, d, 0.0)
        found = coefficients(
            sums,
            repeat(ce, S.students),
            repeat(r, S.students),
            repeat(d, S.pairs),
            target_weights(class_weight, y, S),
            total_weight,
            smoothing,
            classes,
            temperature,
            S,
        )
        to = find(
            out, repeat(classes.to(tl.int64), S.students), column_strides, row, present, classes, S
        )
        state = RowState(sums, found, thresholds, last_ties)
        write_rows(z, at, to, y, class_weight, state, temperature, S)


@triton.jit(do_not_specialize=["rows", "classes", "counters", "ignore_index"])
def gradient_kernel(
    logits,
    row_strides,
    column_strides,
    out,
    target,
    class_weight,
    counts,
    record,
    upstream,  # () for a reduced loss, (N,) by row, (N, terms) by term
    rows,
    classes,
    counters,
    ignore_index,
    ce_weight: "fp64",  # noqa: F722
    regularizer_weight: "fp64",  # noqa: F722
    divergence_weight: "fp64",  # noqa: F722
    label_smoothing: "fp64",  # noqa: F722
    temperature: "fp64",  # noqa: F722
    S: tl.constexpr,
):
    """A program writes one block of its rows: nothing is added up, so any split will do."""
    row = rows_of_program(S)
    present = row < rows
    y, active, _ = labels(target, row, present, ignore_index, classes, S)
    at = find(logits, row_strides, column_strides, row, active, classes, S)
    smoothing = scalar(label_smoothing, S.compute)
    temperature = scalar(temperature, S.compute)
    sums = load_sums(record, rows, row, present, S)
    thresholds, last_ties = load_top_k(record, rows, row, present, S)
    total_weight = tl.full((), classes, S.compute)
    if S.smooths and S.weighted:
        total_weight = load_field(record, rows, row, present, S.at_total_weight, 1)[0]

    ce, r, d = unit_weights(
        counts, counters, rows, ce_weight, regularizer_weight, divergence_weight, S
    )
    by_ce = ()
    by_r = ()
    by_d = ()
    if S.reduction == 3:
        first = upstream + row * (2 * S.students + S.term_pairs)
        for k in tl.static_range(S.students):
            by_ce += (tl.load(first + k, mask=active, other=0.0).to(S.compute),)
            by_r += (tl.load(first + S.students + k, mask=active, other=0.0).to(S.compute),)
        for p in tl.static_range(S.pairs):
            by_d += (tl.load(first + 2 * S.students + p, mask=active, other=0.0).to(S.compute),)
    else:
        if S.reduction == 0:
            factor = tl.load(upstream + row, mask=active, other=0.0).to(S.compute)
        else:
            factor = tl.load(upstream).to(S.compute)
        by_ce = repeat(tl.where(active, weighted(ce, factor), 0.0), S.students)
        by_r = repeat(tl.where(active, weighted(r, factor), 0.0), S.students)
        by_d = repeat(tl.where(active, weighted(d, factor), 0.0), S.pairs)
    found = coefficients(
        sums,
        by_ce,
        by_r,
        by_d,
        target_weights(class_weight, y, S),
        total_weight,
        smoothing,
        classes,
        temperature,
        S,
    )
    to = find(
        out, repeat(classes.to(tl.int64), S.students), column_strides, row, present, classes, S
    )
    block = tl.program_id(1)
    z = load_block(at, block, True, S)
    state = RowState(sums, found, thresholds, last_ties)
    write_block(z, at, to, block, True, True, y, class_weight, state, temperature, S)
    if S.shift:
        write_exact(at, to, y, class_weight, state, temperature, S)


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
                    p: tl.constexpr = pair_index(i, j, S.models)
                    value = divergence(sums, i, j, p, temperature, S)
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
    else:  # noqa: RET505 - the compiler wants both branches of a compile-time choice
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
    weight, count = divisors(counts, counters, rows, S)
    value = tl.full((), 0.0, S.compute)
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
    ce_weight: "fp64",  # noqa: F722
    regularizer_weight: "fp64",  # noqa: F722
    divergence_weight: "fp64",  # noqa: F722
    label_smoothing: "fp64",  # noqa: F722
    temperature: "fp64",  # noqa: F722
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


@triton.jit(do_not_specialize=["size"])
def scale_kernel(
    gradients,  # students x (size,)
    upstream,  # ()
    size,
    BLOCK: tl.constexpr,
):
    """In place times the upstream gradient; returns at once when that is 1."""
    factor = tl.load(upstream)
    if factor != 1.0:
        program = tl.program_id(0).to(tl.int64)
        for step in range(0, tl.cdiv(size, tl.num_programs(0) * BLOCK)):
            i = (program + step * tl.num_programs(0)) * BLOCK + tl.arange(0, BLOCK)
            for k in tl.static_range(len(gradients)):
                g = tl.load(gradients[k] + i, mask=i < size)
                scaled = g.to(factor.dtype) * factor
                tl.store(gradients[k] + i, scaled.to(g.dtype), mask=i < size)
