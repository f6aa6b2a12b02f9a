"""`python -m benchmarks.compiled [--target NAME] [--only GLOB] [--check | --lint] [--keep DIR]`.

Compiles every kernel and writes benchmarks/results/compiled/, or prints some of its tables.
With --lint it compiles the kernels of exact mode and reports forbidden instructions; see
`lint` and, for the compiled library, `host`. Triton's cache is build/triton, so a second run
takes seconds for unchanged kernels.
"""

import argparse
import difflib
import os
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from benchmarks.compiled.cases import EXACT_GLOBS, cases_like
from benchmarks.compiled.host import library_findings, objects
from benchmarks.compiled.pool import compile_all
from benchmarks.compiled.table import page
from benchmarks.compiled.targets import TARGETS

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks/results/compiled"


def difference(file: Path, text: str) -> str:
    before = file.read_text() if file.exists() else ""
    name = str(file.relative_to(ROOT))
    lines = difflib.unified_diff(
        before.splitlines(), text.splitlines(), name, "compiled now", lineterm=""
    )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compiled", description=__doc__)
    parser.add_argument("--target", action="append", choices=TARGETS, help="default: each")
    parser.add_argument(
        "--only",
        action="append",
        metavar="GLOB",
        help="cases such as 'sm_90/pair/8142/*', whose tables are printed and not written",
    )
    parser.add_argument("--check", action="store_true", help="compare with the files, write none")
    parser.add_argument(
        "--lint",
        action="store_true",
        help="what breaks exact mode; its cases, if --only is not given",
    )
    parser.add_argument(
        "--keep", type=Path, help="folder for the TTGIR, LLVM IR, PTX, SASS of each kernel"
    )
    options = parser.parse_args(arguments)

    # Triton reads both when it is imported, in the workers.
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ.setdefault("TRITON_CACHE_DIR", str(ROOT / "build/triton"))
    targets = options.target or TARGETS
    globs = options.only or (EXACT_GLOBS if options.lint else ["*"])
    jobs = [job for job in cases_like(globs) if job[0] in targets]
    if not jobs:
        parser.error("no case matches --only; a case is TARGET/LOSS/CLASSES/DTYPE")
    outcomes = compile_all(jobs, options.keep, options.lint)
    failures = [outcome for _, _, outcome in outcomes if isinstance(outcome, str)]
    if failures:
        print("\n\n".join(failures), file=sys.stderr)
        print(f"{len(failures)} of {len(jobs)} cases did not compile", file=sys.stderr)
        if not options.only:  # do not write partial pages
            return 1
    if options.lint:
        done = [outcome for _, _, outcome in outcomes if not isinstance(outcome, str)]
        kernels = [kernel for outcome in done for kernel in outcome]
        findings = [finding for kernel in kernels for finding in kernel]
        looked_at = f"{len(kernels)} kernels"
        if not options.only:
            findings += library_findings()
            looked_at += f" and {len(objects())} objects"
        print("\n".join([*findings, f"{len(findings)} findings in {looked_at}"]))
        return int(bool(failures or findings))
    changed = False
    for target in dict.fromkeys(target for target, _ in jobs):
        compiled = [
            (case, outcome)
            for name, case, outcome in outcomes
            if name == target and not isinstance(outcome, str)
        ]
        text = page(target, version("triton"), compiled)
        file = RESULTS / f"{target}.md"
        if options.only:
            print(text)
        elif options.check:
            lines = difference(file, text)
            changed = changed or bool(lines)
            print(lines or f"{file.relative_to(ROOT)} is as compiled now")
        else:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
            print(file.relative_to(ROOT))
    return int(changed or bool(failures))


if __name__ == "__main__":
    sys.exit(main())
