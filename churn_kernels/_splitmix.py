"""SplitMix64's output function (Steele, Lea and Flood 2014), over int64 tensors.

Products and sums wrap like those of unsigned numbers.
"""

from torch import Tensor

FACTORS = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def mixed(x: Tensor) -> Tensor:
    """A bijection of 64-bit integers whose outputs look random."""
    x = (x ^ shifted(x, 30)) * signed(FACTORS[0])
    x = (x ^ shifted(x, 27)) * signed(FACTORS[1])
    return x ^ shifted(x, 31)


def shifted(x: Tensor, by: int) -> Tensor:
    """Logical right shift."""
    return (x >> by) & ((1 << (64 - by)) - 1)


def signed(x: int) -> int:
    """The lowest 64 bits of x as an int64."""
    x &= (1 << 64) - 1
    return x - (1 << 64) if x >= 1 << 63 else x
