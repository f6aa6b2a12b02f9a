"""Recorded runs that were interrupted and go on: steps, random states, and what is refused."""

import copy
import json
import random

import pytest
import torch
from test_audit_record import STEPS, run
from test_audit_trace import chained
from torch import nn

import churn_kernels as ck
from churn_kernels import _ops
from churn_kernels.audit.__main__ import main

pytestmark = pytest.mark.skipif(not _ops.LOADED, reason="the compiled library is not built")


def test_resuming_makes_the_steps_of_a_run_that_was_not_interrupted(tmp_path, threads):
    threads(1)
    run(tmp_path / "whole")
    # What a checkpoint of step 3 would bring back is made again by three steps.
    state = {}

    def keep(step, model, optimizer):
        if step == 4:
            state["model"] = {k: v.clone() for k, v in model.state_dict().items()}
            state["optimizer"] = copy.deepcopy(optimizer.state_dict())

    def bring_back(step, model, optimizer):
        if step == 4:
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])

    run(tmp_path / "cut", steps=5, before=keep)
    whole = (tmp_path / "cut").read_bytes()
    (tmp_path / "cut").write_bytes(whole[:-30])  # killed while it wrote step 5
    with pytest.raises(
        ck.audit.TraceError, match=r"resume_at must be .* got 5, and the trace ends"
    ):
        run(tmp_path / "cut", resume_at=5)
    run(tmp_path / "cut", before=bring_back, resume_at=3)
    cut, whole = (ck.audit.Trace.load(tmp_path / name) for name in ("cut", "whole"))
    assert not cut.damage
    assert [(step.number, step.hashes) for step in cut.steps] == [
        (step.number, step.hashes) for step in whole.steps
    ]
    assert ck.audit.compare(cut, whole).difference is None
    assert ck.audit.compare(cut, whole).settings == {}
    assert [one.after for one in cut.resumptions] == [3]
    # Once more after the same step, and once after a later one, with other threads.
    threads(2)
    run(tmp_path / "cut", before=bring_back, resume_at=3)
    run(tmp_path / "cut", resume_at=5, before=bring_back)
    cut = ck.audit.Trace.load(tmp_path / "cut")
    assert [(one.after, one.manifest["threads"]) for one in cut.resumptions] == [
        (3, 1),
        (3, 2),
        (5, 2),
    ]
    assert [step.number for step in cut.steps] == list(range(STEPS + 1))
    assert [cut.manifest(step)["threads"] for step in (0, 3, 4, 6)] == [1, 1, 2, 2]
    assert ck.audit.compare(cut, whole).settings == {"threads after step 3": (2, 1)}
    # Taken back behind a resumption, which is forgotten with its steps.
    run(tmp_path / "cut", resume_at=2)
    assert [one.after for one in ck.audit.Trace.load(tmp_path / "cut").resumptions] == [2]


def test_a_generator_seeded_anew_where_a_run_goes_on_is_a_note(tmp_path, capsys):
    model, optimizer = steady()
    names = [str(tmp_path / name) for name in ("whole", "resumed", "drawn")]
    whole, resumed, drawn = names

    def train(path, seed, first, last, *, resume_at=None, draws=()):
        random.seed(seed)
        with ck.audit.record(path, model, optimizer, resume_at=resume_at):
            for step in range(first, last + 1):
                if step in draws:
                    random.random()
                optimizer.step()

    train(whole, 1, 1, 4)
    for path, draws in ((resumed, ()), (drawn, (4,))):
        train(path, 1, 1, 2)
        train(path, 99, 3, 4, resume_at=2, draws=draws)
    note = "note: random state of Python differs where a run was resumed after step 2; "
    assert main(["diff", whole, resumed]) == 0
    assert f"{note}nothing was drawn from it\n" in capsys.readouterr().out
    for pair in ((whole, drawn), (drawn, whole)):
        assert main(["diff", *pair]) == 1
        out = capsys.readouterr().out
        assert out.startswith("the runs first differ in step 4: random state of Python\n")
        assert f"{note}step 4 is the first that was drawn from it\n" in out
    assert main(["diff", resumed, resumed]) == 0
    assert "note" not in capsys.readouterr().out


def test_a_generator_set_back_after_the_recorder_begins_is_as_it_was(tmp_path):
    model, optimizer = steady()
    random.seed(1)
    with ck.audit.record(tmp_path / "a", model, optimizer):
        optimizer.step()
        optimizer.step()
    whole = ck.audit.Trace.load(tmp_path / "a")
    random.seed(99)
    with ck.audit.record(tmp_path / "a", model, optimizer, resume_at=1):
        random.seed(1)  # as the checkpoint has it
        optimizer.step()
    assert ck.audit.compare(whole, ck.audit.Trace.load(tmp_path / "a")).difference is None


def steady():
    """A training in which nothing but random states changes."""
    model = nn.Linear(3, 2)
    return model, torch.optim.SGD(model.parameters(), 0.1)


def test_resuming_what_cannot_be(tmp_path):
    run(tmp_path / "a", steps=2)
    before = (tmp_path / "a").read_bytes()
    with pytest.raises(ck.audit.TraceError, match=r"resume_at must be a step of .*, got 5"):
        run(tmp_path / "a", resume_at=5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim, "Adam", torch.optim.SGD)
        with pytest.raises(ck.audit.TraceError, match="with other optimizer than this run's; name"):
            run(tmp_path / "a", resume_at=1)
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with (
        pytest.raises(ck.audit.TraceError, match="was recorded with other tensors than this run's"),
        ck.audit.record(tmp_path / "a", model, optimizer, resume_at=1),
    ):
        pass
    assert (tmp_path / "a").read_bytes() == before


def test_random_states_that_a_line_lacks_or_that_are_none(tmp_path):
    """Earlier versions wrote none; what is of another form ends the trace."""
    path = tmp_path / "a"
    run(path)
    run(path, resume_at=STEPS)
    lines = [json.loads(line) for line in path.read_bytes().splitlines()]
    for line in lines:
        del line["chain"]
    del lines[-1]["random_states"]
    path.write_bytes(chained(lines))
    trace = ck.audit.Trace.load(path)
    assert (trace.damage, trace.resumptions[0].random_states) == ("", {})
    assert ck.audit.compare(trace, trace).generators == ()
    for states in ([], {"random state of Python": 1}, "none"):
        lines[-1]["random_states"] = states
        path.write_bytes(chained(lines))
        trace = ck.audit.Trace.load(path)
        assert "it['random_states']" in trace.damage
        assert trace.resumptions == []
