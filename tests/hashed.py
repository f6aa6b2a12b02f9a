"""Tensors of random bits, and what the words of their hashes are."""

import torch

from churn_kernels._constants import CONSTANTS

DTYPES = [
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.float8_e4m3fn,
    torch.int8,
    torch.uint8,
    torch.bool,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.complex64,
    torch.complex128,
]


def numbers(size, dtype=torch.float32, seed=0):
    """Random bits of a dtype."""
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.bool:
        return torch.randint(2, (size,), generator=generator).bool()
    count = size * dtype.itemsize
    return torch.randint(256, (count,), generator=generator, dtype=torch.uint8).view(dtype)


def specification(x, first=0):
    """The words by Python's integers, byte by byte."""
    raw = x.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    words = [0, 0]
    for at, byte in enumerate(raw, start=first * x.element_size()):
        place, byte_of_part = divmod(at, CONSTANTS.kHashPart)
        block, index = divmod(place, CONSTANTS.kHashBlock)
        for k in range(2):
            key = CONSTANTS.hash_keys[k][index] * CONSTANTS.hash_block_key(k, block)
            words[k] = (words[k] + (byte << 8 * byte_of_part) * key) % 2**64
    return [word - 2**64 if word >= 2**63 else word for word in words]
