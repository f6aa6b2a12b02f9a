"""Compiles the kernels of a case for a target that need not be present.

The library launches its kernels on CPU tensors, as it would on GPU tensors; Triton is told that the
target is the current device, and stops before the kernel would start.
"""

import os
import subprocess
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from benchmarks.compiled import cases
from benchmarks.compiled.cases import Case
from benchmarks.compiled.code import Kernel, read_amd, read_sass
from benchmarks.compiled.lint import findings
from benchmarks.compiled.targets import TARGETS
from churn_kernels._options import REDUCTIONS, WANT_GRADIENTS, WANT_TERMS
from churn_kernels.modes import EXACT
from churn_kernels.triton import exact_sum, hashing, launch, report
from churn_kernels.triton.plan import Plan
from churn_kernels.triton.spec import Spec

ROWS = 16
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


class Device:
    """A driver of Triton whose only device is the target."""

    def __init__(self, name: str) -> None:
        self.name = name

    def get_current_device(self) -> str:
        """Triton's cache key for compiled kernels."""
        return self.name

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        target = TARGETS[self.name]
        return GPUTarget(target.backend, target.arch, target.warp)


def logits_of(case: Case) -> list[Tensor]:
    """The logits of the case's models, in its layout."""
    shape, dtype = (ROWS, case.classes), case.dtype
    if case.layout == cases.TRANSPOSED:
        return [torch.zeros(shape[::-1], dtype=dtype).t() for _ in range(case.models)]
    if case.layout == cases.PADDED:
        width = -(-case.classes // 64) * 64
        return [torch.zeros(ROWS, width, dtype=dtype)[:, : shape[1]] for _ in range(case.models)]
    start = 1 if case.layout == cases.OFFSET else 0
    return [
        torch.zeros(ROWS * case.classes + start, dtype=dtype)[start:].view(shape)
        for _ in range(case.models)
    ]


def launch_kernels(case: Case) -> None:
    """Call the library's ops: loss, gradients for any upstream gradient, scaling; or another."""
    logits = logits_of(case)
    if case.op == cases.EXACT_SUM:
        exact_sum.exact_round(exact_sum.exact_words(logits[0]))
        return
    if case.op == cases.HASH:
        size = logits[0].nbytes
        hashing.hash_words(logits, [case.first], [size], [size])
        return
    if case.op == cases.CHURN_REPORT:
        report.row_results(logits, 0.5)
        return
    target = torch.zeros(ROWS, dtype=torch.int64)
    weight = torch.ones(case.classes) if case.weighted else None
    reduced = case.options.reduction in (REDUCTIONS["mean"], REDUCTIONS["sum"])
    want = WANT_GRADIENTS * reduced | WANT_TERMS * case.report
    value, record, _, gradients = launch.loss(logits, target, weight, *case.options, want)
    launch.loss_backward(logits, target, weight, record, value, *case.options)
    if gradients:
        launch.scale_(gradients, value, case.options.mode == EXACT)


def plan_of(kernel: str, arguments: Sequence[Any]) -> Plan | None:
    """The plan that a kernel over logits was launched for."""
    if kernel not in ("rows_kernel", "gradient_kernel"):
        return None
    spec = next(argument for argument in arguments if isinstance(argument, Spec))
    return Plan(*(getattr(spec, name).value for name in Plan._fields))


def compiled_by(launch_all: Callable[[], object], target: str) -> list[tuple[Any, Plan | None]]:
    """The kernels that `launch_all` launches, each once, with its plan."""
    found = {}
    run = JITFunction.run

    def compile_only(kernel: Any, *arguments: Any, warmup: bool, **options: Any) -> None:
        compiled = run(kernel, *arguments, warmup=True, **options)
        found.setdefault(compiled.hash, (compiled, plan_of(compiled.name, arguments)))

    driver.set_active(Device(target))
    launch.on_nvidia.cache_clear()  # the library assumes one kind of GPU per process
    JITFunction.run = compile_only
    try:
        launch_all()
    finally:
        JITFunction.run = run
    return list(found.values())


def disassemble(compiled: Any) -> str:
    """The kernel's SASS and resources, cached next to its cubin in Triton's cache."""
    cubin = Path(compiled.metadata_group[f"{compiled.name}.cubin"])
    listing = cubin.with_suffix(".sass")
    if not listing.exists():
        command = [CUOBJDUMP, "-sass", "-res-usage", cubin]
        result = subprocess.run(command, capture_output=True, text=True, check=True)
        part = listing.with_suffix(f".{os.getpid()}")
        part.write_text(result.stdout)
        part.replace(listing)  # another worker may read it meanwhile
    return listing.read_text()


def texts_of(compiled: Any) -> dict[str, str]:
    """The kernel's compiled code by kind: Triton IR, LLVM IR, assembly, SASS."""
    kinds = ("ttgir", "llir", "ptx", "amdgcn")
    texts = {kind: compiled.asm[kind] for kind in kinds if kind in compiled.asm}
    if "ptx" in texts:
        texts["sass"] = disassemble(compiled)
    return texts


def kernels_of(
    target: str, case: Case, keep: Path | None
) -> Iterator[tuple[Any, Plan | None, dict[str, str]]]:
    """The kernels of a case with their plans and texts; files of those below `keep`, if given."""
    for compiled, plan in compiled_by(partial(launch_kernels, case), target):
        texts = texts_of(compiled)
        if keep is not None:
            folder = keep / case.key(target)
            folder.mkdir(parents=True, exist_ok=True)
            for kind, text in texts.items():
                (folder / f"{compiled.name}.{kind}").write_text(text)
        yield compiled, plan, texts


def compile_case(target: str, case: Case, keep: Path | None) -> list[Kernel]:
    """The kernels of a case, with their code."""
    found = []
    for compiled, plan, texts in kernels_of(target, case, keep):
        if "sass" in texts:
            code = read_sass(texts["sass"])
        else:
            code = read_amd(texts["amdgcn"], compiled.name)
        metadata = compiled.metadata
        found.append(Kernel(compiled.name, plan, metadata.num_warps, metadata.shared, code))
    return found


def lint_case(target: str, case: Case, keep: Path | None) -> list[list[str]]:
    """Findings in each kernel of a case that exact mode forbids; see `lint`."""
    return [
        findings(f"{case.key(target)}: {compiled.name}", texts)
        for compiled, _, texts in kernels_of(target, case, keep)
    ]
