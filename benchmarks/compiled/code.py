"""Parses machine code, NVIDIA's SASS or AMD's assembly, for the tables."""

import re
from collections.abc import Callable
from typing import NamedTuple

from benchmarks.compiled.loops import Instruction, innermost_loops
from churn_kernels.triton.plan import Plan


class Code(NamedTuple):
    """Resources and instructions of a kernel. Bytes are per thread."""

    registers: int
    stack: int  # bytes
    spills: int  # bytes that spills store, and that they load, added up
    loads: int  # of 16 bytes, from global memory
    stores: int
    special: int  # exp2, log2, reciprocal: a quarter of the rate of an addition, or less
    shuffles: int  # between the threads of a warp
    barriers: int
    instructions: int
    loops: tuple[int, ...]  # instructions of each innermost loop


SASS_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);")
SASS_BYTES = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}
AMD_LINE = re.compile(r"\s+([a-z]\w+)(?:\s+([^;]*))?")


def sass_instructions(listing: str) -> list[Instruction]:
    """The kernel as `cuobjdump -sass` prints it, without padding at its end."""
    found = []
    for address, condition, name, operands in SASS_LINE.findall(listing):
        jump = re.search(r"0x([0-9a-f]+)\s*$", operands) if name.startswith("BRA") else None
        at = int(address, 16)
        target = int(jump[1], 16) if jump else None
        leaves = re.match(r"(BRA|EXIT|RET)\b", name) and not condition and "," not in operands
        if name != "NOP" and target != at:
            found.append(Instruction(at, name, target, not leaves))
    return found


def amd_instructions(assembly: str, kernel: str) -> list[Instruction]:
    """The kernel's part of an assembly without s_nop; an address is the index in this list."""
    body = assembly.partition(f"\n{kernel}:")[2].partition("\n.Lfunc_end")[0]
    labels: dict[str, int] = {}
    names: list[tuple[str, str]] = []
    for line in body.splitlines():
        if label := re.match(r"(\.L\w+):", line):
            labels[label[1]] = len(names)
        elif (found := AMD_LINE.match(line)) and found[1] != "s_nop":
            names.append((found[1], (found[2] or "").strip()))
    return [
        Instruction(
            at,
            name,
            labels.get(operands) if "branch" in name else None,
            name not in ("s_branch", "s_endpgm"),
        )
        for at, (name, operands) in enumerate(names)
    ]


def counter(instructions: list[Instruction]) -> Callable[[str], int]:
    """A function that counts the instructions whose name a pattern matches from the start."""
    return lambda pattern: sum(bool(re.match(pattern, i.name)) for i in instructions)


def read_sass(listing: str) -> Code:
    """Code of a kernel from `cuobjdump -sass -res-usage`."""
    usage = re.search(r"REG:(\d+) STACK:(\d+)", listing)
    if usage is None:
        raise ValueError("the listing has no line 'REG:.. STACK:..'; pass -res-usage to cuobjdump")
    instructions = sass_instructions(listing)
    count = counter(instructions)
    local = [i.name.split(".") for i in instructions if re.match(r"(LDL|STL)\b", i.name)]
    return Code(
        registers=int(usage[1]),
        stack=int(usage[2]),
        spills=sum(
            max((SASS_BYTES.get(part, 4) for part in name[1:]), default=4) for name in local
        ),
        loads=count(r"LDG\.(.*\.)?128"),
        stores=count(r"STG\.(.*\.)?128"),
        special=count("MUFU"),
        shuffles=count("SHFL|REDUX|CREDUX"),
        barriers=count(r"BAR\b"),
        instructions=len(instructions),
        loops=innermost_loops(instructions),
    )


def read_amd(assembly: str, kernel: str) -> Code:
    """Code of a kernel from AMD's assembly, with the metadata at its end."""

    def fact(name: str) -> int:
        return int(re.search(rf"\.{name}:\s+(\d+)", assembly)[1])

    instructions = amd_instructions(assembly, kernel)
    count = counter(instructions)
    return Code(
        registers=fact("vgpr_count"),
        stack=fact("private_segment_fixed_size"),
        spills=4 * (fact("vgpr_spill_count") + fact("sgpr_spill_count")),
        loads=count("(global|buffer|flat)_load_dwordx4$"),
        stores=count("(global|buffer|flat)_store_dwordx4$"),
        special=count("v_(exp|log|rcp|rsq|sqrt)_"),
        shuffles=count(r"\w+_dpp$|ds_b?permute|ds_swizzle|v_permlane|v_readlane"),
        barriers=count("s_barrier"),
        instructions=len(instructions),
        loops=innermost_loops(instructions),
    )


class Kernel(NamedTuple):
    """A compiled kernel: how it is launched, and its code."""

    name: str
    plan: Plan | None  # None: the kernel has no plan
    warps: int
    shared: int  # bytes of a program
    code: Code
