"""Compiles many cases at a time, in processes that load Triton; the caller does not."""

import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat
from multiprocessing import get_context
from pathlib import Path

from benchmarks.compiled.cases import Case
from benchmarks.compiled.code import Kernel

Outcome = list[Kernel] | list[list[str]] | str


def compile_one(target: str, case: Case, keep: Path | None, lint: bool) -> Outcome:
    """A case's compiled code, or the findings in each of its kernels; or the compile error."""
    from benchmarks.compiled.compiler import compile_case, lint_case  # only workers load Triton

    try:
        return (lint_case if lint else compile_case)(target, case, keep)
    except Exception as error:
        reasons = [case.key(target)]
        cause: BaseException | None = error
        while cause is not None:  # a kernel's error comes wrapped in those of its callers
            reasons.append(f"{type(cause).__name__}: {cause}")
            cause = cause.__cause__
        return "\n".join(reasons)


def compile_all(
    jobs: Sequence[tuple[str, Case]], keep: Path | None, lint: bool = False
) -> list[tuple[str, Case, Outcome]]:
    """Every job's outcome, in the order of the jobs; as many at a time as there are cores."""
    targets, cases = zip(*jobs, strict=True)
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:
        outcomes = pool.map(compile_one, targets, cases, repeat(keep), repeat(lint))
        return list(zip(targets, cases, outcomes, strict=True))
