"""The losses and reports whose kernels are compiled: shapes, options, and the targets of each."""

from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from typing import NamedTuple

import torch

from benchmarks.compiled.targets import TARGETS
from churn_kernels import modes
from churn_kernels._options import (
    DISTILLATION,
    DIVERGENCES,
    REDUCTIONS,
    REGULARIZERS,
    ROW_TERMS,
    LossOptions,
)

# CIFAR-10; ImageNet; iNaturalist 2018; ImageNet-21k; the vocabulary of Llama 3.
CLASS_COUNTS = [10, 1000, 8142, 21841, 128256]
DTYPES = [torch.float32, torch.bfloat16]

# How the logits lie in memory.
CONTIGUOUS = "contiguous"
PADDED = "padded"  # rows begin at multiples of 64 bytes
OFFSET = "offset"  # the first row begins after an odd number of elements
TRANSPOSED = "transposed"

# The compiled op: a loss, or another op on the logits.
LOSS = "loss"
CHURN_REPORT = "churn_report"
EXACT_SUM = "exact_sum"
HASH = "hash"

# Every kernel with the CPU's bits.
EXACT_GLOBS = ["sm_*/exact*", "sm_*/hash*"]


class Case(NamedTuple):
    """An op on logits of one shape, such as `churn_report` of as many runs as `models` says.

    The compiled code does not depend on the number of rows.
    """

    name: str
    options: LossOptions | None  # of a loss
    classes: int
    dtype: torch.dtype = torch.bfloat16
    models: int = 2
    weighted: bool = False
    report: bool = False
    layout: str = CONTIGUOUS
    op: str = LOSS
    first: int = 0  # offset of the hashed bytes, which decides how they can be loaded

    @property
    def label(self) -> str:
        """Its name in the tables."""
        return f"{self.name}/{self.classes}/{str(self.dtype).removeprefix('torch.')}"

    def key(self, target: str) -> str:
        """Its name on the command line, and its folder below --keep."""
        return f"{target}/{self.label}"


PAIR = LossOptions(
    0.9, 0.1, 1.5, regularizer=REGULARIZERS["entropy"], divergence=DIVERGENCES["skl"]
)
INVARIANT = PAIR._replace(mode=modes.INVARIANT)
EXACT = PAIR._replace(mode=modes.EXACT)
ONE_MODEL = PAIR._replace(divergence=0, divergence_weight=0.0)
DISTILL = LossOptions(0.5, 0.0, 4.5, divergence=DISTILLATION, teachers=2, temperature=3.0)


def option_cases(classes: int) -> Iterator[Case]:
    """Every option by itself, at one number of classes."""
    yield Case("uniform_skl", PAIR._replace(regularizer=REGULARIZERS["uniform_skl"]), classes)
    yield Case("top_k", PAIR._replace(top_k=10), classes)
    unnormalised = PAIR._replace(top_k=10, renormalize_top_k=False)
    yield Case("top_k_unnormalised", unnormalised, classes)
    yield Case("l1", PAIR._replace(divergence=DIVERGENCES["l1"]), classes)
    yield Case("sum", PAIR._replace(reduction=REDUCTIONS["sum"]), classes)
    yield Case("ce", PAIR._replace(divergence=DIVERGENCES["ce"]), classes)
    yield Case("temperature", PAIR._replace(temperature=3.0), classes)
    yield Case("label_smoothing", PAIR._replace(label_smoothing=0.1), classes, weighted=True)
    yield Case("report", PAIR, classes, report=True)
    yield Case("reduction_none", PAIR._replace(reduction=REDUCTIONS["none"]), classes)
    yield Case("row_terms", PAIR._replace(reduction=ROW_TERMS), classes)
    yield Case("distillation", DISTILL, classes, models=3)
    yield Case("one_model", ONE_MODEL, classes, models=1)
    yield Case("three_models", PAIR, classes, models=3)
    yield Case("four_models", PAIR, classes, models=4)
    yield Case("float16", PAIR, classes, torch.float16)
    yield Case("float64", PAIR, classes, torch.float64)
    yield Case("invariant", INVARIANT, classes)
    yield Case("invariant_padded", INVARIANT, classes, layout=PADDED)
    yield Case("invariant_offset", INVARIANT, classes, layout=OFFSET)
    yield Case("invariant_odd", INVARIANT, classes - 1)
    yield Case("transposed", PAIR, classes, layout=TRANSPOSED)
    for runs in (2, 5):
        yield Case(f"churn_report_{runs}", None, classes, models=runs, op=CHURN_REPORT)


def exact_cases(classes: int) -> Iterator[Case]:
    """Exact mode with every option that adds code."""
    for case in option_cases(classes):
        if case.options and case.options.mode == 0 and case.dtype != torch.float64:
            yield case._replace(
                name=f"exact_{case.name}", options=case.options._replace(mode=EXACT.mode)
            )


def sum_cases() -> Iterator[Case]:
    """`exact_sum`, which is compiled for any number of numbers."""
    for dtype in DTYPES:
        yield Case("exact_words", None, 1000, dtype, models=1, op=EXACT_SUM)


def hash_cases() -> Iterator[Case]:
    """Hashes that load 16, 4, 2 and 1 bytes at a time, their only difference."""
    for width, first in ((16, 0), (4, 4), (2, 2), (1, 1)):
        yield Case(f"hash_{width}", None, 1000, torch.float32, models=1, op=HASH, first=first)


def all_cases() -> Iterator[tuple[str, Case]]:
    """Each case after the target it is compiled for, in the order of the tables."""
    for target in TARGETS:
        for classes in CLASS_COUNTS:
            for dtype in DTYPES:
                yield target, Case("pair", PAIR, classes, dtype)
                yield target, Case("exact", EXACT, classes, dtype)
        for case in (*sum_cases(), *hash_cases()):
            yield target, case
        if target == "sm_90":
            for classes in (8142, 128256):
                for case in option_cases(classes):
                    yield target, case
            for case in exact_cases(8142):
                yield target, case


def cases_like(globs: Sequence[str]) -> list[tuple[str, Case]]:
    """The cases whose key one of the patterns matches, each after its target."""
    return [
        (target, case)
        for target, case in all_cases()
        if any(fnmatch(case.key(target), glob) for glob in globs)
    ]
