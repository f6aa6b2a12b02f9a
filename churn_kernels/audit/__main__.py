"""`churn-audit diff A B`, `churn-audit run TARGET` and `churn-audit selftest`."""

import argparse
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

import torch

from churn_kernels._printable import printable
from churn_kernels.audit import data, text
from churn_kernels.audit.blame import place_of, told
from churn_kernels.audit.compare import compare
from churn_kernels.audit.examine import examine
from churn_kernels.audit.replay import ReplayError, load_target, replay
from churn_kernels.audit.report import (
    DIFFERENT,
    INCONCLUSIVE,
    INTERRUPTED,
    SAME,
    UNUSABLE,
    json_of,
    status_of,
    write_report,
)
from churn_kernels.audit.selftest import selftest
from churn_kernels.audit.trace import Trace, TraceError

_TARGET = """TARGET is package.module:function or path/to/file.py:function: a function that takes a
device's name and returns a churn_kernels.audit.Training. Its module is run, so name none that you
do not trust."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns: the exit status. 0: no difference; 1: a difference; 2: no answer, for wrong input, a
        file that cannot be read or written, a trace that is the same up to where it is damaged, or
        an error in the target; 3: runs differ, and no replay of the step does; 130: Ctrl-C, after
        which `run` tells what it had found.
    """
    options = _parser().parse_args(arguments)
    try:
        return int(options.command(options))
    except KeyboardInterrupt:
        _tell("interrupted; nothing was written")
        return INTERRUPTED
    except (ReplayError, TraceError) as error:
        _tell(str(error))
    except (Exception, SystemExit) as error:
        target = options.target if "target" in options else None
        if target and place_of(error):
            _tell(f"{target} raised {told(error)}; mend it, or call it in Python for the traceback")
        elif isinstance(error, OSError):
            _tell(_of_file(error))
        else:
            traceback.print_exc()  # a fault of this program
    return UNUSABLE


def _tell(message: str) -> None:
    print(f"churn-audit: {printable(message)}", file=sys.stderr)


def _of_file(error: OSError) -> str:
    what = f"{error.filename}: " if error.filename else ""
    return f"{what}{error.strerror or error}; name another file or folder, or make room"


def _trace(path: str) -> Trace:
    try:
        return Trace.load(path)
    except OSError as error:
        raise TraceError(
            f"a trace must be a file that can be read, got {path}: {error.strerror or error}; name "
            f"one that churn_kernels.audit.record wrote"
        ) from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="churn-audit",
        description="Find out where, when and why two runs differ.",
        epilog="Exit status: 0 for no difference, 1 for one, 2 if the question has no answer "
        "(wrong input, a file, a damaged trace, an error in the target), 3 if runs differ and no "
        "replay of the step does, 130 after Ctrl-C.",
    )
    commands = parser.add_subparsers(required=True)
    diff = commands.add_parser(
        "diff",
        help="the first step, and what in it, that differs between two traces",
        description="The first difference between two traces that churn_kernels.audit.record "
        "wrote; with --replay also the operator that makes it.",
    )
    diff.add_argument("a", help="a trace")
    diff.add_argument("b", help="another one, of the same model")
    diff.add_argument(
        "--replay", metavar="TARGET", dest="target", help=f"run the step again: {_TARGET}"
    )
    diff.add_argument(
        "--device",
        nargs="+",
        type=_device,
        default=["cpu"],
        help="where; two take turns (cpu cuda)",
    )
    run = commands.add_parser(
        "run",
        help="whether replays of a training differ, where, why, and what becomes of a difference",
        description="Runs a training in pairs, replays a step operator by operator, puts it under "
        "stress, swaps suspects for deterministic twins, and follows a flip of one unit in the "
        "last place.",
    )
    run.add_argument("target", help=_TARGET)
    run.add_argument("--device", type=_device, default="cpu", help="where it runs (default: cpu)")
    run.add_argument("--out", type=Path, metavar="FOLDER", help="for audit.html and audit.json")
    for command in (diff, run):
        _add_count(command, "--replays", 20, "of the one step", least=2)
        command.add_argument("--json", action="store_true", help="as JSON, for programs")
    _add_count(run, "--pairs", 8, "of replays for each measurement", least=2)
    _add_count(run, "--steps", 10, "of each pair")
    _add_count(run, "--amplify-steps", 100, "over which the flip is followed")
    _add_count(run, "--inject-at", 1, "the step before which it happens")
    check = commands.add_parser(
        "selftest",
        help="plant racy operators, and see whether the audit names them",
        description="Plants a sum whose order follows thread timing in a forward pass, a backward "
        "pass, an optimizer and the data's order, and an exact one. Exit status: 0 if the audit "
        "was right about each, 1 if not.",
    )
    for command, function in ((diff, _diff), (run, _run), (check, _selftest)):
        command.set_defaults(command=function)
    return parser


def _add_count(
    command: argparse.ArgumentParser, name: str, default: int, what: str, least: int = 1
) -> None:
    def count(value: str) -> int:
        if not value.isdecimal() or int(value) < least:
            raise argparse.ArgumentTypeError(f"must be a number of at least {least}, got {value!r}")
        return int(value)

    command.add_argument(
        name, type=count, default=default, metavar="N", help=f"{what} (default: {default})"
    )


def _device(name: str) -> str:
    try:
        kind = torch.device(name).type
    except RuntimeError:
        kind = ""
    if kind != "cpu" and not (kind == "cuda" and torch.cuda.is_available()):
        there = "cpu or cuda" if torch.cuda.is_available() else "cpu, for there is no CUDA device"
        raise argparse.ArgumentTypeError(f"must be {there}, got {name!r}")
    return name


def _diff(options: argparse.Namespace) -> int:
    found = compare(_trace(options.a), _trace(options.b))
    content = data.of_comparison(found)
    cut_short = any(t.damage and len(t.steps) == found.steps for t in (found.a, found.b))
    status = UNUSABLE if cut_short else SAME
    if found.difference is not None:
        status = DIFFERENT
    if not options.json:
        print(text.of_comparison(found), flush=True)
    try:
        if options.target and found.difference is not None:
            content["replay"] = None
            build = load_target(options.target)
            replayed = replay(found, build, devices=options.device, replays=options.replays)
            content["replay"] = data.of_replayed(replayed)
            if replayed.finding.verdict == "none":
                status = INCONCLUSIVE
            if not options.json:
                print(text.of_replayed(replayed))
    finally:  # what the traces say stands, whatever becomes of the replay
        if options.json:
            print(data.as_json(content), flush=True)
    return status


def _run(options: argparse.Namespace) -> int:
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)  # before minutes of work, not after
    found = examine(
        load_target(options.target),
        device=options.device,
        replays=options.replays,
        pairs=options.pairs,
        steps=options.steps,
        amplify_steps=options.amplify_steps,
        inject_at=options.inject_at,
        tell=_tell,
    )
    said = json_of if options.json else text.of_examination
    print(said(found, options.target), flush=True)
    if options.out:
        write_report(found, options.target, options.out)
    return status_of(found)


def _selftest(options: argparse.Namespace) -> int:
    trials = selftest()
    print(text.as_text(map(text.of_trial, trials)))
    return SAME if all(trial.passed for trial in trials) else DIFFERENT


if __name__ == "__main__":
    sys.exit(main())
