"""A target's page: one table per kernel, one line per case."""

import re
from collections.abc import Iterable

from benchmarks.compiled.cases import Case
from benchmarks.compiled.code import Kernel
from benchmarks.compiled.targets import TARGETS, resident_programs
from benchmarks.table import markdown
from churn_kernels.triton.plan import Plan

HEADER = [
    "loss/classes/dtype",
    "plan",
    "threads",
    "registers",
    "stack",
    "spills",
    "shared",
    "programs",
    "loads",
    "stores",
    "special",
    "shuffles",
    "barriers",
    "instructions",
    "a class",
]

NOTES = """\
What the kernels of `churn_kernels.triton` compile to for {target}, with Triton {triton}. Nothing
here was run; `python -m benchmarks.compiled` repeats it without a GPU.

- plan: its name, parts (or rows) x classes of each, and the classes that a load takes; "+" where
  rows begin between two such places, "again" where the gradient loads a resident row once more.
- registers, stack, spills: of a thread; the last two in bytes, what spills store and what they load
  added up.
- shared: bytes of a program. programs: how many a processor runs at a time.
- loads, stores: of 16 bytes, from and to global memory. special: exp2, log2, reciprocal. shuffles:
  between the threads of a warp.
- instructions: of the whole kernel. a class: of one thread, for one class of all models; where rows
  are read in sweeps, of one round of each innermost loop, which is two blocks where the compiler
  unrolled it.
"""


def plan_cell(plan: Plan) -> str:
    count = plan.parts if plan.wide else plan.height
    ends = ("+" if plan.shift else "") + (", again" if plan.again else "")
    return f"{plan.name} {count} x {plan.width} by {plan.vector}{ends}"


def instructions_of_a_class(kernel: Kernel, plan: Plan, threads: int, classes: int) -> str:
    """Instructions for one class of all models, of the whole kernel or of each of its loops."""
    covered = min(plan.block, classes) * plan.height
    parts = [kernel.code.instructions]
    if kernel.code.loops and not plan.resident:
        parts = list(kernel.code.loops)
    return " + ".join(f"{part * threads / covered:.1f}" for part in parts)


def cells(target: str, case: Case, kernel: Kernel) -> list[str]:
    code, facts = kernel.code, TARGETS[target]
    threads = kernel.warps * facts.warp
    plan = a_class = ""
    if kernel.plan is not None:
        plan = plan_cell(kernel.plan)
        a_class = instructions_of_a_class(kernel, kernel.plan, threads, case.classes)
    numbers = [
        threads,
        code.registers,
        code.stack,
        code.spills,
        kernel.shared,
        resident_programs(facts, kernel.warps, code.registers, kernel.shared),
        code.loads,
        code.stores,
        code.special,
        code.shuffles,
        code.barriers,
        code.instructions,
    ]
    return [case.label, plan, *map(str, numbers), a_class]


def page(target: str, triton: str, compiled: Iterable[tuple[Case, list[Kernel]]]) -> str:
    """The page of a target, from the compiled code of its cases."""
    tables: dict[str, list[list[str]]] = {}
    for case, kernels in compiled:
        for kernel in kernels:
            tables.setdefault(kernel.name, []).append(cells(target, case, kernel))
    notes = NOTES.format(target=target, triton=triton)
    sections = [markdown(name, HEADER, tables[name]) for name in sorted(tables)]
    return "\n".join([f"# {target}", "", notes, *sections])


def triton_version(text: str) -> str:
    """The Triton version of a page."""
    return re.search(r"with Triton (\S+)\.\s", text)[1]


def lines_of(text: str) -> dict[tuple[str, str, str], dict[str, str]]:
    """The lines of one page or several, by target, kernel and case; each by its header."""
    found = {}
    target = kernel = ""
    for line in text.splitlines():
        if line.startswith("# "):
            target = line.removeprefix("# ")
        elif line.startswith("## "):
            kernel = line.removeprefix("## ")
        elif line.startswith("| ") and not line.startswith(("| ---", f"| {HEADER[0]} ")):
            case, *rest = line[2:-2].split(" | ")
            found[target, kernel, case] = dict(zip(HEADER[1:], rest, strict=True))
    return found
