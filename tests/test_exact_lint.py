"""Exact mode's compiled code holds nothing that another machine would compute otherwise.

Each rule has its negative controls: lines, small kernels, small functions and the fast mode, all of
which it must find.
"""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.compiled import host, lint

ROOT = Path(__file__).parents[1]

# Of each plan and target one pair, and the options with code of their own; the rest by night.
FAST = "sm_90/pair/10/bfloat16"
GLOBS = [
    "sm_80/exact/8142/bfloat16",
    "sm_90/exact/1000/float32",
    "sm_100/exact/10/bfloat16",
    "sm_90/exact_distillation/*",
    "sm_90/exact_label_smoothing/*",
    "sm_90/exact_report/*",
    "sm_90/exact_words/*/float32",
]


def run(*arguments):
    """Runs a module of this tree without Triton's interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment.setdefault("TRITON_CACHE_DIR", str(ROOT / "build/triton"))
    command = [sys.executable, "-m", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def lint_kernels(globs):
    """Findings, and the number of kernels that were looked at."""
    done = run(
        "benchmarks.compiled", "--lint", *(word for glob in globs for word in ("--only", glob))
    )
    *findings, last = done.stdout.splitlines() or [""]
    assert not done.stderr, done.stderr
    found = re.fullmatch(r"(\d+) findings in (\d+) kernels", last)
    assert found, done.stdout
    assert (int(found[1]), bool(done.returncode)) == (len(findings), bool(findings))
    return findings, int(found[2])


def rules_of(findings):
    return {line.split(": ")[1] for line in findings}


class TestKernels:
    @pytest.fixture(autouse=True)
    def _needs_triton(self):
        pytest.importorskip("triton", reason="no Triton here")

    def test_exact_mode_has_no_findings_and_fast_mode_has(self):
        findings, kernels = lint_kernels([*GLOBS, FAST])
        assert kernels >= 5 * 7 + 2
        fast = [line.removeprefix(f"{FAST}: ") for line in findings if line.startswith(FAST)]
        assert [line for line in findings if not line.startswith(FAST)] == []
        assert {lint.APPROXIMATION, lint.ORDER} <= rules_of(fast)
        for sign in ("math.exp2", "ex2.approx", "MUFU.EX2"):
            assert any(line.startswith("rows_kernel") and sign in line for line in fast), sign

    @pytest.mark.nightly
    def test_every_kernel_of_exact_mode(self):
        findings, kernels = lint_kernels(["sm_*/exact*"])
        assert findings == []
        assert kernels > 200

    def test_finds_fault_with_the_controls(self):
        done = run("tests.lint_kernels")
        assert done.returncode == 0, done.stderr
        findings = json.loads(done.stdout)
        # The kernel's rules, and what must be among the lines.
        expected = {
            "faultless": ((), ()),
            "exponential": ((lint.APPROXIMATION, lint.FLUSH), ("math.exp2", "ex2.", "MUFU.EX2")),
            "library_function": ((lint.APPROXIMATION,), ("extern_elementwise", "ex2.", "MUFU.EX2")),
            "quotient": ((lint.APPROXIMATION,), ("div.full.f32", "MUFU.RCP")),
            "contracted": ((lint.FUSED,), ("multiply-adds of float32 in PTX, 0 in",)),
            "contracted_float64": ((lint.FUSED,), ("fma.rn.f64", "DFMA")),
            "fused_float64": ((lint.FUSED,), ("fma.rn.f64", "DFMA")),
            "sum_of_floats": ((lint.ORDER,), ("arith.addf",)),
            "atomic_sum": ((lint.ORDER, lint.FLUSH), ("red.", ".FTZ")),
            "crowded": ((lint.SPILL,), ("STL", "LDL", "STACK:")),
        }
        assert findings.keys() == expected.keys()
        for kernel, (rules, signs) in expected.items():
            assert set(rules) <= rules_of(findings[kernel]), kernel
            for sign in signs:
                assert any(sign in line for line in findings[kernel]), (kernel, sign)
        assert findings["faultless"] == []


class TestRulesOfPtx:
    @pytest.mark.parametrize(
        ("rule", "statement"),
        [
            (lint.FLUSH, "add.rn.ftz.f32 %r1, %r2, %r3;"),
            (lint.FLUSH, "@%p1 setp.lt.ftz.f32 %p2, %r1, %r2;"),
            (lint.FLUSH, "{ .reg .b32 t; cvt.ftz.f32.f16 t, h; }"),
            (lint.APPROXIMATION, "ex2.approx.f32 %r1, %r2;"),
            (lint.APPROXIMATION, "lg2.approx.f32 %r1, %r2;"),
            (lint.APPROXIMATION, "rcp.approx.f32 %r1, %r2;"),
            (lint.APPROXIMATION, "@!%p3 sqrt.approx.f32 %r1, %r2;"),
            (lint.APPROXIMATION, "rsqrt.approx.f64 %rd1, %rd2;"),
            (lint.APPROXIMATION, "div.full.f32 %r1, %r2, %r3;"),
            (lint.ROUNDING, "mul.f32 %r1, %r2, %r3;"),
            (lint.ROUNDING, "add.f64 %rd1, %rd2, %rd3;"),
            (lint.ROUNDING, "mul.f32x2 %rd1, %rd2, %rd3;"),
            (lint.ROUNDING, "add.rz.f32 %r1, %r2, %r3;"),
            (lint.ROUNDING, "cvt.rz.f16.f32 %rs1, %r1;"),
            (lint.FUSED, "fma.rn.f64 %rd1, %rd2, %rd3, %rd4;"),
            (lint.FUSED, "mad.rn.f64 %rd1, %rd2, %rd3, %rd4;"),
            (lint.ORDER, "atom.global.gpu.relaxed.add.f32 %r1, [%rd1], %r2;"),
            (lint.ORDER, "red.global.add.f64 [%rd1], %rd2;"),
            (lint.ORDER, "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%r1}, {%r2};"),
        ],
    )
    def test_finds(self, rule, statement):
        text = (
            f".entry kernel()\n{{\n\t{statement} // {statement}\n}}\n\t.section .debug\n{statement}"
        )
        assert [line.split(": ")[1] for line in lint.findings("kernel", {"ptx": text})] == [rule]

    @pytest.mark.parametrize(
        "statement",
        [
            "add.rn.f32 %r1, %r2, %r3;",
            "fma.rn.f32 %r1, %r2, %r3, %r4;",
            "div.rn.f64 %rd1, %rd2, %rd3;",
            "div.s32 %r1, %r2, %r3;",
            "mad.lo.s32 %r1, %r2, %r3, %r4;",
            "cvt.rzi.s64.f32 %rd1, %r1;",
            "cvt.rn.f16.f32 %rs1, %r1;",
            "max.f32 %r1, %r2, %r3;",
            "atom.global.gpu.relaxed.add.u64 %rd1, [%rd2], %rd3;",
            "mov.b32 %r1, 0f3F800000; // ex2.approx.ftz.f32",
        ],
    )
    def test_keeps_quiet(self, statement):
        assert lint.findings("kernel", {"ptx": f"{{\n\t{statement}\n}}"}) == []


class TestRulesOfSass:
    @staticmethod
    def findings(*lines, ptx="add.rn.f32 %r1, %r2, %r3;"):
        listing = "REG:32 STACK:0\n" + "\n".join(
            f"        /*{16 * place:04x}*/                   {line} ;   /* 0x0 */"
            for place, line in enumerate(lines)
        )
        return lint.findings("kernel", {"ptx": ptx, "sass": listing})

    @pytest.mark.parametrize(
        ("rule", "line"),
        [
            (lint.FLUSH, "FADD.FTZ R1, R2, R3"),
            (lint.FLUSH, "FSETP.GEU.FTZ.AND P0, PT, R0, R1, PT"),
            (lint.FLUSH, "F2I.FTZ.U32.TRUNC.NTZ R4, R2"),
            *((lint.APPROXIMATION, f"MUFU.{name} R1, R2") for name in ("EX2", "LG2", "SIN", "COS")),
            *((lint.APPROXIMATION, f"MUFU.{name} R1, R2") for name in ("RSQ", "RCP", "RCP64H")),
            (lint.FUSED, "FFMA R1, R2, R3, R4"),
            (lint.FUSED, "DFMA R2, R4, R6, R8"),
            (lint.ORDER, "HMMA.16816.F32 R4, R8, R2, R4"),
            (lint.SPILL, "STL.64 [R1], R108"),
            (lint.SPILL, "LDL.LU.64 R6, [R1]"),
        ],
    )
    def test_finds(self, rule, line):
        assert self.findings("@P0 " + line) == [f"kernel: {rule}: {line}"]

    def test_a_stack_is_a_spill(self):
        texts = {"ptx": "", "sass": "REG:128 STACK:8"}
        assert lint.findings("kernel", texts) == ["kernel: spill: STACK:8"]

    def test_divisions_explain_their_own_instructions(self):
        wide = ("MUFU.RCP64H R3, R5", "DFMA R6, -R4, R2, 1", "FFMA R0, RZ, R15, R3")
        assert self.findings(*wide, ptx="div.rn.f64 %rd1, %rd2, %rd3;") == []
        narrow = ("MUFU.RCP R3, R5", "FFMA R6, -R4, R2, 1", "CALL.REL.NOINC 0x40", "EXIT")
        rare = ("FADD.FTZ R81, -R82, -RZ", "MUFU.RSQ R34, -QNAN ")
        ptx = "div.rn.f32 %r1, %r2, %r3;"
        assert self.findings(*narrow, *rare, ptx=ptx) == []
        assert len(self.findings(*rare, *narrow, ptx=ptx)) == 2  # the subroutine's alone
        integer = ("MUFU.RCP R2, R2", "F2I.FTZ.U32.TRUNC.NTZ R4, R2")
        assert self.findings(*integer, ptx="div.s32 %r1, %r2, %r3;") == []


class TestRulesOfIntermediateCode:
    @pytest.mark.parametrize(
        ("kind", "rule", "line"),
        [
            ("llir", lint.FUSED, "  %3 = fmul contract float %1, %2"),
            ("llir", lint.FUSED, "  %3 = fadd fast float %1, %2, !dbg !3"),
            ("llir", lint.FUSED, "  %3 = tail call afn float @llvm.exp2.f32(float %1)"),
            (
                "llir",
                lint.FUSED,
                "  %3 = call float @llvm.fmuladd.f32(float %1, float %2, float %2)",
            ),
            ("ttgir", lint.FUSED, "%3 = arith.mulf %1, %2 fastmath<fast> : tensor<8xf32>"),
            ("ttgir", lint.APPROXIMATION, "%3 = math.log %1 : tensor<8xf32>"),
            ("ttgir", lint.ORDER, "%3 = tt.dot %1, %2, %0 : tensor<16x16xf32>"),
        ],
    )
    def test_finds(self, kind, rule, line):
        assert lint.findings("kernel", {kind: line}) == [f"kernel: {rule}: {line.strip()}"]

    @pytest.mark.parametrize(
        ("kind", "line"),
        [
            ("llir", "  %3 = fadd nnan double %1, 1.000000e+00"),  # LLVM's own discovery
            ("llir", "  %3 = tail call fastcc float @name(float %1), !dbg !3"),
            ("ttgir", "%3 = math.fma %0, %1, %2 : tensor<8xf32>"),
            ("ttgir", '%3 = arith.addf %1, %2 : f64 loc("math.exp")'),
        ],
    )
    def test_keeps_quiet(self, kind, line):
        assert lint.findings("kernel", {kind: line}) == []

    def test_counts_what_is_fused(self):
        llir = "%3 = call <2 x float> @llvm.fma.v2f32(...)\n%4 = tail call float @llvm.fma.f32(...)"
        llir += "\ndeclare float @llvm.fma.f32(float, float, float)"
        pair, single = "fma.rn.f32x2 %rd1, %rd2, %rd3, %rd4;", "fma.rn.f32 %r1, %r2, %r3, %r4;"
        assert lint.findings("kernel", {"llir": llir, "ptx": pair + single}) == []
        assert lint.findings("kernel", {"llir": llir, "ptx": single * 4}) == [
            "kernel: fused: 4 fused multiply-adds of float32 in PTX, 3 in LLVM's code"
        ]


def host_findings(*lines, fuses=True):
    return list(host.code_findings({"f": lines}, fuses))


class TestRulesOfTheHost:
    @pytest.mark.parametrize(
        ("rule", "line"),
        [
            (lint.APPROXIMATION, "vrcpps %ymm0,%ymm1"),
            (lint.APPROXIMATION, "rsqrtss %xmm0,%xmm1"),
            (lint.APPROXIMATION, "vrcp14ps %zmm0,%zmm1"),
            (lint.APPROXIMATION, "vrsqrt14pd %zmm0,%zmm1"),
            (lint.APPROXIMATION, "vexp2ps %zmm0,%zmm1"),
            (lint.APPROXIMATION, "frecpe v0.4s, v1.4s"),
            (lint.FUSED, "vfmadd213pd %ymm0,%ymm1,%ymm2"),
            (lint.FUSED, "vfnmadd231sd %xmm0,%xmm1,%xmm2"),
            (lint.FUSED, "fmadd d0, d1, d2, d3"),
            (lint.FUSED, "fmla v0.2d, v1.2d, v2.2d"),
            (host.EXTENDED, "fmul %st(1),%st"),
            (host.EXTENDED, "fld1"),
        ],
    )
    def test_finds(self, rule, line):
        assert host_findings(line) == [f"f: {rule}: {line}"]

    @pytest.mark.parametrize(
        "line",
        ["vfmadd132ps %ymm0,%ymm1,%ymm2", "fmla v0.4s, v1.4s, v2.4s", "fmadd s0, s1, s2, s3"],
    )
    def test_float32_fuses_where_the_source_says_so(self, line):
        assert host_findings(line) == []
        assert host_findings(line, fuses=False) == [f"f: fused: {line}"]

    def test_keeps_quiet(self):
        lines = ["vmulps %ymm0,%ymm1,%ymm2", "vdivps %ymm0,%ymm1,%ymm2", "fmul v0.4s, v1.4s, v2.4s"]
        assert host_findings(*lines, "ret", fuses=False) == []

    @pytest.mark.parametrize(
        "flags",
        ["-O3", "-ffp-contract=off -ffp-contract=fast", "-ffp-contract=off -ffast-math"],
    )
    def test_finds_flags(self, flags):
        assert len(list(host.command_findings(f"c++ {flags} -c a.cpp"))) == 1

    @pytest.mark.skipif(
        platform.machine() != "x86_64" or not shutil.which("c++") or not shutil.which("objdump"),
        reason="compiles for x86-64",
    )
    @pytest.mark.parametrize(
        ("flags", "rules"),
        [
            ("-ffp-contract=off", set()),
            ("-ffp-contract=fast", {lint.FUSED}),
            ("-ffp-contract=off -ffast-math -mrecip", {lint.APPROXIMATION}),
        ],
    )
    def test_finds_what_a_compiler_makes(self, tmp_path, flags, rules):
        source, made = tmp_path / "a.cpp", tmp_path / "a.o"
        source.write_text(
            "double mul_add(double a, double b, double c) { return a * b + c; }\n"
            "void invert(float* x) { for (int i = 0; i < 64; ++i) x[i] = 1.0f / x[i]; }\n"
        )
        command = ["c++", "-O3", "-mfma", "-mavx2", *flags.split(), "-c", source, "-o", made]
        subprocess.run(command, check=True)
        code = host.functions(host.disassemble(made))
        found = {line.split(": ")[1] for line in host.code_findings(code, fuses=True)}
        assert found == rules


@pytest.mark.skipif(not host.objects(), reason="the library was not built here, or no objdump")
class TestLibrary:
    @pytest.fixture(scope="class")
    @classmethod
    def code(cls):
        """Functions by object; of sweeps, all modes'."""
        return {one.name: host.functions(host.disassemble(one.file)) for one in host.objects()}

    def test_exact_mode_has_no_findings(self):
        assert host.library_findings() == []

    def test_looks_at_every_object_of_exact_mode(self, code):
        scalars = {"row_scales.cpp", "row_work.cpp", "loss.cpp", "exact_sum.cpp"}
        assert scalars < code.keys()
        for name in code.keys() - scalars:
            sweeps = set(map(host.sweep_of, host.of_exact_mode(code[name]))) - {""}
            assert len(sweeps) == 9, name  # one model, two, any, in float32 and two halves

    def test_finds_fault_with_fast_sweeps(self, code):
        for name in code.keys() & {"kernels.cpp avx2", "kernels.cpp avx512", "kernels.cpp neon"}:
            fast = {f: lines for f, lines in code[name].items() if "FloatSum<double>" in f}
            assert any(lint.FUSED in line for line in host.code_findings(fast, fuses=True)), name
            exact = host.of_exact_mode(code[name])
            assert any(lint.FUSED in line for line in host.code_findings(exact, fuses=False)), name

    def test_finds_fault_with_sweeps_that_round_twice(self, code):
        if "kernels.cpp baseline_exact" not in code:
            pytest.skip("every target has the instruction")
        file = host.BUILD / "CMakeFiles/kernels_baseline.dir/csrc/cpu/kernels.cpp.o"
        baseline = host.functions(host.disassemble(file))
        fast = {f: lines for f, lines in baseline.items() if "FloatSum<float>" in f}
        found = list(host.software_findings(fast))
        # The general sweeps multiply in float64, too: by the unit of their sums.
        assert len(found) == 6
        assert "Fused<float, 2, FloatSum<float> >: fused: 0 products in float64" in "\n".join(found)
