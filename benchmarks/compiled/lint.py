"""Searches the compiled code of exact mode's kernels for forbidden instructions.

Exact mode has the same bits on every backend. So its kernels use only IEEE arithmetic, each
operation rounded once, to nearest; they keep subnormal numbers; they fuse only what the source
fuses; and no floating-point sum runs over threads, whose order is undefined. A spill changes no
bit, but costs speed. A finding is "kernel: rule: offending line".
"""

import re
from collections.abc import Iterable, Iterator, Mapping

from benchmarks.compiled.code import SASS_LINE

APPROXIMATION = "approximation"
FLUSH = "flush to zero"
FUSED = "fused"
ORDER = "order"
ROUNDING = "rounding"
SPILL = "spill"

Finding = tuple[str, str]  # rule, offending line
Statement = tuple[str, str]  # of PTX: its operation, all of it

# Operations of the dialect `math` that do not round.
SAME_EVERYWHERE = {"fma", "absf", "absi"}
# Flags that let LLVM deviate from IEEE rounding; it infers `nnan` and the like by itself.
FREEDOM = re.compile(r"\b(fast|contract|reassoc|afn|arcp)\b|@llvm\.fmuladd\b")
LLVM_FMA = re.compile(r"\bcall\b[^@\n]*@llvm\.(?:fma\.(?:v(\d+))?f32|nvvm\.fma\.rn\.f)\(")
LLVM_INSTRUCTION = re.compile(r"\s+(%\S+ = )?(tail |musttail )?[a-z]+ ")

PTX_STATEMENT = re.compile(r"[{}\s]*(?:@!?%\w+\s+)?([a-z][\w.:]*)\s")
PTX_FLOAT = re.compile(r"(b?f16|b?f16x2|f32|f32x2|f64)$")
ROUNDED = {"add", "sub", "mul", "div", "fma", "mad", "rcp", "sqrt"}
OTHER_ROUNDINGS = {"rz", "rm", "rp", "rna", "rs"}
ESTIMATES = {"ex2", "lg2", "sin", "cos", "tanh", "rsqrt"}
TENSOR_CORES = {"mma", "wmma", "wgmma", "tcgen05"}
ATOMICS = {"atom", "red", "multimem"}

# How NVIDIA's compiler divides: from an estimate to the IEEE quotient. Of float32, the rare cases
# are a subroutine of its own, behind the kernel.
QUOTIENT_32 = re.compile(r"\b(div|rcp)\.rn\.f32\b")
QUOTIENT_64 = re.compile(r"\b(div|rcp)\.rn\.f64\b")
QUOTIENT_INTEGER = re.compile(r"\b(div|rem)\.[su](32|64)\b")
INTEGER_QUOTIENT = "F2I.FTZ.U32.TRUNC.NTZ"


def ttgir_findings(text: str) -> Iterator[Finding]:
    """Findings in Triton IR: approximate functions, fast-math flags, sums of floats."""
    reduces = 0  # depth of braces within a reduction
    for line in map(str.strip, text.splitlines()):
        found = re.search(r"= math\.(\w+)", line)
        if (found and found[1] not in SAME_EVERYWHERE) or "tt.extern_elementwise" in line:
            yield APPROXIMATION, line
        if "fastmath<" in line:
            yield FUSED, line
        if re.search(r"\btt\.dot(_scaled)?\b|= ttng?\.\w*mma\w*", line):
            yield ORDER, line
        if '"tt.reduce"' in line or '"tt.scan"' in line:
            reduces = 1
        elif reduces:
            reduces += line.count("({") - line.count("})")
            # float64 sums count rows: integers, whose sum does not depend on order.
            if re.search(r"= arith\.(addf|mulf) .*: (f16|bf16|f32)\b", line):
                yield ORDER, line


def llir_findings(text: str) -> Iterator[Finding]:
    """Findings in LLVM IR: fast-math flags that the source does not have."""
    for line in text.splitlines():
        if LLVM_INSTRUCTION.match(line) and FREEDOM.search(line.partition(", !dbg")[0]):
            yield FUSED, line.strip()


def ptx_statements(text: str) -> Iterator[Statement]:
    """The statements of a kernel's PTX, without its debugging sections."""
    code = re.split(r"^\s*\.section\b", text, maxsplit=1, flags=re.MULTILINE)[0]
    for line in code.splitlines():
        for statement in line.partition("//")[0].split(";"):
            if found := PTX_STATEMENT.match(statement + " "):
                yield found[1], " ".join(statement.split()).lstrip("{} ")


def ptx_rules(operation: str) -> Iterator[str]:
    """The rules that an operation of PTX breaks."""
    base, *parts = operation.split(".")
    floating = any(map(PTX_FLOAT.match, parts))
    if "ftz" in parts:
        yield FLUSH
    if base in ESTIMATES or "approx" in parts or "full" in parts:
        yield APPROXIMATION
    elif (base in ROUNDED and floating and "rn" not in parts) or OTHER_ROUNDINGS & set(parts):
        yield ROUNDING  # without a rounding mode the operation may be fused
    if base in {"fma", "mad"} and "f64" in parts:
        yield FUSED  # a row's scalars are never fused
    if base in TENSOR_CORES or (base in ATOMICS and floating and "add" in parts):
        yield ORDER


def ptx_findings(statements: Iterable[Statement]) -> Iterator[Finding]:
    for operation, statement in statements:
        for rule in ptx_rules(operation):
            yield rule, statement


def fused_findings(llir: str, statements: Iterable[Statement]) -> Iterator[Finding]:
    """Findings of fused multiply-adds in PTX beyond those in LLVM IR.

    LLVM adds none before instruction selection, unless an instruction says `contract`.
    """
    written = sum(int(lanes or 1) for lanes in LLVM_FMA.findall(llir))
    made = {"f32": 1, "f32x2": 2}
    found = sum(
        made.get(operation.rpartition(".")[2], 0)
        for operation, _ in statements
        if operation.startswith(("fma.", "mad."))
    )
    if found > written:
        yield FUSED, f"{found} fused multiply-adds of float32 in PTX, {written} in LLVM's code"


def sass_findings(listing: str, statements: Iterable[Statement]) -> Iterator[Finding]:
    """Findings in machine code that PTX's divisions do not explain."""
    operations = " ".join({operation for operation, _ in statements})
    quotient_32, quotient_64, quotient_integer = (
        bool(pattern.search(operations)) for pattern in (QUOTIENT_32, QUOTIENT_64, QUOTIENT_INTEGER)
    )
    fuses = bool(re.search(r"\bfma\.rn\.f32(x2)?\b", operations))
    lines = [
        (int(address, 16), name, f"{name}{operands}".rstrip())
        for address, _, name, operands in SASS_LINE.findall(listing)
    ]
    calls = [line.rpartition("0x")[2] for _, name, line in lines if name.startswith("CALL.REL")]
    subroutines = min((int(place, 16) for place in calls), default=None)
    for address, name, line in lines:
        base, *parts = name.split(".")
        rare = quotient_32 and subroutines is not None and address >= subroutines
        if "FTZ" in parts and not rare and not (quotient_integer and name == INTEGER_QUOTIENT):
            yield FLUSH, line
        if base == "MUFU":
            explained = {
                "RCP": quotient_32 or quotient_integer,
                "RCP64H": quotient_64,
                "RSQ": rare,  # of -NaN: how the subroutine makes a NaN
            }
            if not explained.get(parts[0], False):
                yield APPROXIMATION, line
        if base in {"FFMA", "FFMA2"} and not (
            fuses
            or quotient_32
            or quotient_integer
            # How a division of float64 looks at its quotient's exponent: 0 * x + quotient.
            or (quotient_64 and re.match(r"FFMA \w+, RZ, ", line))
        ):
            yield FUSED, line
        if base == "DFMA" and not quotient_64:
            yield FUSED, line
        if base in {"HMMA", "IMMA", "HGMMA", "UTCHMMA", "UTCQMMA"}:
            yield ORDER, line
        if base in {"LDL", "STL"}:
            yield SPILL, line
    stack = re.search(r"\bSTACK:(\d+)", listing)
    if stack and int(stack[1]):
        yield SPILL, stack[0]


def findings(kernel: str, texts: Mapping[str, str]) -> list[str]:
    """Findings in a kernel that exact mode forbids.

    Args:
        kernel: its name, with which the findings begin.
        texts: of the kernel, by kind: "ttgir", "llir", "ptx", "sass", or some of them; "sass" comes
            with "ptx", which explains it.
    """
    found: list[Finding] = []
    if "ttgir" in texts:
        found += ttgir_findings(texts["ttgir"])
    if "llir" in texts:
        found += llir_findings(texts["llir"])
    statements = list(ptx_statements(texts.get("ptx", "")))
    found += ptx_findings(statements)
    if "llir" in texts and "ptx" in texts:
        found += fused_findings(texts["llir"], statements)
    if "sass" in texts:
        found += sass_findings(texts["sass"], statements)
    return [f"{kernel}: {rule}: {line}" for rule, line in found]
