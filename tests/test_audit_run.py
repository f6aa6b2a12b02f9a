"""`churn-audit run`: verdict, evidence, JSON and the page, for every way in which replays part."""

import dataclasses
import json
import re
import sys
from html.parser import HTMLParser

import audit_targets
import pytest
import torch

import churn_kernels as ck
from churn_kernels import _ops
from churn_kernels.audit import data, figures, text
from churn_kernels.audit.__main__ import main
from churn_kernels.audit.advice import advice
from churn_kernels.audit.blame import seen_from_here
from churn_kernels.audit.examine import _try_axis
from churn_kernels.audit.page import page
from churn_kernels.intervals import Estimate

pytestmark = pytest.mark.skipif(not _ops.LOADED, reason="the compiled library is not built")

FILE = audit_targets.__file__
SMALL = ["--replays", "5", "--pairs", "3", "--steps", "2", "--amplify-steps", "6"]
VOID = {"meta", "!doctype"}


class Page(HTMLParser):
    """Elements, attributes and text of a page whose elements must all be closed."""

    def __init__(self, content):
        super().__init__()
        self.open, self.found, self.text = [], [], ""
        self.feed(content)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def run(name, *options, small=SMALL):
    return main(["run", f"{FILE}:{name}", *small, *options])


def checked(content):
    """A page that runs nothing and fetches nothing."""
    page = Page(content)
    assert not {"script", "link", "img", "iframe", "object", "image", "use"} & {
        tag for tag, _ in page.found
    }
    for _, attributes in page.found:
        assert not {"src", "href", "style"} & set(attributes)
        assert not any(name.startswith("on") for name in attributes)
    assert not re.search(r"https?:|url\(|@import", content)
    return page


def test_a_planted_race(tmp_path, threads, capsys):
    threads(1)
    assert run("racy", "--out", str(tmp_path), "--replays", "20") == 1
    out, err = capsys.readouterr()
    lines = out.splitlines()
    race = "churn_audit.racy_sum.default"
    assert re.fullmatch(rf"step [12]: {race} makes other outputs of the same inputs", lines[0])
    assert "forward, module middle" in lines[1]
    few = f"  {race}: too few pairs, 4 are needed; 0 of 3 pairs still part"
    assert any(line.startswith(few) for line in lines)
    advice = lines[lines.index("what to do now:") + 1 :]
    assert advice[0].startswith(f"  Replace {race} (the first at ")
    assert "torch.use_deterministic_algorithms(True)" in advice[0]
    assert any(line.startswith("  Run with --pairs 8 for shares: ") for line in advice)
    assert re.search(r"^churn-audit: 20 replays of step [12], operator by operator$", err, re.M)

    found = json.loads((tmp_path / "audit.json").read_text())
    assert list(found) == [
        *("kind", "format", "verdict", "exit_status", "target", "device", "pairs", "step"),
        *("replays", "operators", "stress", "attribution", "amplification", "stopped"),
        *("manifest_hash", "manifest"),
    ]
    assert (found["kind"], found["format"]) == ("churn-audit run", 1)
    assert (found["verdict"], found["exit_status"], found["operators"]) == ("operator", 1, [race])
    assert found["pairs"]["differing"] >= 1
    first = found["attribution"]["shares"][0]
    assert (first["suspect"], first["share"]["mean"], first["differing"]) == (race, 1.0, 0)
    assert first["bound"] == 1.0
    assert len(found["amplification"]["distances"]) == 3
    assert found["amplification"]["distances"][0][0] > 0
    assert found["manifest_hash"] == ck.audit.manifest_hash(found["manifest"])
    assert [axis["axis"] for axis in found["stress"]][-2:] == ["batch", "device"]

    page = checked((tmp_path / "audit.html").read_text())
    assert sum(tag == "svg" for tag, _ in page.found) == 2 * 4  # for wide screens and narrow ones
    said = ("What to do now", "Why", "one flip each", "Words", "Unit in the last place")
    for one in (race, found["manifest_hash"], "audit_targets.py:", "too few pairs", *said):
        assert one in page.text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["audit.html", "audit.json"]


def test_replays_that_do_not_differ(threads, capsys):
    threads(1)
    assert run("steady", "--json") == 0
    out = capsys.readouterr().out
    found = json.loads(out)
    assert (found["verdict"], found["exit_status"]) == ("none", 0)
    assert found["replays"]["bound"] == 0.75
    assert (found["pairs"]["differing"], found["pairs"]["bound"]) == (0, 1.0)
    assert found["operators"] == []
    if not torch.cuda.is_available():
        assert found["stress"][-1]["skipped"] == "there is no CUDA device"


def test_what_only_stress_shows_is_attributed_to_it(threads):
    threads(1)
    found = ck.audit.examine(audit_targets.by_threads, replays=3, pairs=2, steps=2, amplify_steps=2)
    said = "step 2: no difference in 3 replays, too few to bound how often there is one"
    assert text.verdict(found) == said
    rest = "0 of 2 pairs of 2 steps differ (too few to bound how many would)"
    assert text.of_pairs(found) == rest
    shown = {axis.name for axis in found.axes if axis.shows}
    assert "threads" in shown
    assert set(found.attribution.apart) == shown
    shares = {share.suspect: share for share in found.attribution.shares}
    assert "churn_test.sum_by_threads.default" in shares
    assert shares["threads"].share.mean > 0.9
    assert shares["everything"].share.mean == 1.0


def test_replays_that_part_when_nobody_looks(threads, capsys):
    threads(1)
    assert run("shy") == 3
    out = capsys.readouterr().out
    assert out.startswith(
        "inconclusive: replays part in step 1, but with every operator logged no difference in 5 "
        "replays: fewer than 75% of steps differ, at 95 %\n"
    )
    assert "3 of 3 pairs of 2 steps differ, the first in step 1: parameters" in out


GENERATOR = torch.Generator()  # replays do not restore it


def noisy_sum(x: torch.Tensor) -> torch.Tensor:
    return x.sum() + torch.rand((), generator=GENERATOR)


FIRST, SECOND = (
    torch.library.custom_op(f"churn_test::{name}", noisy_sum, mutates_args=())
    for name in ("first_sum", "second_sum")
)


def two_sums(device):
    """The second shows only where the first is pinned."""
    return audit_targets.training(lambda x: FIRST(x) + SECOND(x))


def test_several_races_are_all_named(threads):
    threads(1)
    found = ck.audit.examine(two_sums, replays=5, pairs=2, steps=2, amplify_steps=2)
    assert found.stopped == {}
    assert found.operators == ["churn_test.first_sum.default", "churn_test.second_sum.default"]
    assert not any(axis.shows for axis in found.axes if axis.name in ("contention", "allocator"))
    assert {share.suspect for share in found.attribution.shares} > set(found.operators)


def test_a_search_that_was_given_up_is_said(threads, monkeypatch):
    threads(1)
    monkeypatch.setattr(sys.modules["churn_kernels.audit.examine"], "MOST_OPERATORS", 1)
    found = ck.audit.examine(two_sums, replays=5, pairs=2, steps=1, amplify_steps=1)
    assert found.operators == ["churn_test.first_sum.default"]
    said = "it ends at 1, and there are more; make these repeat their bits, and run the audit again"
    assert found.stopped == {"search for operators": said}
    assert f"stopped early: search for operators: {said}" in text.of_examination(found, "x")
    assert f"<dt>search for operators</dt><dd>{said}</dd>" in page(found, "x")


def test_a_training_that_runs_on_one_device_only(threads, monkeypatch):
    """The audit says so, and what else it found."""
    threads(1)

    def build(device):
        if device != "cpu":
            raise RuntimeError("x is on cpu")
        return audit_targets.training()

    training = build("cpu")
    finding = ck.audit.Finding("none", -1, [], [], [], 2)
    rest = (build, training, "cpu", 1, [], finding, lambda _: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    axis = _try_axis("device", *rest)
    said = "skipped: the training does not run on cuda: RuntimeError: x is on cpu (tests/"
    assert text.of_axis(axis).startswith(said)
    assert not axis.shows


def test_a_model_whose_batch_cannot_be_split(threads):
    training = ck.audit.Training(audit_targets.Doubling(), None, lambda n: None)
    finding = ck.audit.Finding("none", -1, [], [], [], 2)
    axis = _try_axis("batch", None, training, "cpu", 1, [], finding, lambda _: None)
    assert axis.skipped == "no module of the model is known to take a batch in parts"


class Failing:
    """A training that raises at the n-th step that is taken, of all that are built."""

    def __init__(self, error, after):
        self.error, self.left = error, after

    def build(self, device):
        return audit_targets.training(after_step=self.count)

    def count(self, model):
        self.left -= 1
        if self.left < 0:
            raise self.error


def test_a_part_that_raises_ends_alone(threads):
    """What was found before it, and after it, is told; the rest says why it is not there."""
    threads(1)

    def build(device):
        training = audit_targets.training()

        def step(n):
            if n == 3:
                raise OverflowError("mine\x1b[2J")
            training.step(n)

        return dataclasses.replace(training, step=step)

    found = ck.audit.examine(build, replays=2, pairs=2, steps=1, amplify_steps=3)
    assert found.amplification is None
    assert found.verdict == "none"
    ((part, why),) = found.stopped.items()
    assert part == "flips of one unit in the last place"
    assert why.startswith("it raised OverflowError: mine\N{REPLACEMENT CHARACTER}[2J (tests/")
    assert f"stopped early: {part}: {why}" in text.of_examination(found, "x")
    assert f"Stopped: {why}." in checked(page(found, "x")).text
    assert json.loads(data.as_json(data.of_examination(found, "x", 0)))["amplification"] is None


def test_ctrl_c_tells_what_was_found(threads, capsys, monkeypatch):
    threads(1)
    failing = Failing(KeyboardInterrupt(), 10)
    monkeypatch.setattr(audit_targets, "steady", failing.build)
    small = ["--replays", "2", "--pairs", "2", "--steps", "1", "--amplify-steps", "3"]
    assert run("steady", "--json", small=small) == 130
    found = json.loads(capsys.readouterr().out)
    assert found["verdict"] == "none"
    assert set(found["stopped"].values()) == {"interrupted by Ctrl-C"}
    assert found["exit_status"] == 130


def test_ctrl_c_before_anything_was_found(capsys, monkeypatch):
    monkeypatch.setattr(audit_targets, "steady", Failing(KeyboardInterrupt(), 0).build)
    assert run("steady") == 130
    assert "churn-audit: interrupted; nothing was written\n" in capsys.readouterr().err


def advice_of(found, **changes):
    return " ".join(advice(dataclasses.replace(found, **changes)))


def test_the_advice_names_switches_flags_and_costs(threads):
    threads(1)
    small = {"replays": 2, "pairs": 2, "steps": 1, "amplify_steps": 2}
    found = ck.audit.examine(audit_targets.by_threads, **small)
    said = advice_of(found)
    assert "Hold fixed between runs that are to be equal: the number of threads (torch.set" in said
    assert "Run with --replays 61 to see a race that shows in one of 20 steps" in said
    assert re.search(r"Run with --amplify-steps 20 .* A pair takes about (a second|\d+ s)", said)
    pairs = [ck.audit.Pair([0.0, 1.0], [], 1, "parameters", 2.0)] * 4
    share = ck.audit.Share("deterministic algorithms", Estimate(0.9, 0.5, 0.95, 0.0), pairs)
    before = [dataclasses.replace(pair, seconds=1.0) for pair in pairs]
    attribution = ck.audit.Attribution(1, (), before, share.share, [share], {})
    switch = "Set torch.use_deterministic_algorithms(True): it removes 90% of the divergence, 50% "
    assert switch in advice_of(found, attribution=attribution)
    assert "Steps took 2 times as long with it here." in advice_of(found, attribution=attribution)
    chance = dataclasses.replace(share, share=Estimate(0.5, -1.0, 0.9, 0.0))
    doubtful = dataclasses.replace(attribution, shares=[chance])
    assert "Run with --pairs 8 for narrower intervals" in advice_of(found, attribution=doubtful)
    for verdict, words in (
        ("input", "Seed the loader"),
        ("sequence", "Look for a branch that depends on time"),
        ("memory", "Fill what torch.empty made before it is read"),
    ):
        log = found.finding.log
        finding = ck.audit.Finding(verdict, 0, log, log, [], 2)
        assert words in advice_of(found, finding=finding)
    said = advice_of(found, axes=[], attribution=None)
    assert said.startswith("Nothing has to be done: replays have the same bits")
    assert "Run with --replays 61 " in said
    quiet = dataclasses.replace(found.finding, replays=100)
    rest = {"axes": [], "attribution": None, "amplification": None}
    assert advice_of(found, finding=quiet, **rest).endswith("with and without stress.")


def test_sources_are_seen_from_the_working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert seen_from_here(f"{tmp_path}/my/train.py:3") == "my/train.py:3"
    assert seen_from_here(f"backward of {tmp_path}/train.py:3") == "backward of train.py:3"
    assert seen_from_here("/elsewhere/train.py:3") == "/elsewhere/train.py:3"
    assert seen_from_here(f"{tmp_path}2/train.py:3") == f"{tmp_path}2/train.py:3"


def test_numbers_in_words():
    pairs = [ck.audit.Pair([1.0, 0.5], [], 1, "parameters")]
    share = ck.audit.Share("x", Estimate(-1.66, -9.0, -0.37, 1.0), pairs)
    said = "below -100% [below -100%, -37%]; 1 of 1 pairs still part"
    assert text.of_share(share) == said
    assert text.of_differences(ck.audit.Differences(1e-6, [])).startswith("0.0001% of the elements")
    nowhere = Estimate(-0.01, -0.03, 0.01, 0.01)
    shrinking = ck.audit.Amplification(1, 1, pairs, nowhere, None)
    assert "shrinks at a rate of 0.010 [-0.010, 0.030] per step" in text.of_amplification(shrinking)
    lone = ck.audit.Amplification(1, 1, pairs, Estimate(0.1, *[float("nan")] * 3), None)
    assert "every 6.9 steps, by one flip alone" in text.of_amplification(lone)
    quiet = ck.audit.Axis("threads", ck.audit.Finding("none", -1, [], [], [], 4))
    assert text.of_axis(quiet).endswith("in 4 replays, too few to bound how often there is one")
    few = ck.audit.Attribution(1, (), pairs, Estimate(1e-7, -2e-7, 4e-7, 1e-8), [], {})
    assert "end 1.00e-07 [0.00e+00, 4.00e-07] apart" in text.of_attribution(few)


# Strings from outside ----------------------------------------------------------------------------


def test_hostile_names_are_text(tmp_path, threads, monkeypatch):
    threads(1)
    monkeypatch.setenv("OMP_NUM_THREADS", audit_targets.HOSTILE)
    found = ck.audit.examine(audit_targets.hostile, replays=5, pairs=2, steps=1, amplify_steps=2)
    content = page(found, audit_targets.HOSTILE)
    assert audit_targets.HOSTILE not in content
    parsed = checked(content)
    assert parsed.text.count("<script>") >= 3  # the target, the module, the environment
    assert json.loads(data.as_json(data.of_examination(found, audit_targets.HOSTILE, 1)))


ESCAPES = "\x1b[2J\x07\r\n\x7f\x9b1m\u202e\u2066\u200b\u2028"


def test_what_a_terminal_obeys_is_not_printed(tmp_path, threads, capsys, monkeypatch):
    """From a target, a trace, an error: no control character and no mark that turns the text."""
    threads(1)
    monkeypatch.setenv("OMP_NUM_THREADS", ESCAPES)
    monkeypatch.setattr(audit_targets, "HOSTILE", f"layer{ESCAPES}")
    failing = Failing(OverflowError(ESCAPES), 35)

    def build(device):
        return audit_targets.training(audit_targets.racy_sum, name=f"layer{ESCAPES}")

    found = ck.audit.examine(build, replays=5, pairs=2, steps=1, amplify_steps=2)
    said = [text.of_examination(found, ESCAPES), page(found, ESCAPES)]
    said.append(data.as_json(data.of_examination(found, ESCAPES, 1)))
    assert "layer\N{REPLACEMENT CHARACTER}[2J" in said[0]

    def trace(name, loss):
        training = build("cpu")
        with ck.audit.record(tmp_path / name, training.model, training.optimizer) as recorder:
            recorder.observe(**{f"loss{ESCAPES}": torch.tensor(loss)})
            training.step(1)
        return str(tmp_path / name)

    assert main(["diff", trace("a", 1.0), trace("b\x1b[2J", 2.0)]) == 1
    said.append(capsys.readouterr().out)
    assert "the runs first differ in step 1: loss\N{REPLACEMENT CHARACTER}[2J" in said[-1]
    for target in (f"{FILE}:{ESCAPES}", f"{ESCAPES}.py:build"):
        assert main(["run", target]) == 2
        said.append(capsys.readouterr().err)
    monkeypatch.setattr(audit_targets, "steady", failing.build)
    failing.left = 0
    assert run("steady") == 2
    said.append(capsys.readouterr().err)
    assert main(["diff", str(tmp_path / "c\x1b[2J"), "d"]) == 2
    said.append(capsys.readouterr().err)
    for one in said:
        assert not [letter for letter in one if not letter.isprintable() and letter != "\n"]


def test_figures_take_any_numbers():
    """Distances of nothing, infinities, one step; wide histograms; shares without intervals."""
    pairs = [
        ck.audit.Pair([0.0, 0.0], [], None, ""),
        ck.audit.Pair([1e-9, float("inf")], [], 1, ""),
        ck.audit.Pair([5e-324, 1.5e308], [], 1, ""),
    ]
    nan, inf = float("nan"), float("inf")
    bounds = [(nan, nan), (-inf, 1.0), (-inf, 0.5), (-9.0, 1.0)]
    shares = [ck.audit.Share("x" * 99, Estimate(-9.0, *one, nan), pairs) for one in bounds]
    for width in (figures.WIDE, figures.NARROW):
        for drawn in (
            figures.amplification(pairs[:1], [], width),
            figures.amplification(pairs, pairs, width),
            figures.ulps(ck.audit.Differences(1.0, [()], {1: 3, 1 << 30: 1}, 1 << 30), width),
            figures.shares(shares, width),
            figures.timeline(ck.audit.Finding("none", -1, [], [], [], 2), width),
        ):
            assert Page(drawn).found
            assert f'viewBox="0 0 {width} ' in drawn
            assert "nan" not in drawn
            assert "inf" not in drawn.replace("infinit", "")


def test_a_long_step_is_drawn_in_columns():
    def log(differs):
        return [
            ck.audit.Operation(f"op{i}", ("a",), (differs(i),), "", "", "backward", "")
            for i in range(50_000)
        ]

    one, other = log(lambda i: "b"), log(lambda i: "c" if i >= 40_001 and i % 2 else "b")
    drawn = figures.timeline(ck.audit.Finding("operator", 40_001, one, other, [], 2))
    boxes = [attributes for tag, attributes in Page(drawn).found if tag == "rect"]
    assert [box["class"] for box in boxes] == ["same", "first", "after"]
    assert "operations 1 to 39984, from op0" in drawn


def test_json_has_no_numbers_that_are_none():
    assert json.loads(data.as_json({"a": [float("nan"), (float("inf"), 1.0)]})) == {
        "a": [None, [None, 1.0]]
    }


# What goes wrong ---------------------------------------------------------------------------------


def test_a_target_that_draws_without_a_seed(capsys):
    assert run("unseeded") == 2
    message = (
        "churn-audit: target must build the same training each time, got another parameters before "
        "the first step; seed the random states in it"
    )
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none", "churn-audit: target must name a function of"),
        ("nothing", "churn-audit: target must return a churn_kernels.audit.Training, got NoneType"),
        ("broken", ':broken raised KeyError: "the target\'s own" (tests/audit_targets.py:'),
        ("no_argument", "the device's name, got no_argument(); define no_argument(device)"),
        ("two_arguments", "one argument, the device's name, got two_arguments(device, seed); defi"),
        ("leaves", ":leaves raised SystemExit: 3 (tests/audit_targets.py:"),
        ("HOSTILE", "got 'HOSTILE', which is str; define HOSTILE(device)"),
        (
            "a_string_model",
            "Training.model must be a torch Module, got str; return Training(model,",
        ),
        ("no_optimizer", "Training.optimizer must be a torch Optimizer, got NoneType; return"),
        ("a_step_of_nothing", "Training.step must be a function of the step's number, got (); de"),
        ("no_predictions", "Training.predict must be a function of nothing, got Tensor; define it"),
        ("a_step_that_raises", ":a_step_that_raises raised ValueError: two lines of it (tests/"),
        ("resumes_nowhere", "resume(1) must return a step from 0 to 0, got None; load a"),
    ],
)
def test_targets_that_do_not_work(name, message, capsys):
    """One line says what is wrong, and where; no traceback."""
    assert run(name) == 2
    out, err = capsys.readouterr()
    last = err.splitlines()[-1]
    assert message in last
    assert last.startswith("churn-audit: ")
    assert "Traceback" not in out + err
    assert len([line for line in err.splitlines() if " pairs of " not in line]) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("def build(", "raised SyntaxError: '(' was never closed (target.py:1); mend it"),
        ("import nowhere_at_all", "raised ModuleNotFoundError: No module named 'nowhere_at_all' ("),
        ("1 / 0", "raised ZeroDivisionError: division by zero (target.py:1); mend it, or call"),
        ("raise SystemExit", "raised SystemExit (target.py:1); mend it"),
        ("open('data.csv')", "raised FileNotFoundError: [Errno 2] No such file or directory: 'dat"),
        ("", "target must name a function of target.py, got 'build', which is not there; define"),
        ("build = print\ndef build(): pass", "got build(); define build(device)"),
    ],
)
@pytest.mark.parametrize("form", ["target.py:build", "target:build"])
def test_files_that_do_not_work(form, content, message, tmp_path, monkeypatch, capsys):
    (tmp_path / "target.py").write_text(content)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "target", raising=False)
    assert main(["run", form]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message.replace("target.py, got", f"{form[:-6]}, got") in line


def test_a_replay_s_target_that_raises_is_one_line_below_the_difference(tmp_path, capsys):
    paths = []
    for name, steps in (("a", 1), ("b", 2)):
        training = audit_targets.training()
        with ck.audit.record(tmp_path / name, training.model, training.optimizer) as recorder:
            recorder.observe(loss=torch.tensor(float(steps)))
            training.step(1)
        paths.append(str(tmp_path / name))
    assert main(["diff", *paths, "--replay", f"{FILE}:broken"]) == 2
    out, err = capsys.readouterr()
    assert out.startswith("the runs first differ in step 1: loss\n")
    assert re.fullmatch(r"churn-audit: .*:broken raised KeyError: .*traceback\n", err)


def test_a_trace_that_is_not_there_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["diff", "a.trace", "b.trace"]) == 2
    assert capsys.readouterr().err == (
        "churn-audit: a trace must be a file that can be read, got a.trace: No such file or "
        "directory; name one that churn_kernels.audit.record wrote\n"
    )


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--pairs", "1", "argument --pairs: must be a number of at least 2, got '1'"),
        ("--steps", "-1", "argument --steps: must be a number of at least 1, got '-1'"),
        ("--replays", "x", "argument --replays: must be a number of at least 2, got 'x'"),
    ],
)
def test_numbers_out_of_range(option, value, message, capsys):
    with pytest.raises(SystemExit) as exit:
        run("steady", f"{option}={value}")
    assert exit.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("device", ["cpuu", "meta"])
def test_a_device_that_is_none(device, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["run", "nowhere:build", "--device", device])
    assert "--device: must be cpu" in capsys.readouterr().err


def test_a_step_to_flip_that_is_not_run(capsys):
    assert run("steady", "--inject-at", "7") == 2
    assert "inject_at must be a step from 1 to 6, got 7; run more steps" in capsys.readouterr().err


@pytest.mark.parametrize("numbers", [{"replays": 1}, {"pairs": 1}, {"steps": 0}])
def test_numbers_are_refused_before_the_work(numbers):
    ((name, count),) = numbers.items()
    message = f"{name} must be at least {count + 1}, got {count}; run more of them"
    with pytest.raises(ck.audit.ReplayError, match=message):
        ck.audit.examine(audit_targets.broken, **numbers)


def test_a_folder_that_cannot_be_is_refused_before_the_work(tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    assert run("broken", "--out", str(tmp_path / "file")) == 2  # the target was not even built
    said = f"churn-audit: {tmp_path / 'file'}: File exists; name another file or folder, or make"
    assert capsys.readouterr().err.startswith(said)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_full_disk_loses_nothing(tmp_path, threads, monkeypatch, capsys):
    threads(1)
    for name in ("audit.json", "audit.html"):
        (tmp_path / name).write_text("earlier")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("churn_kernels._files.os.fsync", full)
    small = ["--replays", "2", "--pairs", "2", "--steps", "1", "--amplify-steps", "1"]
    assert run("steady", "--out", str(tmp_path), small=small) == 2
    out, err = capsys.readouterr()
    assert out.startswith("step 1: no difference in 2 replays")
    assert "No space left on device" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["audit.html", "audit.json"]
    assert {path.read_text() for path in tmp_path.iterdir()} == {"earlier"}
