"""A program's piece of the batch: where its rows begin, loads and stores, sums over lanes.

A block is a tuple of `S.parts` tiles (height, width); `S` is the kernel's `spec.Spec`. A lane is
what adds up without talking to others: a row of the tile, or, in a wide plan, a thread. Rows of
odd length begin at addresses that are no multiple of a vector; with `S.shift` their tile begins at
the vector before, and what lies outside the row is masked after the load: a vector never crosses
the end of its memory.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from churn_kernels.triton.math import cast_exactly


class Rows(NamedTuple):
    """The rows of a program: scalars in a wide tile, columns (height, 1) in the others."""

    starts: tl.tuple  # of each model's tile row, at a multiple of a vector
    column_strides: tl.tuple
    shift: tl.tensor  # classes between that and the row itself
    classes: tl.tensor
    limit: tl.tensor  # places of the tile row in use: 0 for a row that is not there or is ignored


@triton.jit
def rows_of_program(S: tl.constexpr):
    """Index of the program's rows: a scalar, or (height,)."""
    program = tl.program_id(0).to(tl.int64)
    if S.wide:
        return program
    else:
        return program * S.height + tl.arange(0, S.height)


@triton.jit
def across(x, S: tl.constexpr):
    """A value of a row, to meet its classes."""
    if S.wide:
        return x
    else:
        return x[:, None]


@triton.jit
def find(pointers, row_strides, column_strides, row, taken, classes, S: tl.constexpr):
    """Where the rows of each tensor begin; those not `taken` are neither read nor written."""
    row = across(row, S)
    shift = row * 0
    if S.shift:
        address = (pointers[0] + row * row_strides[0]).to(tl.int64)
        shift = address // S.element_size % S.vector
    shift = shift.to(tl.int32)
    starts = ()
    for k in tl.static_range(len(pointers)):
        starts += (aligned(pointers[k] + row * row_strides[k] - shift, S),)
    limit = tl.where(across(taken, S), classes + shift, 0)
    return Rows(starts, column_strides, shift, classes, limit)


@triton.jit
def aligned(pointer, S: tl.constexpr):
    """The pointer, known to the compiler as the multiple of `S.vector` elements that it is.

    Known from this alone, not from the arguments of a call: so the compiler's layout, and with it
    the order of sums, is one for all calls.
    """
    if S.strided:
        return pointer
    else:
        step: tl.constexpr = S.element_size * S.vector
        address = pointer.to(tl.int64)
        start = (address - address % step).to(pointer.dtype)
        return tl.multiple_of(start, step if S.wide else (step, step))


@triton.jit
def places(block, part: tl.constexpr, S: tl.constexpr):
    """Places of a part's classes in the tile row, (1, width)."""
    t = tl.arange(0, S.width)[None, :]
    if S.wide:
        t += part * S.width + block * (S.parts * S.width)
    return t


@triton.jit
def blocks(at, S: tl.constexpr):
    """Blocks that cover a row."""
    if S.resident:
        return 1
    else:
        return tl.cdiv(at.classes + at.shift, S.parts * S.width)


@triton.constexpr_function
def has_edge(part, edge, S):
    """Whether a part may reach over the row's ends, if its block is at one of them (`edge`)."""
    return edge and (not S.resident or part >= S.inner or (part == 0 and S.shift))


@triton.jit
def load_places(at, t, S: tl.constexpr):
    """Logits of each model at the places t; -inf where the row has no class."""
    c = t - at.shift
    inside = (c >= 0) & (c < at.classes)
    within = t // S.vector * S.vector < at.limit
    if S.strided:
        within = (c >= 0) & (c < at.limit)
    z = ()
    for k in tl.static_range(S.models):
        if S.strided:
            place = at.starts[k] + c.to(tl.int64) * at.column_strides[k]
        else:
            place = at.starts[k] + t
        value = tl.load(place, mask=within, other=0.0)
        z += (tl.where(inside, value, float("-inf")).to(value.dtype),)
    return z


@triton.jit
def load_inner(at, t, S: tl.constexpr):
    """Logits of each model at places t that all lie inside the row."""
    z = ()
    for k in tl.static_range(S.models):
        if S.strided:
            place = at.starts[k] + t.to(tl.int64) * at.column_strides[k]
        else:
            place = at.starts[k] + t
        z += (tl.load(place, mask=at.limit > t * 0, other=0.0),)
    return z


@triton.jit
def load_block(at, block, edge: tl.constexpr, S: tl.constexpr):
    """The parts of a block, each a tuple of models, in the logits' dtype."""
    z = ()
    for part in tl.static_range(S.parts):
        t = places(block, part, S)
        if has_edge(part, edge, S):
            z += (load_places(at, t, S),)
        else:
            z += (load_inner(at, t, S),)
    return z


@triton.jit
def classes_of(at, block, part: tl.constexpr, S: tl.constexpr):
    """Index of each class of a part; outside [0, C) where the row has none."""
    return places(block, part, S) - at.shift


@triton.jit
def load_weights(class_weight, at, c, S: tl.constexpr):
    """Class weights, 0 where the row has no class."""
    inside = (c >= 0) & (c < at.classes)
    if S.weighted:
        return tl.load(class_weight + c, mask=inside, other=0.0).to(S.compute)
    else:
        return inside.to(S.compute)


@triton.jit
def narrow(g, start, S: tl.constexpr):
    """Gradients in the dtype that they are stored in."""
    if S.exact:
        return cast_exactly(g, start.dtype.element_ty)
    else:
        return g.to(start.dtype.element_ty)


@triton.jit
def store_part(start, at, block, part: tl.constexpr, edge: tl.constexpr, g, S: tl.constexpr):
    """Writes the vectors of a part that lie in the row whole; `store_ends` writes the rest."""
    t = places(block, part, S)
    within = at.limit > t * 0
    if has_edge(part, edge, S):
        first = t // S.vector * S.vector
        within = first + S.vector <= at.limit
        if S.shift:
            within = within & (first >= at.shift)
    tl.store(start + t, narrow(g, start, S), mask=within)


@triton.jit
def end_places(at, target, S: tl.constexpr):
    """Places that take more care than the vectors of a sweep: (1, 4 vectors).

    The first and the last vector of a row, which it may share with its neighbours, and that of its
    target.
    """
    t = tl.arange(0, 4 * S.vector)[None, :]
    inner = t % S.vector
    last = (at.classes + at.shift) // S.vector * S.vector
    labelled = (across(target, S) + at.shift) // S.vector * S.vector
    which = t // S.vector
    return inner + tl.where(which == 0, 0, tl.where(which == 1, last, labelled)).to(tl.int32)


@triton.jit
def store_ends(start, at, t, g, S: tl.constexpr):
    within = (t >= at.shift) & (t < at.limit)
    tl.store(start + t, narrow(g, start, S), mask=within)


@triton.jit
def lane_sum(x, S: tl.constexpr):
    """Sum over the classes of each lane: (height, width) to (lanes,)."""
    if S.wide:
        return tl.sum(tl.reshape(x, (S.width // S.vector, S.vector)), 1)
    else:
        return tl.sum(x, 1)


@triton.jit
def lane_max(x, S: tl.constexpr):
    if S.wide:
        return tl.max(tl.reshape(x, (S.width // S.vector, S.vector)), 1)
    else:
        return tl.max(x, 1)


@triton.jit
def to_lane(x, S: tl.constexpr):
    """A value of each lane, to meet the lane's classes."""
    if S.wide:
        spread = tl.broadcast_to(x[:, None], (S.width // S.vector, S.vector))
        return tl.reshape(spread, (1, S.width))
    else:
        return x[:, None]


@triton.jit
def row_sum(x, S: tl.constexpr):
    """Sum over a tile's row of the batch: a scalar, or (height,)."""
    if S.wide:
        return tl.sum(lane_sum(x, S), 0)
    else:
        return lane_sum(x, S)


@triton.jit
def row_max(x, S: tl.constexpr):
    if S.wide:
        return tl.max(lane_max(x, S), 0)
    else:
        return lane_max(x, S)


@triton.jit
def row_full(value, dtype: tl.constexpr, S: tl.constexpr):
    """A value for each row of the batch."""
    if S.wide:
        return tl.full((), value, dtype)
    else:
        return tl.full((S.height,), value, dtype)


@triton.jit
def any_row(x, S: tl.constexpr):
    """Whether x holds for any of the program's rows."""
    if S.wide:
        return x
    else:
        return tl.max(x.to(tl.int32), 0) > 0


@triton.jit
def zeros(count: tl.constexpr, S: tl.constexpr):
    """A tile of zeros for each of `count` sums."""
    values = ()
    for _ in tl.static_range(count):
        values += (tl.zeros((S.height, S.width), S.compute),)
    return values


@triton.jit
def fold_each(a, S: tl.constexpr):
    """Sum over the classes of each lane, of each entry."""
    folded = ()
    for i in tl.static_range(len(a)):
        folded += (lane_sum(a[i], S),)
    return folded
