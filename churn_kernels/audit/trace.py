"""The file of a recorded run: one line a step, each chained to the one before.

A trace is a text file of JSON lines. The first one is the header: what was recorded, and on what.
Each other one is a step: 128-bit hashes by name, in the order in which the step came to them; or it
says where the run was interrupted and went on, on what, and with which random states. "learning
rate" and other settings are `=` and their value. The name of what was changed between a step and
the one before ends in " before"; of random states, settings and such changes a step has only those
that are not what they were. Where optimizers step more than once in a step of the trace, what
belongs to the second has "(2)" after its name. The last field of a line, `chain`, hashes the line
and the chain before it, so that a line that was torn, changed or lost is found, and two runs agree
up to a step if their chains at it do.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from churn_kernels._files import check, optional, parse_json, read_bytes, write_atomically

FORMAT = 2
_KIND = "churn_kernels trace"

BEFORE, AGAIN = " before", " again"
RANDOM = "random state of "
VALUE = "="

_HEADER = {
    "hash_spec": int,
    "tensors": [(str, str, [int])],
    "optimizer": str,
    "state": {str: str},
    "manifest_hash": str,
    "manifest": {str: Any},
}
"""What every reader of a trace takes to be in its first line."""


class TraceError(ValueError):
    """A file that is no trace, or one of another format, model or hash."""


@dataclass(frozen=True)
class Step:
    """One step of a run.

    Attributes:
        number: 0 is the state before the first step.
        hashes: by name, in the order in which the step came to them; see the top of this file.
        chain: hash of everything up to here.
    """

    number: int
    hashes: dict[str, str]
    chain: str


@dataclass(frozen=True)
class Resumption:
    """Where an interrupted run went on.

    Attributes:
        after: the step after which it did.
        manifest: what it ran on from there.
        chain: hash of everything up to here.
        random_states: hashes of those that it went on with, by name; {} if the trace has none.
    """

    after: int
    manifest: dict[str, Any]
    chain: str
    random_states: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Trace:
    """A recorded run.

    Attributes:
        path: the file.
        header: what was recorded, as plain data; `manifest` is what it ran on.
        steps: those whose lines are whole.
        damage: what is wrong with the rest of the file; "" if nothing is.
        resumptions: in their order.
    """

    path: Path
    header: dict[str, Any]
    steps: list[Step]
    damage: str
    resumptions: list[Resumption] = field(default_factory=list)

    def manifest(self, step: int) -> dict[str, Any]:
        """What that step ran on."""
        manifests = [one.manifest for one in self.resumptions if one.after < step]
        return manifests[-1] if manifests else self.header["manifest"]

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Trace":
        """Read a trace; a line that was cut off or changed ends it, and `damage` says so.

        Raises: OSError if the file cannot be read; TraceError if it is no trace, if its header is
            damaged, or if it was written in another format.
        """
        path = Path(path)
        if path.is_dir():
            raise TraceError(
                f"a trace must be a file that audit.record wrote, got the folder {path}; name the "
                "file in it"
            )
        lines = _lines(path)
        header = _header(path, lines[0])
        steps: list[Step] = []
        resumptions: list[Resumption] = []
        chain = header["chain"]
        for index, line in enumerate(lines[1:], start=2):
            last = index == len(lines)
            if last and not line:
                break
            found = _checked(line, chain)
            if found is None:
                what = "was cut off" if last else "does not follow from the lines before it"
                damage = f"line {index} {what}; nothing after it counts"
                return cls(path, header, steps, damage, resumptions)
            goes_on = "resumed_after" in found
            try:
                after = {
                    "resumed_after": {len(steps) - 1},
                    "manifest": dict,
                    "random_states": optional({str: str}),
                }
                own = {"step": {len(steps)}, "hashes": {str: str}}
                check(found, after if goes_on else own, "it")
            except ValueError as error:
                what = f"is no step {len(steps)} of a trace ({error})"
                damage = f"line {index} {what}; nothing after it counts"
                return cls(path, header, steps, damage, resumptions)
            chain = found["chain"]
            if goes_on:
                states = found.get("random_states") or {}
                resumption = Resumption(found["resumed_after"], found["manifest"], chain, states)
                resumptions.append(resumption)
            else:
                steps.append(Step(found["step"], found["hashes"], chain))
        return cls(path, header, steps, "", resumptions)


class Writer:
    """Appends steps to a trace. A line is there whole, or the next reader sees that it is not.

    Attributes:
        kept: the steps that the trace had already.
    """

    def __init__(self, path: Path, header: dict[str, Any]) -> None:
        """Begin a new file.

        Raises: FileExistsError if there is one already.
        """
        if path.exists():
            raise FileExistsError(
                f"path must not exist yet, got {path}; name another file, or pass resume_at=step "
                f"to go on with the trace of a run that was interrupted"
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        self.kept: list[Step] = []
        self._chain = ""
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL, 0o666)
        self._write({"kind": _KIND, "format": FORMAT, **header})

    @classmethod
    def resume(cls, path: Path, header: dict[str, Any], step: int) -> "Writer":
        """Go on after `step`, forgetting what came after it; `resumed` is to be called next.

        Raises: OSError, TraceError as `Trace.load`; TraceError if the trace is of another model,
            kind of optimizer or named state, or ends before that step.
        """
        trace = Trace.load(path)
        for name in ("hash_spec", "tensors", "optimizer", "state"):
            if trace.header[name] != json.loads(json.dumps(header[name])):
                raise TraceError(
                    f"{path} was recorded with other {name} than this run's; name another file"
                )
        kept = [s for s in trace.steps if s.number <= step]
        if not kept or kept[-1].number != step:
            found = f"ends at step {kept[-1].number}" if kept else "has no step"
            raise TraceError(
                f"resume_at must be a step of {path}, got {step}, and the trace {found}; resume "
                f"from a checkpoint of a step that it has"
            )
        before = [one for one in trace.resumptions if one.after <= step]
        last_is_step = not before or before[-1].after < step
        writer = cls.__new__(cls)
        writer.kept = kept
        writer._chain = kept[-1].chain if last_is_step else before[-1].chain
        lines = _lines(path)[: 1 + len(kept) + len(before)]
        write_atomically(path, b"\n".join([*lines, b""]))
        writer._file = os.open(path, os.O_WRONLY | os.O_APPEND)
        return writer

    def resumed(self, after: int, header: dict[str, Any], random_states: dict[str, str]) -> None:
        """Append after which step the run went on, on what, and with which random states."""
        ran_on = {name: header[name] for name in ("manifest_hash", "manifest")}
        self._write({"resumed_after": after, **ran_on, "random_states": random_states})

    def step(self, number: int, hashes: dict[str, str]) -> None:
        """Append one step."""
        self._write({"step": number, "hashes": hashes})

    def close(self) -> None:
        """Close the file, on the disk."""
        if self._file >= 0:
            os.fsync(self._file)
            os.close(self._file)
            self._file = -1

    def _write(self, content: dict[str, Any]) -> None:
        text = _text(content)
        self._chain = _next_chain(self._chain, text)
        # One write of a whole line, which outlives the process from here on.
        line = f'{text[:-1]},"chain":"{self._chain}"}}\n'.encode()
        if os.write(self._file, line) != len(line):
            raise OSError("the disk took only part of a step of the trace; make room for it")


def in_round(name: str, number: int) -> str:
    """A name in the part of a step that a number of optimizers' steps came before, from 1."""
    return name if number == 1 else f"{name} ({number})"


def without_round(name: str) -> str:
    """A name without which round it is of."""
    return re.sub(rf"( \(\d+\))?({AGAIN})*$", "", name, count=1)


def base_of(name: str) -> str:
    """Of what a hash in a step is the state: its name without when."""
    return without_round(name).removesuffix(BEFORE)


def last_states(steps: Iterable[Step]) -> dict[str, str]:
    """What each thing was hashed to last."""
    return {base_of(name): found for step in steps for name, found in step.hashes.items()}


def _lines(path: Path) -> list[bytes]:
    try:
        return read_bytes(path).split(b"\n")
    except ValueError as error:
        raise TraceError(
            f"a trace must be a file that audit.record wrote, got: {error}; name another"
        ) from None


def _text(content: dict[str, Any]) -> str:
    return json.dumps(content, separators=(",", ":"), ensure_ascii=True)


def _next_chain(chain: str, text: str) -> str:
    return hashlib.blake2b(f"{chain}{text}".encode(), digest_size=16).hexdigest()


def _checked(line: bytes, chain: str) -> dict[str, Any] | None:
    """What a line holds, with its chain, if it follows from the chain before it."""
    try:
        found = parse_json(line)
        own = found["chain"]
        text = _text({name: value for name, value in found.items() if name != "chain"})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return found if own == _next_chain(chain, text) else None


def _header(path: Path, line: bytes) -> dict[str, Any]:
    found = _checked(line, "")
    if found is None or found.get("kind") != _KIND:
        raise TraceError(
            f"{path} is no trace, or its first line is damaged; pass a file that "
            f"churn_kernels.audit.record wrote"
        )
    if found.get("format") != FORMAT:
        raise TraceError(
            f"{path} was written in format {found.get('format')}, this version reads {FORMAT}; "
            f"read it with the version of churn_kernels that wrote it"
        )
    try:
        return check(found, _HEADER, "the header")
    except ValueError as error:
        raise TraceError(
            f"{path} must hold the trace of a training, got: {error}; pass a file that "
            f"churn_kernels.audit.record wrote"
        ) from None
