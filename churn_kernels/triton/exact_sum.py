"""The ops `triton_exact_words` and `triton_exact_round`; see csrc/ops.cpp. No call waits."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from churn_kernels.triton.launch import on_device, start
from churn_kernels.triton.superaccumulator import (
    ADDENDS,
    WORDS,
    add_parts,
    add_words,
    load_words,
    normalize,
    parts_of,
    round_words,
    store_words,
    sum_parts,
)

BLOCK = 512
WARPS = 4
PROGRAMS = 1024  # enough to fill any GPU
PASS = 1 << 30  # numbers between two normalisations


@triton.jit(do_not_specialize=["size", "steps"])
def exact_words_kernel(
    x,  # (size,)
    words,  # (12,): normalised sum so far
    arrivals,  # 0 before and after
    size,
    steps,  # blocks of each program, at most ADDENDS
    BLOCK: tl.constexpr,
):
    """Adds x to the words; the last program to do so normalises them."""
    program = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    programs = tl.num_programs(0)
    # The last step alone may meet the end.
    first = ((steps - 1) * programs + program) * BLOCK + lane
    parts = parts_of(tl.load(x + first, mask=first < size, other=0.0))
    for step in range(0, steps - 1):
        at = (step * programs + program) * BLOCK + lane
        parts = add_parts(parts, parts_of(tl.load(x + at)))
    add_words(words, sum_parts(parts))
    tl.debug_barrier()  # every thread's addition comes before the one thread's arrival
    if tl.atomic_add(arrivals, 1, sem="acq_rel") == programs - 1:
        store_words(words, normalize(load_words(words)))
        tl.store(arrivals, 0)


@triton.jit
def exact_round_kernel(words, value):
    tl.store(value, round_words(load_words(words))[0])


def exact_words(x: Tensor) -> Tensor:
    """The words (12,) of the sum of x, normalised."""
    flat = x.contiguous().view(-1)
    words = torch.zeros(WORDS.value, dtype=torch.int64, device=x.device)
    arrivals = torch.zeros(1, dtype=torch.int32, device=x.device)
    with on_device(x.device):
        for part in flat.split(PASS) if len(flat) else ():
            blocks = triton.cdiv(len(part), BLOCK)
            steps = min(triton.cdiv(blocks, PROGRAMS), ADDENDS.value)
            grid = (triton.cdiv(blocks, steps),)
            start(exact_words_kernel, grid, WARPS, part, words, arrivals, len(part), steps, BLOCK)
    return words


def exact_round(words: Tensor) -> Tensor:
    """The sum that the words hold, rounded to float32."""
    value = torch.empty((), dtype=torch.float32, device=words.device)
    with on_device(words.device):
        start(exact_round_kernel, (1,), 1, words.contiguous(), value)
    return value
