"""One unit in the last place: flipped, followed, and its growth held against a known rate."""

import math
import re

import audit_targets
import pytest
import torch
from torch import nn

import churn_kernels as ck
from churn_kernels import _ops
from churn_kernels.audit.amplify import growth_rate
from churn_kernels.audit.pairs import flip_ulp, run_pair

pytestmark = pytest.mark.skipif(not _ops.LOADED, reason="the compiled library is not built")


def test_growth_is_the_lyapunov_exponent():
    """The map's exponent is ln 2: each step loses one of the 53 bits of a float64."""
    found = ck.audit.amplify(audit_targets.chaotic, 200, inject_at=9, pairs=1)
    (pair,) = found.pairs
    assert pair.distances[:8] == [0.0] * 8
    assert pair.distances[8] in {2.0**-53, 2.0**-54, 2.0**-55}
    assert found.growth.mean == pytest.approx(math.log(2), rel=0.1)
    assert 45 <= pair.first_flip <= 75
    assert found.first_flips == [pair.first_flip]
    assert pair.step == 9
    assert pair.what == "parameters"
    assert 0.0 in pair.churn[100:]
    assert 1.0 in pair.churn[100:]


def test_flips_of_a_network(threads):
    threads(1)
    found = ck.audit.amplify(audit_targets.steady, 12, inject_at=3, pairs=4)
    for pair in found.pairs:
        assert pair.distances[:2] == [0.0, 0.0]
        assert pair.distances[2] > 0
        assert len(pair.distances) == len(pair.churn) == 13
    assert found.absorbed < 4
    assert found.growth.low < found.growth.mean < found.growth.high
    assert found.growth.mean > 0
    assert found.churn.mean == 0.0


def test_flips_that_are_rounded_away():
    def build(device):
        model = nn.Linear(2, 2, bias=False)
        nn.init.constant_(model.weight, 0.1)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        return ck.audit.Training(model, optimizer, lambda n: model.weight.data.fill_(1.0))

    found = ck.audit.amplify(build, 3, pairs=2)
    assert found.absorbed == 2
    assert math.isnan(found.growth.mean)
    assert found.churn is None
    assert found.first_flips == []


def test_the_rate_of_known_curves():
    exponential = [1e-9 * math.exp(0.3 * n) for n in range(40)]
    assert growth_rate(exponential) == pytest.approx(0.3)
    saturated = [min(d, 1e-6) for d in exponential] + [1e-6] * 100
    assert growth_rate(saturated) == pytest.approx(0.3, rel=0.01)
    assert growth_rate([1.0] * 9) == 0.0
    for curve in ([1.0], [0.0, 1.0], [1.0, math.nan, 2.0], [], [0.0, 0.0]):
        assert math.isnan(growth_rate(curve)), curve


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_a_flip_is_one_unit_of_one_number(dtype):
    for seed in range(9):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5)).to(dtype)
        model[0].weight.data = model[0].weight.data.t().contiguous().t()
        before = [p.detach().clone() for p in model.parameters()]
        flip_ulp(model, seed)
        found = [
            ck.audit.differences(p, q)
            for p, q in zip(before, model.parameters(), strict=True)
            if not torch.equal(p, q)
        ]
        assert len(found) == 1
        assert found[0].ulps == {1: 1}


def test_nothing_to_flip():
    model = nn.Linear(2, 2)
    for p in model.parameters():
        nn.init.zeros_(p)
    with pytest.raises(
        ck.audit.ReplayError, match="model must have parameters that are finite and"
    ):
        flip_ulp(model, 0)


@pytest.mark.parametrize("step", [0, 6])
def test_steps_that_are_not_run(step):
    message = f"inject_at must be a step from 1 to 5, got {step}; run more steps"
    with pytest.raises(ck.audit.ReplayError, match=re.escape(message)):
        ck.audit.amplify(audit_targets.steady, 5, inject_at=step)
    with pytest.raises(ck.audit.ReplayError, match=rf"flip\[0\] must be .* to 5, got {step}; run"):
        run_pair(audit_targets.steady, 5, flip=(step, 0))


def test_what_ends_in_no_number_is_not_rounded_away():
    pair = ck.audit.Pair([1.0, 0.5, math.nan], [], 1, "parameters")
    assert ck.audit.Amplification(2, 1, [pair], None, None).absorbed == 0


def test_predictions_of_another_shape():
    def build(device):
        training = audit_targets.training()
        return ck.audit.Training(
            training.model, training.optimizer, training.step, lambda: torch.ones(3)
        )

    message = "predict() must return logits of shape (N, C), got (3,); flatten what is a row"
    with pytest.raises(ck.audit.ReplayError, match=re.escape(message)):
        run_pair(build, 1)


def test_asking_for_predictions_changes_nothing():
    def build(device):
        training = audit_targets.training()
        training.model.add_module("drop", nn.Dropout())

        def predict():
            training.model.eval()
            torch.rand(())
            return training.model(torch.ones(2, 12))

        return ck.audit.Training(training.model, training.optimizer, training.step, predict)

    def silent(device):
        training = build(device)
        return ck.audit.Training(training.model, training.optimizer, training.step)

    asked = run_pair(build, 3, flip=(1, 0))
    assert run_pair(silent, 3, flip=(1, 0)).distances == asked.distances
