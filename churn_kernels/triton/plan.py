"""How a row of C classes is shared out over a GPU's threads: a pure function of the problem's kind.

| classes | plan |
|---|---|
| few | `"rows"`: several rows a program, in the lanes of one warp |
| while they fit | `"resident"`: one row a program, the logits of all models in registers |
| more | `"sweeps"`: one row a program, in blocks, twice; the second time backwards |

Nothing here looks at the number of rows, so that a row's bits cannot depend on its batch.

The bounds come from a multiprocessor's 65536 registers. While one program waits for memory or at a
barrier another has to compute, so two of them must fit. 16-bit logits are summed as float32, eight
side by side, which leaves no room to keep them as well: the gradient reads them again, from the
first-level cache. Rows in blocks are read again from the second-level cache, which holds the fewer
of them the longer they are: beyond FEW_PROGRAMS classes one program a multiprocessor is better than
two. A bound is named even where it is the hardware's own: left to itself the compiler may take
fewer registers, and spill.
"""

from typing import NamedTuple

VECTOR_BYTES = 16  # the widest load of a thread
WARP = 32
RESIDENT_WARPS = 8
SWEEP_WARPS = 16
VALUES = 64  # logits, of all models together, that a thread holds
REGISTERS = 65536  # of a multiprocessor
MOST_REGISTERS = 255  # of a thread
FEW_PROGRAMS = 65536  # classes
SHORT = 256  # classes of rows that the vector before would make too much longer


class Plan(NamedTuple):
    """What a program takes at a time: `parts` tiles of (height, width), rows by classes.

    Without `wide` there is one part, and a tile's rows are rows of the batch. With it a program has
    one row of the batch, and the tiles, one high, follow each other along it; a thread holds
    `vector` classes side by side in each of them.
    """

    wide: bool
    height: int
    width: int
    parts: int
    inner: int  # parts of a resident row, from the first, that cannot reach over its end
    vector: int  # classes side by side that a thread loads at once
    shift: bool  # rows begin at any address; the tile begins at the vector before
    resident: bool  # the parts hold the whole row
    again: bool  # the gradient reads a resident row again
    warps: int
    registers: int  # of a thread, at most; 0: as many as the compiler likes

    @property
    def block(self) -> int:
        """Classes of a row that a program takes at a time."""
        return self.width * self.parts

    @property
    def name(self) -> str:
        """The plan's name in the table above."""
        return "rows" if not self.wide else "resident" if self.resident else "sweeps"


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n >= 1."""
    return 1 << (n - 1).bit_length()


def plan(
    classes: int,
    models: int,
    element_size: int,
    vector: int,
    shift: bool,
    plain: bool,
    bounded: bool,
    sweep_warps: int = SWEEP_WARPS,
) -> Plan:
    """The tile for rows of `classes`.

    Args:
        classes: C.
        models: logits that a program holds at a time.
        element_size: bytes of a logit.
        vector: classes at which the addresses of all rows are multiples (1, 2, 4, 8).
        shift: rows begin where they will, and are read from the vector before on.
        plain: no option asks for more than cross entropy, entropy and SKL do.
        bounded: the registers of two programs suffice, which `benchmarks.compiled` shows.
        sweep_warps: of a program that reads its row in sweeps; fewer leave a thread more registers.
    """
    needed = max(vector, classes + (vector - 1 if shift else 0))
    depth = VALUES // max(2, power_of_two(models)) // max(1, element_size // 4)
    if models > 2:  # sums of pairs take their place
        depth //= 2
    depth = max(1, depth if plain else depth // 2)
    few = power_of_two(needed)
    if 4 * few <= WARP * depth:
        height = WARP * depth // (4 * few)
        registers = 0 if plain else MOST_REGISTERS
        return Plan(False, height, few, 1, 0, vector, shift, True, False, 1, registers)
    warps = power_of_two(-(-needed // (WARP * depth)))
    if warps <= RESIDENT_WARPS:
        width = warps * WARP * vector
        registers = registers_for(2, warps) if bounded and warps == RESIDENT_WARPS else 0
        parts = -(-needed // width)
        again = element_size == 2
        inner = classes // width
        return Plan(True, 1, width, parts, inner, vector, shift, True, again, warps, registers)
    programs = 2 if bounded and classes < FEW_PROGRAMS else 1
    if programs == 2 and vector == 8:
        sweep_warps //= 2  # two of all warps would leave a thread too few registers
    width = sweep_warps * WARP * vector
    parts = max(1, depth // 8 // vector)
    resident = needed <= width * parts  # of many models little more is held at a time
    inner = classes // width if resident else 0
    registers = registers_for(programs, sweep_warps)
    return Plan(
        True, 1, width, parts, inner, vector, shift, resident, False, sweep_warps, registers
    )


def widest_vector(models: int, element_size: int) -> int:
    """Classes side by side for a thread: each costs a register for every sum of the models' pairs.

    Args: as of `plan`.
    """
    return max(1, min(VECTOR_BYTES // element_size, 16 // power_of_two(models)))


def registers_for(programs: int, warps: int) -> int:
    """Registers a thread for so many programs to share a multiprocessor."""
    return min(MOST_REGISTERS, REGISTERS // (programs * warps * WARP))
