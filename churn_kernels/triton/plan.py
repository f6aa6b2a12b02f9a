"""How a row of C classes is shared out over a GPU's threads: a pure function of the problem's kind.

| classes | plan |
|---|---|
| few | `"rows"`: several rows a program, in the lanes of one warp |
| while they fit | `"resident"`: one row a program, all models' logits in registers: read once |
| more | `"sweeps"`: one row a program, read in blocks twice; the second time backwards, so that the tail is still in the second-level cache |

Nothing here looks at the number of rows, so that a row's bits cannot depend on its batch.
"""

from typing import NamedTuple

VECTOR_BYTES = 16  # the widest load of a thread
WARP = 32
RESIDENT_WARPS = 16
SWEEP_WARPS = 8


class Plan(NamedTuple):
    """The tile of a program, (height, width): rows by classes, or parts of one row.

    Without `wide` a tile's rows are rows of the batch. With it the tile is one block of
    height x width classes of one row; a thread holds `vector` classes side by side in each of the
    tile's rows, and adds them up before it talks to others.
    """

    wide: bool
    height: int
    width: int
    vector: int  # classes side by side that a thread loads at once
    shift: bool  # rows begin at any address; the tile begins at the vector before
    resident: bool  # the tile holds the whole row
    warps: int

    @property
    def name(self) -> str:
        return "rows" if not self.wide else "resident" if self.resident else "sweeps"


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n >= 1."""
    return 1 << (n - 1).bit_length()


def plan(classes: int, models: int, element_size: int, vector: int, shift: bool) -> Plan:
    """The tile for rows of `classes`.

    Args:
        classes: C.
        models: logits that a program holds at a time.
        element_size: bytes of a logit.
        vector: classes at which the addresses of all rows are multiples (1, 2, 4, 8).
        shift: rows begin where they will, and are read from the vector before on.
    """
    needed = power_of_two(max(vector, classes + (vector - 1 if shift else 0)))
    # Classes of each model that a thread's registers hold beside what is computed from them.
    depth = max(1, 32 // power_of_two(models) // (2 if element_size == 8 else 1))
    if 2 * needed <= WARP * depth:
        return Plan(False, WARP * depth // needed, needed, vector, shift, True, 1)
    warps = needed // (WARP * depth)
    if warps <= RESIDENT_WARPS:
        return wide(needed, vector, shift, True, max(1, warps))
    return wide(SWEEP_WARPS * WARP * max(vector, depth // 2), vector, shift, False, SWEEP_WARPS)


def wide(classes: int, vector: int, shift: bool, resident: bool, warps: int) -> Plan:
    """A tile of `classes` of one row, each thread with `vector` of them in each of its rows."""
    width = warps * WARP * vector
    return Plan(True, max(1, classes // width), width, vector, shift, resident, warps)
