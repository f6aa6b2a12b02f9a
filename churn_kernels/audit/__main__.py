"""`churn-audit diff A B` and `churn-audit selftest`."""

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

from churn_kernels.audit.compare import Comparison, compare
from churn_kernels.audit.selftest import Trial, selftest
from churn_kernels.audit.trace import Trace, TraceError

SAME, DIFFERENT, UNUSABLE = 0, 1, 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit status is 0 for equal runs, 1 for others, 2 for no answer."""
    parser = argparse.ArgumentParser(
        prog="churn-audit", description="Find out where two recorded runs part ways."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    diff = commands.add_parser(
        "diff",
        help="the first step, and what in it, that differs between two traces",
        description="The first difference between two traces that churn_kernels.audit.record "
        "wrote. Exit status: 0 if all steps that both have are the same, 1 if not, 2 if the "
        "question has no answer.",
    )
    diff.add_argument("a", help="a trace")
    diff.add_argument("b", help="another one, of the same model")
    commands.add_parser(
        "selftest",
        help="plant racy operators, and see whether the audit names them",
        description="Plants a sum whose order follows thread timing in a forward pass, a backward "
        "pass, an optimizer and the data's order, and an exact one. Exit status: 0 if the audit "
        "was right about each, 1 if not.",
    )
    diff.add_argument("--json", action="store_true", help="as JSON, for programs")
    options = parser.parse_args(arguments)
    if options.command == "selftest":
        trials = selftest()
        print("\n".join(map(as_line, trials)))
        return SAME if all(trial.passed for trial in trials) else DIFFERENT
    try:
        found = compare(Trace.load(options.a), Trace.load(options.b))
    except (OSError, TraceError) as error:
        print(f"churn-audit: {error}", file=sys.stderr)
        return UNUSABLE
    print(json.dumps(as_data(found), indent=2) if options.json else as_text(found))
    return SAME if found.difference is None else DIFFERENT


def as_line(trial: Trial) -> str:
    """One planted operator, and what became of it."""
    found, passed = trial.finding, "right" if trial.passed else "WRONG"
    planted = "an exact sum" if trial.place == "nowhere" else f"a race in {trial.place}"
    if found.operation is None:
        said = f"no difference in {found.replays} replays: fewer than {found.bound:.0%} of steps"
        return f"{passed}: {planted}: {said}"
    where = found.operation.module or "no module"
    what = "given other inputs" if found.verdict == "input" else "other outputs of equal inputs"
    return f"{passed}: {planted}: {found.operation.name} ({where}): {what}"


def as_data(found: Comparison) -> dict[str, Any]:
    """A comparison as plain data."""
    difference = found.difference
    return {
        "same": difference is None,
        "steps_compared": found.steps,
        "step": difference and difference.step,
        "first": difference and difference.first,
        "also": difference.also if difference else [],
        "same_in_step": difference.same if difference else [],
        "ran_on": {name: list(pair) for name, pair in found.settings.items()},
        "traces": [
            {
                "path": str(trace.path),
                "steps": trace.steps[-1].number,
                "damage": trace.damage,
                "manifest_hash": trace.header["manifest_hash"],
            }
            for trace in (found.a, found.b)
        ],
    }


def as_text(found: Comparison) -> str:
    """A comparison for people: the verdict, then what it rests on."""
    difference = found.difference
    last = min(found.a.steps[-1].number, found.b.steps[-1].number)
    if difference is None:
        lines = [f"the runs have the same bits in all {last} steps that both have"]
    else:
        where = "before the first step" if difference.step == 0 else f"in step {difference.step}"
        lines = [f"the runs part ways {where}: {difference.first}"]
        lines.append(f"  {difference.meaning}")
        lines.append(f"  also differs: {', '.join(difference.also) or 'nothing'}")
        lines.append(f"  still the same: {', '.join(difference.same) or 'nothing'}")
    for name, (a, b) in found.settings.items():
        lines.append(f"ran on another {name}: {a} and {b}")
    if not found.settings:
        lines.append(f"ran on the same: {found.a.header['manifest_hash']}")
    for trace in (found.a, found.b):
        damage = f"; {trace.damage}" if trace.damage else ""
        lines.append(f"{trace.path}: {trace.steps[-1].number} steps{damage}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
