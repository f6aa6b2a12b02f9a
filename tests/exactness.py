"""Numbers whose sum is hard to get right, and the sum by Python's integers, rounded once."""

import math
import random
import struct

import torch

INF, NAN = float("inf"), float("nan")
LARGEST = 2.0**128 - 2.0**104
SMALLEST = 2.0**-149
NORMAL = 2.0**-126  # the smallest that is not subnormal

CANONICAL_NAN = struct.pack("<I", 0x7FC00000)


def bits_of(x):
    """The bytes of a scalar tensor, or of a tensor's elements."""
    return x.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def random_bits(seed, size):
    """Float32 numbers of every exponent, without NaN and infinities."""
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(-(2**31), 2**31, (size,), generator=generator).to(torch.int32)
    x = bits.view(torch.float32)
    return torch.where(x.isfinite(), x, 1.0)


def shuffled(x, seed=0):
    return x[torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))]


def normal(size=1000, scale=1.0):
    return scale * torch.randn(size, generator=torch.Generator().manual_seed(size))


def tensor(*values):
    return torch.tensor(values, dtype=torch.float32)


_CANCELS = random_bits(1, 400)

FINITE = {
    "none": tensor(),
    "one": tensor(0.1),
    "normal": normal(),
    "far from 0": normal() + 1000.0,
    "every exponent": random_bits(2, 1000),
    "many bits": random_bits(3, 5000),
    "cancels": shuffled(torch.cat([_CANCELS, -_CANCELS])),
    "cancels but for the smallest": shuffled(torch.cat([_CANCELS, -_CANCELS, tensor(SMALLEST)])),
    "cancels but for a few": shuffled(torch.cat([_CANCELS, -_CANCELS, normal(7, 1e-20)])),
    "subnormal": (random_bits(4, 300).view(torch.int32) & -0x7F800001).view(torch.float32),
    "about the smallest normal": tensor(NORMAL, -SMALLEST, -SMALLEST, NORMAL / 2),
    "the largest subnormal": tensor(NORMAL, -SMALLEST),
    "largest": tensor(*[LARGEST] * 50, *[-LARGEST] * 49),
    "overflows": tensor(LARGEST, LARGEST),
    "overflows below": tensor(*[-LARGEST] * 1000),
    "the last that stays finite": tensor(LARGEST, 2.0**103, -SMALLEST),
    "the first that does not": tensor(LARGEST, 2.0**103),
    "1e38 and 1e-38": tensor(1e38, 1e-38, -1e38, 1e-38, 3e38, -3e38, -2.5e-38),
    "a tie, down to even": tensor(1.0, 2.0**-24),
    "a tie, up to even": tensor(1.0 + 2.0**-23, 2.0**-24),
    "a tie and a bit": tensor(1.0, 2.0**-24, SMALLEST),
    "a tie less a bit": tensor(1.0 + 2.0**-23, 2.0**-24, -SMALLEST),
    "a negative tie": tensor(-1.0, -(2.0**-24)),
    "carries to the next power": tensor(2.0 - 2.0**-23, 2.0**-24),
    "zeros": tensor(0.0, -0.0),
    "minus zeros": tensor(-0.0, -0.0),
}
SPECIAL = {
    "NaN": tensor(1.0, NAN, 2.0),
    "a NaN of other bits": torch.tensor([-1, 0x7F800001], dtype=torch.int32).view(torch.float32),
    "inf": tensor(INF, -LARGEST, 1.0),
    "-inf": tensor(1.0, -INF, -INF),
    "both infinities": tensor(INF, 1.0, -INF),
    "NaN and inf": tensor(INF, NAN),
}
CASES = {**FINITE, **SPECIAL}


def units(x):
    """The sum of finite numbers in units of 2^-149."""
    return sum(int(math.ldexp(value, 149)) for value in x.double().flatten().tolist())


def special_sum(x):
    """NaN or the infinity that the sum is; None if it is finite."""
    if x.isnan().any() or ((x == INF).any() and (x == -INF).any()):
        return NAN
    infinite = x[x.isinf()]
    return infinite[0].item() if len(infinite) else None


def float64_sum(x):
    """The exact sum as float64: Python divides integers with one rounding."""
    special = special_sum(x)
    return units(x) / 2**149 if special is None else special


def float32_sum(x):
    """The bytes of the exact sum as float32, rounded once to nearest, ties to even."""
    special = special_sum(x)
    if special is not None:
        return CANONICAL_NAN if math.isnan(special) else struct.pack("<f", special)
    total = units(x)
    magnitude = abs(total)
    dropped = max(magnitude.bit_length() - 24, 0)
    kept, rest = divmod(magnitude, 1 << dropped)
    half = (1 << dropped) / 2
    kept += rest > half or (dropped > 0 and rest == half and kept % 2)
    value = math.ldexp(kept, dropped - 149) if kept << dropped < 1 << 277 else INF
    return struct.pack("<f", -value if total < 0 else value)


def shards(x, count, seed=0):
    """x cut at random places; shards may be empty."""
    cuts = sorted(random.Random(seed).randint(0, len(x)) for _ in range(count - 1))
    return x.tensor_split(cuts)


def results(total, x, orders=20):
    """The different bytes that `total` returns for x in several orders."""
    return {bits_of(total(shuffled(x, seed))) for seed in range(orders)}
