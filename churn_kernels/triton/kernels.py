"""The kernels that go over logits: sum and differentiate rows, differentiate again, scale.

| kernel | reads | writes |
|---|---|---|
| `batch.count_kernel` | target | rows that take part and their weights, for "mean" |
| `rows_kernel` | logits | each row's record, and the gradients of a reduced loss |
| `gradient_kernel` | logits, records, upstream | gradients for any upstream |
| `finish.finish_kernel` | records | loss, row terms, report |
| `scale_kernel` | gradients, upstream | gradients, unless the upstream is 1 |
"""

import triton
import triton.language as tl

from churn_kernels.triton.batch import (
    labels,
    repeat,
    target_weights,
    unit_weights,
    weight_of_classes,
    weighted,
)
from churn_kernels.triton.exact import exact_sums
from churn_kernels.triton.gradient import gradients
from churn_kernels.triton.math import canonical, cast_exactly, scalar
from churn_kernels.triton.record import (
    load_sums,
    load_top_k,
    save_field,
    save_indices,
    save_sums,
    save_top_k,
)
from churn_kernels.triton.row import (
    RowState,
    cast_coefficients,
    cast_each,
    coefficients,
    pair_levels,
)
from churn_kernels.triton.second import second_sums
from churn_kernels.triton.select import best_two, select_top_k
from churn_kernels.triton.sums import find_mismatches, finish_sums, row_sums
from churn_kernels.triton.superaccumulator import WORDS
from churn_kernels.triton.tile import (
    blocks,
    classes_of,
    end_places,
    find,
    load_block,
    load_places,
    load_weights,
    rows_of_program,
    store_ends,
    store_part,
)


@triton.jit
def row_state(sums, found, thresholds, last_ties, temperature, S: tl.constexpr):
    """What the gradient sweep takes of a row, in the dtype of the classes' arithmetic."""
    levels = ()
    if S.divergence == 3:
        levels = cast_each(pair_levels(sums, temperature, S), S.compute)
    maxima = cast_each(sums.maximum, S.compute)
    found = cast_coefficients(found, S.compute)
    return RowState(maxima, found, thresholds, last_ties, levels)


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
    inverse_temperature,
    S: tl.constexpr,
):
    """Gradients of a block, but for what `write_ends` is there for."""
    for part in tl.static_range(S.parts):
        c = classes_of(at, block, part, S)
        weights = load_weights(class_weight, at, c, S) if S.smooths else 0.0
        g = gradients(z[part], c, weights, target, row, inverse_temperature, labelled, S)
        for i in tl.static_range(S.students):
            store_part(out.starts[i], out, block, part, edge, g[i], S)


@triton.jit
def write_ends(at, out, target, class_weight, row, inverse_temperature, S: tl.constexpr):
    """Gradients class by class: of the vectors at the row's ends, and of that with the target.

    A wide program's sweep leaves the target to this: one test for each class would cost more.
    """
    t = end_places(at, target, S)
    c = t - at.shift
    weights = load_weights(class_weight, at, c, S) if S.smooths else 0.0
    z = load_places(at, t, S)
    g = gradients(z, c, weights, target, row, inverse_temperature, True, S)
    tl.debug_barrier()  # the sweep's stores to the target's vector come first
    for i in tl.static_range(S.students):
        store_ends(out.starts[i], out, t, g[i], S)


@triton.jit
def write_rows(z, at, out, target, class_weight, row, inverse_temperature, S: tl.constexpr):
    """Gradients of the program's rows, the last block first.

    Backwards, because what the sums read last is what the second-level cache still holds.
    """
    if S.resident:
        z = z if S.keeps else load_block(at, 0, True, S)
        write_block(
            z, at, out, 0, True, not S.wide, target, class_weight, row, inverse_temperature, S
        )
    else:
        count = blocks(at, S)
        parts = load_block(at, count - 1, True, S)
        last = count - 1
        write_block(
            parts, at, out, last, True, False, target, class_weight, row, inverse_temperature, S
        )
        for step in range(2, count):
            block = count - step
            parts = load_block(at, block, False, S)
            write_block(
                parts,
                at,
                out,
                block,
                False,
                False,
                target,
                class_weight,
                row,
                inverse_temperature,
                S,
            )
        parts = load_block(at, 0, True, S)
        write_block(
            parts, at, out, 0, True, False, target, class_weight, row, inverse_temperature, S
        )
    if S.wide:
        write_ends(at, out, target, class_weight, row, inverse_temperature, S)


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
    ce_weight: "fp64",
    regularizer_weight: "fp64",
    divergence_weight: "fp64",
    label_smoothing: "fp64",
    temperature: "fp64",
    S: tl.constexpr,
):
    """One sweep where the rows are resident, two where not."""
    row = rows_of_program(S)
    present = row < rows
    y, active, wrong = labels(target, row, present, ignore_index, classes, S)
    at = find(logits, row_strides, column_strides, row, active, classes, S)
    smoothing = scalar(label_smoothing, S.scalar)
    temperature = scalar(temperature, S.scalar)
    inverse_temperature = (1.0 / temperature).to(S.compute)
    z = load_block(at, 0, True, S) if S.resident else ()

    thresholds = ()
    last_ties = ()
    if S.top:
        for k in tl.static_range(S.students):
            threshold, last_tie = select_top_k(z, at, k, wanted, S)
            thresholds += (threshold,)
            last_ties += (last_tie,)
    if S.exact:
        sums = exact_sums(
            z, at, class_weight, thresholds, last_ties, temperature, inverse_temperature, S
        )
        sums = finish_sums(sums, wrong, S)
    else:
        sums = row_sums(z, at, class_weight, thresholds, last_ties, inverse_temperature, S)
        sums = finish_sums(sums, wrong, S)
        if S.couples:
            sums = find_mismatches(z, at, sums, S)
    if S.sweeps_twice:
        sums = second_sums(z, at, sums, temperature, inverse_temperature, S)

    save_sums(record, rows, row, present, sums, S)
    save_top_k(record, rows, row, present, thresholds, last_ties, S)
    if S.report:
        winners, runners_up = best_two(z, at, sums, S)
        save_indices(record, rows, row, present, S.at_winner, winners, S)
        save_field(record, rows, row, present, S.at_runner_up, runners_up)
    if tl.program_id(0) == 0:
        for i in tl.static_range(S.total_terms * (WORDS if S.exact else 1)):
            tl.store(totals + i, tl.full((), 0, totals.dtype.element_ty))
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
            target_weights(class_weight, y, active, S),
            tl.where(active, weight_of_classes(counts, classes, S), 0.0),
            smoothing,
            classes,
            temperature,
            S,
        )
        to = find(
            out, repeat(classes.to(tl.int64), S.students), column_strides, row, present, classes, S
        )
        state = row_state(sums, found, thresholds, last_ties, temperature, S)
        write_rows(z, at, to, y, class_weight, state, inverse_temperature, S)


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
    ce_weight: "fp64",
    regularizer_weight: "fp64",
    divergence_weight: "fp64",
    label_smoothing: "fp64",
    temperature: "fp64",
    S: tl.constexpr,
):
    """A program writes one block of its rows: nothing is added up, so any split will do."""
    row = rows_of_program(S)
    present = row < rows
    y, active, _ = labels(target, row, present, ignore_index, classes, S)
    at = find(logits, row_strides, column_strides, row, active, classes, S)
    smoothing = scalar(label_smoothing, S.scalar)
    temperature = scalar(temperature, S.scalar)
    inverse_temperature = (1.0 / temperature).to(S.compute)
    sums = load_sums(record, rows, row, present, S)
    thresholds, last_ties = load_top_k(record, rows, row, present, S)

    ce, r, d = unit_weights(
        counts, counters, rows, ce_weight, regularizer_weight, divergence_weight, S
    )
    by_ce = ()
    by_r = ()
    by_d = ()
    if S.reduction == 3:
        first = upstream + row * (2 * S.students + S.term_pairs)
        for k in tl.static_range(S.students):
            by_ce += (tl.load(first + k, mask=active, other=0.0).to(S.scalar),)
            by_r += (tl.load(first + S.students + k, mask=active, other=0.0).to(S.scalar),)
        for p in tl.static_range(S.pairs):
            by_d += (tl.load(first + 2 * S.students + p, mask=active, other=0.0).to(S.scalar),)
    else:
        if S.reduction == 0:
            factor = tl.load(upstream + row, mask=active, other=0.0).to(S.scalar)
        else:
            factor = tl.load(upstream).to(S.scalar)
        by_ce = repeat(tl.where(active, weighted(ce, factor), 0.0), S.students)
        by_r = repeat(tl.where(active, weighted(r, factor), 0.0), S.students)
        by_d = repeat(tl.where(active, weighted(d, factor), 0.0), S.pairs)
    found = coefficients(
        sums,
        by_ce,
        by_r,
        by_d,
        target_weights(class_weight, y, active, S),
        tl.where(active, weight_of_classes(counts, classes, S), 0.0),
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
    state = row_state(sums, found, thresholds, last_ties, temperature, S)
    write_block(z, at, to, block, True, True, y, class_weight, state, inverse_temperature, S)
    if S.shift:
        write_ends(at, to, y, class_weight, state, inverse_temperature, S)


@triton.jit
def scale_kernel(
    gradients,  # students x (size,)
    upstream,  # ()
    size,
    BLOCK: tl.constexpr,
    EXACT: tl.constexpr,
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
                if EXACT:
                    scaled = cast_exactly(canonical(scaled), g.dtype)
                tl.store(gradients[k] + i, scaled.to(g.dtype), mask=i < size)
