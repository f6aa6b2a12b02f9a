"""SplitMix64's output function (Steele, Lea and Flood 2014), over int64 tensors.

Their products and sums wrap as those of unsigned numbers do.
"""

from torch import Tensor

FACTORS = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def mixed(x: Tensor) -> Tensor:
    """64 bits that look random and follow from x's alone, one to one."""
    x = (x ^ shifted(x, 30)) * signed(FACTORS[0])
    x = (x ^ shifted(x, 27)) * signed(FACTORS[1])
    return x ^ shifted(x, 31)


def shifted(x: Tensor, by: int) -> Tensor:
    """The bits shifted right, filled with zeros as those of unsigned numbers are."""
    return (x >> by) & ((1 << (64 - by)) - 1)


def signed(x: int) -> int:
    """Its lowest 64 bits as an int64."""
    x &= (1 << 64) - 1
    return x - (1 << 64) if x >= 1 << 63 else x
