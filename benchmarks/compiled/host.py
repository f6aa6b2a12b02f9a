"""Searches the compiled library's disassembled objects for instructions forbidden in exact mode.

The sweeps of exact mode are those that accumulate in `FixedSum`; a row's scalars and the batch's
sums are the rest of the library. A finding is "object: function: rule: offending line".
"""

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.compiled.lint import APPROXIMATION, FUSED

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"

EXTENDED = "extended precision"

# Of x86-64 and of ARM, in objdump's syntax.
ESTIMATE = re.compile(r"v?(rcp|rsqrt)\w*|vexp2\w*|frecp\w*|frsqrt\w*")
FUSED_MULTIPLY_ADD = re.compile(r"v?fn?m(add|sub)\w*|fml[as]\w*")
FLOAT64 = re.compile(r"v\w+[ps]d\s|fn?m\w+\s+d\d|fml[as]\s+v\d+\.2d|fml[as]\s+d\d")
X87 = re.compile(r"f(ld|st|add|sub|mul|div|sqrt|2xm1|yl2x|sin|cos|ptan|patan|scale)\w*")
ARM_REGISTER = re.compile(r"\b[bhsdqv]\d+\b")  # whose operations have names like x87's
NARROWED = re.compile(r"cvts?p?d2p?ss?")

CONTRACTION = re.compile(r"-ffp-contract=(\w+)")
RELAXED = re.compile(
    r"-ffast-math|-Ofast|-funsafe-math-optimizations|-fassociative-math|-freciprocal-math"
    r"|-ffinite-math-only|-mfpmath=387|-mrecip\S*"
)

Functions = Mapping[str, Sequence[str]]  # instructions, by demangled name


class Object(NamedTuple):
    """An object file of the library, and its source."""

    name: str  # its source, and the instruction set if it is compiled once for each
    file: Path
    command: str

    @property
    def sweeps(self) -> bool:
        """Whether it holds sweeps, of all modes, rather than scalars."""
        return self.name.startswith("kernels.cpp")


def objects(build: Path = BUILD) -> list[Object]:
    """The objects that exact mode runs; none if they were not built, or without objdump."""
    commands = build / "compile_commands.json"
    found: list[Object] = []
    if not commands.exists() or shutil.which("objdump") is None:
        return found
    for entry in json.loads(commands.read_text()):
        source, command = Path(entry["file"]).name, entry["command"]
        words = shlex.split(command)
        isa = next((w.removeprefix("-DCK_ISA=") for w in words if w.startswith("-DCK_ISA=")), None)
        exact = (
            isa != "baseline"
            if isa
            else source in {"row_scales.cpp", "row_work.cpp", "loss.cpp", "exact_sum.cpp"}
        )
        if exact:
            file = build / words[words.index("-o") + 1]
            found.append(Object(f"{source} {isa}" if isa else source, file, command))
    return found


def disassemble(file: Path) -> str:
    command = ["objdump", "-d", "--demangle", "--no-show-raw-insn", str(file)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def functions(listing: str) -> dict[str, list[str]]:
    """The instructions of each function of a listing of objdump's."""
    found: dict[str, list[str]] = {}
    instructions: list[str] = []
    for line in listing.splitlines():
        if head := re.match(r"[0-9a-f]+ <(.*)>:$", line):
            instructions = found.setdefault(head[1], [])
        elif (parts := line.split("\t", 1))[1:] and parts[0].strip().endswith(":"):
            instructions.append(parts[1].strip())
    return found


def of_exact_mode(code: Functions) -> dict[str, Sequence[str]]:
    """The sweeps that accumulate in fixed point."""
    return {name: code[name] for name in code if "FixedSum" in name}


def command_findings(command: str) -> Iterator[str]:
    """Findings in a compiler command: flags that allow fusing or inexact arithmetic."""
    contraction = CONTRACTION.findall(command)
    if contraction[-1:] != ["off"]:
        yield f"{FUSED}: compiled without -ffp-contract=off at the end"
    for flag in RELAXED.findall(command):
        yield f"{APPROXIMATION}: compiled with {flag}"


def code_findings(code: Functions, fuses: bool) -> Iterator[str]:
    """Findings in functions: approximations, fused multiply-adds, x87.

    Args:
        code: the functions.
        fuses: the source says `mul_add` of float32 where the target has it; else nothing fuses.
    """
    for name, instructions in code.items():
        for line in instructions:
            operation = line.split()[0] if line else ""
            if ESTIMATE.fullmatch(operation):
                yield f"{name}: {APPROXIMATION}: {line}"
            if FUSED_MULTIPLY_ADD.fullmatch(operation) and not (fuses and not FLOAT64.match(line)):
                yield f"{name}: {FUSED}: {line}"
            if X87.fullmatch(operation) and not ARM_REGISTER.search(line):
                yield f"{name}: {EXTENDED}: {line}"


def sweep_of(name: str) -> str:
    """The class of a function, without its instruction set: "Fused<float, 2, FixedSum>"."""
    plain = re.sub(r"\bck::\w+::", "", name)
    found = re.search(r"\b(Fused|General)<(?:[^<>]|<[^<>]*>)*>", plain)
    return found[0] if found else ""


def software_findings(code: Functions) -> Iterator[str]:
    """Findings in sweeps without fma, which must round their multiply-adds through float64."""
    operations: dict[str, list[str]] = {}
    for name, instructions in code.items():
        if sweep := sweep_of(name):
            found = operations.setdefault(sweep, [])
            found += [line.split()[0] for line in instructions if line]
    for sweep, found in operations.items():
        products = sum(operation in ("mulsd", "mulpd") for operation in found)
        rounded = sum(bool(NARROWED.fullmatch(operation)) for operation in found)
        if not 0 < products <= rounded:
            yield f"{sweep}: {FUSED}: {products} products in float64, {rounded} rounded to float32"


def object_findings(one: Object) -> Iterator[str]:
    """Findings in an object that exact mode forbids."""
    yield from command_findings(one.command)
    code: Functions = functions(disassemble(one.file))
    software = "-DCK_SOFTWARE_FMA" in one.command
    if one.sweeps:
        code = of_exact_mode(code)
        if not code:
            yield "no sweep adds up in FixedSum"
    yield from code_findings(code, fuses=one.sweeps and not software)
    if software:
        yield from software_findings(code)


def library_findings(build: Path = BUILD) -> list[str]:
    """Findings in the library's objects that exact mode forbids."""
    return [f"{one.name}: {line}" for one in objects(build) for line in object_findings(one)]
