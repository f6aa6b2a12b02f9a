"""Hashes of tensors: 128 bits that take note of every bit and its place.

    word[k] = sum over the elements of bits * key_k(place) mod 2^64,  k = 0, 1

(csrc/rows/hash.h). A sum has no order, so threads, devices and strides do not show in it, and what
pieces of a tensor have adds up. Keys differ from place to place, so that every change of one
element shows in both words, and so does every swap of two within a block of 1024 places: signed
zeros, NaN payloads, one unit in the last place. That other differences cancel has a probability of
about 2^-63 a word, and of 2^-32 a word at worst, where they are in the sign bits of float32 alone.
It is no protection against someone who wants two tensors to collide.
"""

import hashlib
import struct
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from churn_kernels._ops import BUILD_COMMAND, CONSTANTS

HASH_SPEC: int | None = CONSTANTS and CONSTANTS.kHashSpec
"""Numbers the hashes: where it is the same, so are they, on every machine and device.

None where the compiled library, which knows it, was not built.
"""

_SLICE = 1 << 20  # parts that are hashed at a time where there is no kernel


def tensor_hash(x: Tensor) -> str:
    """128 bits of a tensor's elements, dtype and shape, as 32 hexadecimal digits.

    Args:
        x: of any dtype, shape, strides, layout and device. What is not contiguous is copied first;
            of a sparse tensor the coalesced indices and values count, of a quantised one its
            integers, scales and zero points.
    Returns: the same for the same bits, dtype and shape, on every machine. Waits for a GPU.
    Raises: TypeError for anything but a tensor; ValueError for a tensor without data (meta, fake,
        nested); RuntimeError where the compiled library is missing.
    """
    parts = _dense_parts(x)
    if len(parts) == 1:
        (dense,) = parts
        return hash_of_words(hash_words(dense), x.dtype, x.shape)
    digest = hashlib.blake2b(digest_size=16)
    digest.update(f"{x.layout} {x.dtype} {tuple(x.shape)} {x.is_quantized}".encode())
    for dense in parts:
        digest.update(bytes.fromhex(tensor_hash(dense)))
    return digest.hexdigest()


def hash_of_words(words: Tensor, dtype: torch.dtype, shape: Sequence[int]) -> str:
    """The hash of the tensor whose words these are; see `hash_words`.

    Args:
        words: (2,) int64.
        dtype, shape: of the whole tensor.
    Returns: 32 hexadecimal digits: BLAKE2b of HASH_SPEC, dtype, shape and words.
    """
    head = f"churn_kernels {HASH_SPEC} {dtype} {tuple(shape)} ".encode()
    return hashlib.blake2b(head + struct.pack("<2q", *words.tolist()), digest_size=16).hexdigest()


def hash_words(x: Tensor, first: int = 0) -> Tensor:
    """The two words of a tensor, or of a piece of one.

    Those of the pieces add up to the words of the whole:

        words = hash_words(x[:10]) + hash_words(x[10:], first=x[:10].numel())
        hash_of_words(words, x.dtype, x.shape) == tensor_hash(x)

    and over processes an int64 SUM all-reduce of 16 bytes does it.

    Args:
        x: dense, of any dtype, shape, strides and device.
        first: elements of the whole tensor, in row-major order, before the piece; a piece follows
            that order.
    Returns: (2,) int64 on x's device. Nothing waits for a GPU.
    Raises: as `tensor_hash`, and ValueError for sparse and quantised tensors, and for first < 0.
    """
    parts = _dense_parts(x)
    if len(parts) != 1:
        raise ValueError(
            f"x must be dense, got a {'quantised' if x.is_quantized else x.layout} tensor; "
            f"pass it to tensor_hash"
        )
    if first < 0:
        raise ValueError(f"first must be at least 0, got {first}; it counts the elements before x")
    (bits,) = parts
    first *= 2 if x.is_complex() else 1
    if bits.is_cpu:
        words: Tensor = torch.ops.churn_kernels.hash_words([bits], first)
        return words[0]
    return words_without_a_kernel(bits, first)


def words_without_a_kernel(bits: Tensor, first: int) -> Tensor:
    """`hash_words` in PyTorch's own operations: the specification, for any device.

    Args:
        bits: integers, contiguous.
    """
    per_element = max(1, bits.element_size() // 4)
    kind = {1: torch.uint8, 2: torch.int16}.get(bits.element_size(), torch.int32)
    mask = {1: 0xFF, 2: 0xFFFF}.get(bits.element_size(), 0xFFFFFFFF)
    keys = _keys(bits.device)
    block_keys = CONSTANTS.hash_block_key
    total = torch.zeros(CONSTANTS.kHashWords, dtype=torch.int64, device=bits.device)
    place, size = first * per_element, CONSTANTS.kHashBlock
    for part in bits.reshape(-1).view(kind).split(_SLICE) if bits.numel() else ():
        numbers = part.to(torch.int64) & mask
        places = torch.arange(place, place + len(part), device=bits.device)
        blocks = range(place // size, (place + len(part) - 1) // size + 1)
        for word in range(CONSTANTS.kHashWords):
            of_blocks = torch.tensor(
                [_signed(block_keys(word, block)) for block in blocks], device=bits.device
            )
            key = keys[word, places % size] * of_blocks[places // size - blocks[0]]
            total[word] += (numbers * key).sum()
        place += len(part)
    return total


def _dense_parts(x: Tensor) -> list[Tensor]:
    """Contiguous tensors of integers that hold all of x."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor, got {type(x).__name__}; pass torch.as_tensor(x)")
    if CONSTANTS is None:
        raise RuntimeError(
            f"hashes need the compiled library, which is missing; build it with `{BUILD_COMMAND}`"
        )
    if x.is_meta or x.is_nested or isinstance(x, torch._subclasses.FakeTensor):
        kind = "nested" if x.is_nested else "meta" if x.is_meta else "fake"
        raise ValueError(f"x must hold data, got a {kind} tensor; pass tensors that do")
    x = x.detach()
    if x.is_quantized:
        return _quantised(x)
    if x.layout == torch.sparse_coo:
        x = x.coalesce()
        return [x.indices(), x.values()]
    if x.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [x.crow_indices(), x.col_indices(), x.values()]
    if x.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [x.ccol_indices(), x.row_indices(), x.values()]
    if x.layout != torch.strided:
        return [x.to_dense()]
    x = x.resolve_conj().resolve_neg().contiguous()
    if x.is_complex():
        x = torch.view_as_real(x)
    widths = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return [x.view(widths[x.element_size()])]


def _quantised(x: Tensor) -> list[Tensor]:
    if x.qscheme() in (torch.per_tensor_affine, torch.per_tensor_symmetric):
        scale = torch.tensor([x.q_scale(), x.q_zero_point()], dtype=torch.float64)
        return [x.int_repr(), scale]
    axis = torch.tensor([x.q_per_channel_axis()])
    return [x.int_repr(), x.q_per_channel_scales(), x.q_per_channel_zero_points(), axis]


def _signed(x: int) -> int:
    """Its 64 bits as an int64."""
    return x - (1 << 64) if x >= 1 << 63 else x


@cache
def _keys(device: torch.device) -> Tensor:
    """(2, 1024) keys of the places in a block."""
    return torch.tensor(CONSTANTS.hash_keys, device=device)
