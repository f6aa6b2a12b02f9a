"""A kernel of the kind that exact sums are for: tiles into words, the last step rounds."""

import triton
import triton.language as tl

from churn_kernels.triton.launch import start
from churn_kernels.triton.superaccumulator import add_words, load_words, round_words, words_of


@triton.jit
def sum_kernel(x, words, size, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    add_words(words, words_of(tl.load(x + place), place < size))


@triton.jit
def round_kernel(words, narrow, wide):
    float32, float64 = round_words(load_words(words))
    tl.store(narrow, float32)
    tl.store(wide, float64)


def sum_and_round(x, words, narrow, wide, size):
    start(sum_kernel, (len(x) // 64,), 1, x, words, size, 64)
    start(round_kernel, (1,), 1, words, narrow, wide)
