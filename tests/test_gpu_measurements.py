"""What a GPU report measures, on the CPU at tiny shapes: parity, bits, timings, peers."""

import sys
import types

import pytest
import torch
import torch.nn.functional as F
from gpu_record import EMPTY, HOST

import churn_kernels as ck
from benchmarks.cases import PAIR, Variant, expectation, relative_error
from benchmarks.gpu import bench, churn, journal, parity, published, table, timing
from benchmarks.gpu.journal import Journal
from benchmarks.gpu.stages import Deadline
from benchmarks.peers import TINY, batch, eager

TINY_PLAN = bench.Plan("cpu", seconds=0.0, tiny=True, calls=2)


class TestParity:
    SHAPES = ((5, 10), (4, 33))

    def work(self, tmp_path, backend, wanted):
        every = parity.cases("cpu", backend, self.SHAPES, bit_shapes=((6, 33),), most_replays=2)
        chosen = [case for case in every if wanted(case.facts)]
        written = Journal(tmp_path / "parity.json", chosen)
        assert journal.work(chosen, written, Deadline(600.0), "cpu") == 0
        assert len(written.entries) == len(chosen) > 0
        return written.entries

    def test_the_reference_is_the_cpu_kernel_within_the_bounds(self, tmp_path):
        entries = self.work(
            tmp_path,
            "reference",
            lambda facts: facts["check"] == "cpu" and facts["options"] != "invariant",
        )
        assert parity.failures(entries) == []
        assert {entry["options"] for entry in entries} == {*parity.OPTIONS} - {"invariant"}
        largest = max(e["errors"]["gradient"]["relative"] for e in entries)
        assert 0 < largest < 1e-2

    def test_the_cpu_kernel_keeps_its_bits(self, tmp_path):
        entries = self.work(tmp_path, "cpu", lambda facts: facts["check"] != "cpu")
        assert parity.failures(entries) == []
        assert {entry["check"] for entry in entries} == {
            "replay",
            "row alone",
            "bits of the cpu",
            "churn_report",
            "hash",
        }

    def test_every_option_dtype_and_shape_is_a_case_once(self):
        names = [case.name for case in parity.cases()]
        assert len(names) == len(set(names))
        whole = len(parity.OPTIONS) * len(parity.DTYPES) * len(parity.SHAPES)
        assert sum(name.startswith("cpu ") for name in names) == whole

    def test_an_error_beyond_the_bound_fails(self):
        want = [torch.full((4,), 2.0), torch.zeros(3)]
        got = [torch.full((4,), 2.0 * (1 + 2e-5)), torch.zeros(3)]
        found, passed = parity.errors(got, want)
        assert not passed
        assert found["relative"] == pytest.approx(2e-5, rel=0.01)
        assert found["absolute"] == pytest.approx(4e-5, rel=0.01)
        assert parity.errors(want, want) == ({"absolute": 0.0, "relative": 0.0}, True)

    @pytest.mark.parametrize(
        ("got", "want"), [("nan", "1"), ("1", "nan"), ("inf", "-inf"), ("nan", "inf")]
    )
    def test_values_that_are_not_finite_have_to_be_the_same(self, got, want):
        found, passed = parity.errors([torch.tensor([float(got)])], [torch.tensor([float(want)])])
        assert (found["relative"], passed) == (None, False)
        assert parity.errors([torch.tensor([float(got)])], [torch.tensor([float(got)])])[1]

    def test_a_changed_bit_is_a_different_result(self, monkeypatch):
        assert not parity.same_bits(torch.tensor([0.0]), torch.tensor([-0.0]))
        assert parity.same_bits(torch.tensor([torch.nan]), torch.tensor([torch.nan]))
        evaluate, calls = parity.evaluate, []

        def wavering(*arguments):
            calls.append(arguments)
            results = evaluate(*arguments)
            if len(calls) == 3:
                results.gradients[1][0, 0] += 1e-3
            return results

        monkeypatch.setattr(parity, "evaluate", wavering)
        for mode, passed in (("invariant", False), ("fast", True)):
            calls.clear()
            found = parity.replay(mode, torch.float32, (4, 5), "cpu", "cpu", replays=4)
            assert found == {"replays": 4, "differing": 1, "passed": passed}

    def test_replays_end_in_time(self, monkeypatch):
        monkeypatch.setattr(parity, "REPLAY_SECONDS", 0.0)
        found = parity.replay("exact", torch.float32, (4, 5), "cpu", "cpu", replays=9)
        assert found == {"replays": 1, "differing": 0, "passed": True}

    @pytest.mark.parametrize("classes", [300, 4200])
    def test_exact_bits_outlive_other_launch_settings(self, classes, monkeypatch):
        if "triton" not in ck.available_backends():
            pytest.skip("Triton is not here")
        found = parity.launch_settings(torch.float32, (2, classes), "cpu", "triton")
        assert found == {"plans": 2, "differing": [], "passed": True}
        monkeypatch.setattr(parity, "SETTINGS", ())  # what changes nothing shows nothing
        found = parity.launch_settings(torch.float32, (2, classes), "cpu", "triton")
        assert not found["passed"]

    def test_launch_settings_are_a_case(self):
        checks = {case.facts["check"] for case in parity.cases("cpu", "triton")}
        assert "launch settings" in checks


class TwoSided(torch.autograd.Function):
    """A loss whose gradient is known, given to the input alone as Liger's functions do."""

    @staticmethod
    def forward(ctx, given, loss, gradient):
        ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    def backward(ctx, upstream):
        return upstream * ctx.saved_tensors[0], None, None


def liger_jsd(log_q, log_p, shift_labels, beta):
    """Liger's generalised divergence: the input's gradient only, the mean over rows."""
    x, y = log_q.detach().requires_grad_(), log_p.detach()
    with torch.enable_grad():
        if beta == 0.0:
            loss = (y.exp() * (y - x)).sum(1).mean()
        elif beta == 1.0:
            loss = (x.exp() * (x - y)).sum(1).mean()
        else:
            m = (beta * y.exp() + (1 - beta) * x.exp()).log()
            loss = (beta * y.exp() * (y - m) + (1 - beta) * x.exp() * (x - m)).sum(1).mean()
        (gradient,) = torch.autograd.grad(loss, x)
    return TwoSided.apply(log_q, loss.detach(), gradient)


def liger_cross_entropy(logits, target):
    """Liger's cross entropy: writes the gradient over the logits."""
    copy = logits.detach().clone().requires_grad_()
    with torch.enable_grad():
        loss = F.cross_entropy(copy, target)
        (gradient,) = torch.autograd.grad(loss, copy)
    with torch.no_grad():
        logits.data.copy_(gradient)
    return TwoSided.apply(logits, loss.detach(), gradient)


@pytest.fixture
def packages(monkeypatch):
    """Stand-ins for the published packages, with their signatures and habits."""
    functional = types.ModuleType("liger_kernel.transformers.functional")
    functional.liger_jsd, functional.liger_cross_entropy = liger_jsd, liger_cross_entropy
    quack = types.ModuleType("quack")
    quack.cross_entropy = F.cross_entropy
    for module in (functional, quack):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    for parent in ("liger_kernel", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))


class TestBenchmarks:
    def entries(self, tmp_path, wanted):
        chosen = [case for case in bench.cases(TINY_PLAN) if wanted(case.facts)]
        written = Journal(tmp_path / "benchmarks.json", chosen)
        assert journal.work(chosen, written, Deadline(600.0), "cpu") == 0
        assert len(written.entries) == len(chosen) > 0
        return written.entries

    def test_every_peer_passes_its_check_and_is_timed(self, tmp_path, packages):
        entries = self.entries(
            tmp_path,
            lambda facts: (
                facts.get("classes", 1000) == 1000 and not facts["peer"].startswith("torch.compile")
            ),
        )
        assert [entry for entry in entries if "ms" not in entry] == []
        assert {entry["group"] for entry in entries} == {*table.SECTIONS, "churn_report"}
        assert {entry["peer"] for entry in entries} >= {"Liger", "QuACK", "Liger JSD", "eager"}
        assert all(entry["ms"] > 0 for entry in entries)
        record = {"host": HOST, "stages": [], **dict.fromkeys(table.PARTS, EMPTY)}
        page = table.page({**record, "benchmarks": {"entries": entries, "left_out": []}})
        assert "a gradient to one side only" in page

    def test_a_peer_that_is_not_there_is_absent(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "quack", None)
        (entry,) = self.entries(
            tmp_path,
            lambda f: (f["peer"], f.get("classes"), f.get("dtype")) == ("QuACK", 1000, "float32"),
        )
        assert "ms" not in entry
        assert "quack" in entry["absent"]

    def test_a_wrong_peer_is_not_timed(self, tmp_path):
        wrong = published.Peer("wrong", lambda: lambda *given: 1.01 * eager(*given), PAIR)
        with pytest.raises(AssertionError, match=r"relative error 1\.0e-02"):
            bench.time_peer(wrong, TINY, TINY_PLAN)

    def test_what_is_timed_is_checked_again(self):
        calls = []

        def fading(logits, target):
            calls.append(target)
            return eager(logits, target) * (1.0 if len(calls) < 6 else 1.01)

        peer = published.Peer("fading", lambda: fading, PAIR)
        with pytest.raises(AssertionError, match="relative error"):
            bench.time_peer(peer, TINY, TINY_PLAN)

    def test_what_cannot_be_captured_is_timed_between_events(self, monkeypatch):
        def refuse(steps):
            raise RuntimeError("operation not permitted when stream is capturing")

        monkeypatch.setattr(timing, "CapturedPass", refuse)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
        steps = [lambda: torch.tensor(1.0), lambda: torch.tensor(2.0)]
        every = timing.make_pass(steps, "cuda", capturable=True)
        assert (every.graph, every.run()) == (False, [torch.tensor(1.0), torch.tensor(2.0)])

        def full(steps):
            raise torch.OutOfMemoryError("Tried to allocate 1 TiB")

        monkeypatch.setattr(timing, "CapturedPass", full)
        with pytest.raises(torch.OutOfMemoryError):
            timing.make_pass(steps, "cuda", capturable=True)

    def test_a_pair_moves_enough_bytes(self):
        for classes in bench.CLASSES:
            for dtype in bench.DTYPES:
                rows, columns = bench.Plan().pair_shape(classes, dtype)
                moved = 4 * rows * columns * dtype.itemsize
                assert columns == classes
                assert 2**29 <= moved < 2**30 + 2**28

    def test_cases_have_names_of_their_own(self):
        names = [case.name for case in bench.cases(bench.Plan())]
        assert len(names) == len(set(names))

    def test_only_what_is_ours_is_a_failure_of_the_run(self):
        failed = {"group": "pair", "failed": "out of memory"}
        entries = [{**failed, "peer": "Liger"}, {**failed, "peer": "churn_kernels invariant"}]
        assert bench.failures(entries) == ["pair churn_kernels invariant: out of memory"]


def test_the_expectation_in_blocks_is_that_of_the_whole(monkeypatch):
    logits, target = batch((7, 5))
    for variant in (PAIR, Variant(eager, upstream=3.0)):
        whole = expectation(variant.loss, logits, target, variant.upstream)
        monkeypatch.setattr("benchmarks.cases.REFERENCE_ELEMENTS", 10)  # two rows at a time
        parts = expectation(variant.loss, logits, target, variant.upstream)
        monkeypatch.undo()
        assert max(map(relative_error, parts, whole)) < 1e-14
        wide = [z.detach().double().requires_grad_() for z in logits]
        value = eager(wide, target)
        value.backward(torch.tensor(variant.upstream or 1.0, dtype=torch.float64))
        want = [value.detach(), *(z.grad for z in wide)]
        assert max(map(relative_error, whole, want)) < 1e-12


class TestChurn:
    def test_runs_that_share_every_seed_are_compared_and_audited(self, tmp_path):
        size = {"repetitions": 3, "epochs": 1, "network": "mlp", "pairs": 2, "steps": 2}
        every = churn.cases("cpu", replays=2, **size)
        chosen = [every[0], every[1], every[-1]]
        written = Journal(tmp_path / "churn.json", chosen)
        assert journal.work(chosen, written, Deadline(600.0), "cpu") == 0
        plain, why, exact = written.entries
        for entry in (plain, exact):
            assert entry["churn"][0] == 0
            assert (entry["identical"], entry["pairs"]) == (3, 3)
        assert (exact["mode"], exact["deterministic"]) == ("exact", True)
        assert (why["verdict"], why["parted"], why["shares"]) == ("none", 0, [])
        nothing = dict.fromkeys(table.PARTS, EMPTY)
        record = {"entries": written.entries, "left_out": []}
        page = table.page({"host": HOST, "stages": [], **nothing, "churn": record})
        assert "| exact | on | " in page
        assert "0 of 2 pairs differ; operators that race: none." in page
