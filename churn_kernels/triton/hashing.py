"""The op `triton_hash_words`; see csrc/ops.cpp and csrc/rows/hash.h. No call waits for the GPU.

A program sums up some blocks of places of one run of bytes, of whichever tensor: many tensors are
one launch for each width of the loads, four at most. What programs find is added up by integer
atomics, which have no order.
"""

from collections.abc import Iterator, Sequence
from math import gcd

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from churn_kernels._C import constants
from churn_kernels._constants import hash_keys
from churn_kernels._splitmix import FACTORS
from churn_kernels.triton.launch import on_device, start

WORDS = tl.constexpr(constants.kHashWords)
PART = tl.constexpr(constants.kHashPart)
PARTS = tl.constexpr(constants.kHashBlock)
BLOCK_BYTES = tl.constexpr(constants.kHashPart * constants.kHashBlock)
STEP = tl.constexpr(constants.kHashStep)
MIX_FIRST, MIX_SECOND = map(tl.constexpr, FACTORS)

WARPS = 4
BLOCKS = 16  # of a program: 64 KiB

# Columns of the table of runs.
ADDRESS, FIRST, BYTES, ROW, PROGRAM = map(tl.constexpr, range(5))
COLUMNS = tl.constexpr(5)

VECTOR = 16  # bytes: the widest load of a thread


@triton.jit
def block_key(word: tl.constexpr, block):
    x = tl.cast(block, tl.uint64) + (((word + 1) << 56) + STEP)
    x = (x ^ (x >> 30)) * MIX_FIRST
    x = (x ^ (x >> 27)) * MIX_SECOND
    return (x ^ (x >> 31)) | 1


@triton.jit
def load_parts(origin, block, first, last, WIDTH: tl.constexpr, INNER: tl.constexpr):
    """The parts (PARTS,) of a block of places, of bytes [first, last) of the tensor.

    `origin` points to byte 0 of the tensor. INNER: the block holds no other bytes.
    """
    place = block * PARTS + tl.arange(0, PARTS)
    if INNER and WIDTH >= PART:
        part = tl.load(origin + place)
    else:
        LOAD: tl.constexpr = min(WIDTH, PART)
        part = tl.zeros((PARTS,), tl.uint32)
        for i in tl.static_range(PART // LOAD):
            byte = place * PART + i * LOAD
            found = tl.load(origin + byte // LOAD, mask=(byte >= first) & (byte < last), other=0)
            part += found.to(tl.uint32) << 8 * LOAD * i
    return part.to(tl.uint64)


@triton.jit
def hash_words_kernel(
    runs,  # (runs, COLUMNS): address, first byte, bytes, row of the words, first program
    run_of,  # (programs,)
    keys,  # (WORDS, PARTS)
    words,  # (rows, WORDS): sums so far
    BLOCKS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Adds the words of some blocks of a run to those of its row."""
    program = tl.program_id(0).to(tl.int64)
    run = runs + tl.load(run_of + program) * COLUMNS
    first = tl.load(run + FIRST)
    last = first + tl.load(run + BYTES)
    number: tl.constexpr = tl.uint8 if WIDTH == 1 else tl.uint16 if WIDTH == 2 else tl.uint32
    origin = (tl.load(run + ADDRESS) - first).to(tl.pointer_type(number))
    origin = tl.multiple_of(origin, WIDTH)
    begin = first // BLOCK_BYTES + (program - tl.load(run + PROGRAM)) * BLOCKS
    end = tl.minimum(begin + BLOCKS, (last - 1) // BLOCK_BYTES + 1)
    # The first and the last block alone may hold other bytes than the run's.
    part = load_parts(origin, begin, first, last, WIDTH, False)
    sum_0 = part * block_key(0, begin)
    sum_1 = part * block_key(1, begin)
    for block in range(begin + 1, end - 1):
        part = load_parts(origin, block, first, last, WIDTH, True)
        sum_0 += part * block_key(0, block)
        sum_1 += part * block_key(1, block)
    if end > begin + 1:
        part = load_parts(origin, end - 1, first, last, WIDTH, False)
        sum_0 += part * block_key(0, end - 1)
        sum_1 += part * block_key(1, end - 1)
    lane = tl.arange(0, PARTS)
    row = words + tl.load(run + ROW) * WORDS
    sum_0 *= tl.load(keys + lane).to(tl.uint64)
    sum_1 *= tl.load(keys + PARTS + lane).to(tl.uint64)
    tl.atomic_add(row, tl.sum(sum_0, 0).to(tl.int64), sem="relaxed")
    tl.atomic_add(row + 1, tl.sum(sum_1, 0).to(tl.int64), sem="relaxed")


def runs_of(
    bits: Tensor, first: int, run: int, step: int
) -> Iterator[tuple[int, list[tuple[int, int, int]]]]:
    """The runs of a piece as address, first byte and bytes, after the width of their loads.

    Bytes behind the last whole load are a run of their own.
    """
    address, size = bits.data_ptr(), bits.nbytes
    if size == 0:
        return
    run = min(run, size)
    common = gcd(address, first, *((run, step) if run < size else ()))
    width = min(PART.value, common & -common)
    rest = run % width
    if width == PART.value and gcd(address - first, run - step) % VECTOR == 0:
        width = VECTOR
    if run > rest:
        runs = range(size // run)
        yield width, [(address + i * run, first + i * step, run - rest) for i in runs]
    if rest:
        yield 1, [(address + size - rest, first + size - rest, rest)]


def table_of(
    runs: Sequence[tuple[int, int, int, int]], device: torch.device
) -> tuple[Tensor, Tensor]:
    """What the kernel reads of runs and their rows, in one copy that the host does not wait for.

    Returns: (runs, COLUMNS) and (programs,), int64.
    """
    found = np.array(runs, dtype=np.int64)
    first, size = found[:, FIRST.value], found[:, BYTES.value]
    blocks = (first + size - 1) // BLOCK_BYTES.value - first // BLOCK_BYTES.value + 1
    programs = -(-blocks // BLOCKS)
    before = np.cumsum(programs) - programs
    run_of = np.repeat(np.arange(len(runs)), programs)
    table = torch.from_numpy(np.concatenate([np.column_stack([found, before]).ravel(), run_of]))
    if device.type == "cuda":
        table = table.pin_memory().to(device, non_blocking=True)
    return table[: -len(run_of)], table[-len(run_of) :]


def hash_words(
    pieces: Sequence[Tensor], first: Sequence[int], run: Sequence[int], step: Sequence[int]
) -> Tensor:
    """The words (pieces, WORDS) of contiguous pieces of one device."""
    device = pieces[0].device
    words = torch.zeros(len(pieces), WORDS.value, dtype=torch.int64, device=device)
    by_width: dict[int, list[tuple[int, int, int, int]]] = {}
    for row, piece in enumerate(zip(pieces, first, run, step, strict=True)):
        for width, runs in runs_of(*piece):
            by_width.setdefault(width, []).extend((*one, row) for one in runs)
    with on_device(device):
        for width, found in by_width.items():
            table, run_of = table_of(found, device)
            arguments = (table, run_of, hash_keys(device), words, BLOCKS, width)
            start(hash_words_kernel, (len(run_of),), WARPS, *arguments)
    return words
