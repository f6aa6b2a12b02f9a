"""Traces that somebody damaged or made up: what is read is checked, and no link is followed."""

import hashlib
import json
import os
from contextlib import suppress
from random import Random

import pytest
from damage import damaged, with_odd_content
from test_audit_record import STEPS, run

import churn_kernels as ck
from churn_kernels import _ops
from churn_kernels.audit.__main__ import main

pytestmark = pytest.mark.skipif(not _ops.LOADED, reason="the compiled library is not built")


def chained(lines):
    """A trace whose every line follows from the one before, whatever it holds."""
    chain, text = "", []
    for line in lines:
        plain = json.dumps(line, separators=(",", ":"))
        chain = hashlib.blake2b(f"{chain}{plain}".encode(), digest_size=16).hexdigest()
        comma = "," if plain[1:-1] else ""
        text.append(f'{plain[:-1]}{comma}"chain":"{chain}"}}\n')
    return "".join(text).encode()


def test_two_hundred_damaged_traces_and_two_hundred_of_odd_content(tmp_path, capsys):
    random = Random(0)
    run(tmp_path / "a")
    run(tmp_path / "b")
    whole = (tmp_path / "b").read_bytes()
    lines = [json.loads(line) for line in whole.splitlines()]
    for line in lines:
        del line["chain"]
    assert chained(lines) == whole
    path, statuses = tmp_path / "c", []
    for number in range(400):
        odd = number % 2 == 0
        content = chained(with_odd_content(lines, random)) if odd else damaged(whole, random)
        path.write_bytes(content)
        command = ["diff", *(["--json"] if number % 3 else []), str(tmp_path / "a"), str(path)]
        statuses.append(main(command))
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        assert statuses[-1] != 2 or captured.err.count("\n") <= 1
        if number % 10 < 2:  # it takes longer
            with suppress(ck.audit.TraceError):
                run(path, resume_at=2, steps=2)
    assert set(statuses) == {0, 1, 2}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"hash_spec": "2"},
            r"got: the header\['hash_spec'\] must be a int, and is str '2'; pass a",
        ),
        ({"manifest": None}, r"the header\['manifest'\] must be a table, and is missing; pass"),
        (
            {"tensors": [["w", "x", 3]]},
            r"\['tensors'\]\[0\]\[2\] must be a list, and is int 3; pass",
        ),
        ({"format": None}, "was written in format None, this version reads 2; read it with the"),
    ],
)
def test_a_header_that_is_none(change, message, tmp_path):
    run(tmp_path / "a")
    header = json.loads((tmp_path / "a").read_bytes().splitlines()[0])
    del header["chain"]
    (tmp_path / "a").write_bytes(chained([header | change]))
    with pytest.raises(ck.audit.TraceError, match=message):
        ck.audit.Trace.load(tmp_path / "a")


def test_steps_out_of_their_order_end_a_trace(tmp_path):
    run(tmp_path / "a")
    lines = [json.loads(line) for line in (tmp_path / "a").read_bytes().splitlines()]
    for line in lines:
        del line["chain"]
    lines[2]["step"] = 5
    (tmp_path / "a").write_bytes(chained(lines))
    trace = ck.audit.Trace.load(tmp_path / "a")
    assert [step.number for step in trace.steps] == [0]
    assert trace.damage == (
        "line 3 is no step 1 of a trace (it['step'] must be 1, and is int 5); nothing after it "
        "counts"
    )


def test_what_is_nested_deeper_than_any_trace(tmp_path):
    (tmp_path / "a").write_bytes(b"[" * 100_000)
    with pytest.raises(ck.audit.TraceError, match="is no trace, or its first line is damaged"):
        ck.audit.Trace.load(tmp_path / "a")
    os.mkfifo(tmp_path / "b")
    with pytest.raises(ck.audit.TraceError, match=r"got: .*b is no regular file; name another"):
        ck.audit.Trace.load(tmp_path / "b")


def test_a_resumed_trace_is_written_through_no_link(tmp_path):
    run(tmp_path / "a")
    (tmp_path / "mine").write_text("mine")
    for name in (".a.partial", "a.part"):
        (tmp_path / name).symlink_to(tmp_path / "mine")
    run(tmp_path / "a", resume_at=STEPS)
    assert (tmp_path / "mine").read_text() == "mine"
    assert not (tmp_path / "a").is_symlink()
