"""Shares of causes: what a deterministic twin of each suspect removes."""

import math
import re
from contextlib import contextmanager, nullcontext

import audit_targets
import pytest
import torch
from torch import nn

import churn_kernels as ck
from churn_kernels import _ops
from churn_kernels.audit import figures, text
from churn_kernels.audit.attribute import EVERYTHING, _share
from churn_kernels.audit.pairs import Pair
from churn_kernels.audit.twins import in_parts, missing_twins
from churn_kernels.intervals import Estimate

pytestmark = pytest.mark.skipif(not _ops.LOADED, reason="the compiled library is not built")

RACE = "churn_audit.racy_sum.default"
ONEDNN = {"onednn": ck.audit.TWINS["onednn"]}


def share_of(twin, plain):
    """The share of a twin by the distances of its pairs and of those without."""
    pairs = [Pair([0.0, float(d)], [], 1 if d else None, "parameters") for d in twin]
    return _share("x", pairs, torch.as_tensor(plain, dtype=torch.float64))


def shares_of(found):
    return {share.suspect: share for share in found.shares}


def test_the_planted_race_is_the_cause(threads):
    threads(1)
    found = ck.audit.attribute(
        audit_targets.racy, 3, pairs=4, operators=[RACE], suspects={"onednn": ONEDNN["onednn"]}
    )
    assert found.distance.mean > 0
    parted = sum(pair.step is not None for pair in found.pairs)
    assert parted > 0
    shares = shares_of(found)
    assert list(shares)[-1] == EVERYTHING
    for name in (RACE, EVERYTHING):
        assert shares[name].share.mean == 1.0
        assert shares[name].certain == (parted == 4)
        assert shares[name].differing == 0
        assert shares[name].bound == 0.75
    assert shares["onednn"].differing > 0
    assert shares["onednn"].share.mean < 1


def test_threads_are_the_cause(threads):
    threads(1)
    suspects = {"threads": ck.audit.TWINS["threads"], **ONEDNN}
    found = ck.audit.attribute(
        audit_targets.by_threads, 2, pairs=2, apart=["threads"], suspects=suspects
    )
    shares = shares_of(found)
    assert shares["threads"].share.mean == 1.0
    assert shares["onednn"].share.mean == pytest.approx(0.0, abs=0.2)
    assert torch.get_num_threads() == 1


def test_the_split_of_the_batch_is_the_cause(threads):
    threads(1)
    found = ck.audit.attribute(
        audit_targets.steady,
        3,
        pairs=2,
        apart=["batch"],
        suspects={"batch": ck.audit.TWINS["batch"], **ONEDNN},
    )
    assert found.distance.mean > 0  # the weights' gradients are sums over the batch
    shares = shares_of(found)
    assert shares["batch"].share.mean == 1.0
    assert shares["batch"].differing == 0
    assert shares["onednn"].differing == 2


class Noisy:
    """Two independent sources of noise, of which one has three times the other's size."""

    def __init__(self):
        self.on = {"large": 3.0, "small": 1.0}
        self.generator = torch.Generator()  # its own: replays do not restore it

    def build(self, device):
        model = nn.Linear(100, 20)
        nn.init.ones_(model.weight)
        nn.init.ones_(model.bias)

        def step(n):
            with torch.no_grad():
                for size in self.on.values():
                    noise = torch.randn(model.weight.shape, generator=self.generator)
                    model.weight += 1e-6 * size * noise

        return ck.audit.Training(model, torch.optim.SGD(model.parameters(), 0.1), step)

    def without(self, name):
        @contextmanager
        def around(side, model):
            size, self.on[name] = self.on[name], 0.0
            yield
            self.on[name] = size

        return around


def test_shares_of_independent_causes_are_their_variances():
    noisy = Noisy()
    suspects = {name: noisy.without(name) for name in ("large", "small")}
    found = ck.audit.attribute(noisy.build, 2, pairs=6, suspects=suspects)
    shares = shares_of(found)
    assert shares["large"].share.mean == pytest.approx(0.9, abs=0.02)
    assert shares["small"].share.mean == pytest.approx(0.1, abs=0.1)
    for name in suspects:
        estimate = shares[name].share
        assert estimate.low < estimate.mean < estimate.high < 1
        assert shares[name].differing == 6
    assert shares[EVERYTHING].share.mean == 1.0


def test_equal_replays_have_no_shares(threads):
    threads(1)
    found = ck.audit.attribute(audit_targets.steady, 2, pairs=2, suspects=ONEDNN)
    assert (found.shares, found.distance.mean) == ([], 0.0)


def test_what_cannot_be_swapped_is_said(threads):
    threads(1)

    @contextmanager
    def impossible(side, model):
        raise NotImplementedError("no exact mode here")
        yield

    found = ck.audit.attribute(
        audit_targets.racy, 2, pairs=2, operators=[RACE], suspects={"mode": impossible}
    )
    assert found.skipped == {"mode": "no exact mode here"}
    assert [share.suspect for share in found.shares] == [RACE, EVERYTHING]
    if not torch.cuda.is_available():
        assert missing_twins()["cudnn"] == "there is no CUDA device"


def test_what_the_training_itself_cannot_do_is_no_twins_fault():
    def build(device):
        raise NotImplementedError("mine")

    with pytest.raises(NotImplementedError, match="mine"):
        ck.audit.attribute(build, 2, pairs=2, suspects={})


def test_a_share_by_hand():
    share = share_of([1.0, 1.0, 1.0, 1.0], [1.0, 2.0, 3.0, 4.0])
    assert share.share.mean == pytest.approx(1 - 4 / 30)
    assert share.share.low < share.share.mean < share.share.high < 1
    assert not share.certain
    assert not share.too_few
    alike = share_of([4.0, 3.0, 2.0, 1.0], [1.0, 2.0, 3.0, 4.0]).share
    # 70 regroupings: the bounds leave out the one beyond them, 1 / 16 and 16 / 1, on either side.
    assert alike[:3] == pytest.approx((0.0, 1 - 16 / 1, 1 - 1 / 16))


@pytest.mark.parametrize(
    ("twin", "plain", "too_few", "certain"),
    [
        ([0.0, 0.0, 0.0], [1.0, 2.0, 3.0], True, False),  # three pairs never tell
        ([0.0] * 4, [0.0, 0.0, 0.0, 3.0], True, False),  # nor four of which one parts
        ([0.0] * 4, [1.0, 2.0, 3.0, 4.0], False, True),
        ([1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0], False, True),
        ([1.0, 2.0, 3.0, 5.5], [5.0, 6.0, 7.0, 8.0], False, False),
    ],
)
def test_few_pairs_tell_little(twin, plain, too_few, certain):
    share = share_of(twin, plain)
    assert (share.too_few, share.certain) == (too_few, certain)
    said = text.of_share(share)
    assert ("too few pairs" in said) == too_few
    assert ("may be chance" in said) == (not too_few and not certain)
    assert ("%" in said.split(";")[0]) == (not too_few)
    drawn = figures.shares([share])
    assert ("<circle" in drawn) == (not too_few)
    assert ('class="accent"' in drawn) == certain


def test_a_training_that_diverges_has_no_share():
    share = share_of([math.nan, 1.0, 2.0, 3.0], [1.0, 2.0, 3.0, 4.0])
    assert text.of_share(share).startswith("no share: a distance is not finite; 4 of 4 pairs")
    assert "<circle" not in figures.shares([share])


@pytest.mark.parametrize("count", [4, 8, 16])
@pytest.mark.parametrize("spread", [0.3, 2.0])
def test_intervals_of_innocent_twins_hold_0(count, spread, threads):
    """Distances of both kinds of pairs have one distribution, with a heavy tail or without."""
    threads(1)
    generator = torch.Generator().manual_seed(count)

    def distances():
        return (spread * torch.randn(count, generator=generator, dtype=torch.float64)).exp()

    shares = [share_of(distances(), distances()) for _ in range(200)]
    assert sum(share.share.low <= 0 <= share.share.high for share in shares) >= 190
    assert not any(share.too_few for share in shares)


def test_innocent_twins_of_pairs_that_seldom_part_hold_0(threads):
    threads(1)
    generator = torch.Generator().manual_seed(0)

    def distances():
        part = torch.rand(8, generator=generator) < 0.3
        return torch.rand(8, generator=generator, dtype=torch.float64) * part

    pairs = [(distances(), distances()) for _ in range(220)]
    shares = [share_of(twin, plain) for twin, plain in pairs if plain.any()][:200]
    assert len(shares) == 200
    assert sum(not share.certain for share in shares) >= 190


def test_a_twin_that_takes_nine_tenths_is_certain():
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2, 8, generator=generator, dtype=torch.float64).abs() + 0.5
    share = share_of(0.3 * noise[0], noise[1])
    assert share.certain
    assert 0 < share.share.low < share.share.mean < share.share.high < 1


def test_the_time_that_a_twin_costs():
    def pairs(seconds):
        return [Pair([0.0, 1.0], [], 1, "parameters", s) for s in seconds]

    share = ck.audit.Share("x", Estimate(0.0, -1.0, 0.5, math.nan), pairs([3.0, 30.0, 3.0]))
    attribution = ck.audit.Attribution(1, (), pairs([1.0, 2.0, 2.0]), share.share, [share], {})
    assert attribution.slowdown(share) == 1.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pairs": 1}, "pairs must be at least 2 and steps at least 1, got 1 and 10; an interval"),
        ({"steps": 0}, "pairs must be at least 2 and steps at least 1, got 8 and 0; an interval"),
        ({"apart": ["noise"]}, "apart must be some of nothing, contention, allocator, threads,"),
    ],
)
def test_bad_input(options, message):
    with pytest.raises(ck.audit.ReplayError, match=re.escape(message)):
        ck.audit.attribute(audit_targets.steady, **options)


# Twins --------------------------------------------------------------------------------------------


def test_pins_replace_what_is_returned_and_what_is_written():
    pins = ck.audit.Pins(["aten.mul.Tensor", "aten.mul_.Tensor", "aten.add.out"])
    results = []
    for side in range(2):
        x = torch.full((3,), 1.0 + side)
        with pins(side):
            made = x * x
            out = torch.zeros(3)
            torch.add(x, x, out=out)
            x.mul_(x)
            results.append((made, out, x))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_a_call_that_was_not_recorded_keeps_its_outputs():
    pins = ck.audit.Pins(["aten.mul.Tensor"])
    x = torch.full((3,), 2.0)
    with pins(0):
        x * 1.0
    with pins(1):
        first, again, shorter = x * x, x * x, x[:2] * x[:2]
    assert (first[0], again[0], shorter[0]) == (4.0, 4.0, 4.0)


def test_modules_in_parts():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(12, 3)).double()
    x = torch.randn(5, 2, 4, 4, dtype=torch.float64)
    want, calls = model(x), []
    hook = nn.Linear.forward

    def counting(self, x):
        calls.append(len(x))
        return hook(self, x)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Linear, "forward", counting)
        for outer, inner, parts in ((2, None, [3, 2]), (2, 5, [1] * 5), (5, 2, [3, 2])):
            calls.clear()
            with in_parts(model, outer), in_parts(model, inner) if inner else nullcontext():
                torch.testing.assert_close(model(x), want)
            assert calls == parts
        calls.clear()
        model(x)
        assert calls == [5]
    assert not any("forward" in module.__dict__ for module in model)
