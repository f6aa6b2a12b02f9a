"""Methods: their table, their ramps, and each objective against its formula."""

import dataclasses
import math

import pytest
import torch
from churn_trainer.methods import METHODS, RAMPS, Method, find_method
from churn_trainer.objectives import measured_logits, measured_members, objective

from churn_kernels import symmetric_kl, uniform_skl

P, Q, R, S = torch.randn(4, 6, 4, generator=torch.Generator().manual_seed(5))
Y = torch.arange(6) % 4
CE = torch.nn.functional.cross_entropy


def entropy(logits):
    return torch.special.entr(logits.softmax(1)).sum(1).mean()


def top(logits, k=3):
    return logits.topk(k, dim=1).values


def distilled(student, *teachers, temperature, weight=0.5):
    t = torch.stack([(teacher / temperature).softmax(1) for teacher in teachers]).mean(0)
    kl = (t * (t.log() - (student / temperature).log_softmax(1))).sum(1).mean()
    return (1 - weight) * CE(student, Y) + weight * temperature**2 * kl


def l1(p, q):
    return (p.softmax(1) - q.softmax(1)).abs().sum(1).mean()


def three(p, q, r):
    pairs = symmetric_kl(p, q) + symmetric_kl(p, r) + symmetric_kl(q, r)
    return CE(p, Y) + CE(q, Y) + CE(r, Y) + pairs


OBJECTIVES = {
    "baseline": lambda p, q, r: CE(p, Y),
    "entropy": lambda p, q, r: 0.7 * CE(p, Y) + 0.3 * entropy(p),
    "uniform-skl": lambda p, q, r: 0.997 * CE(p, Y) - 0.003 * uniform_skl(p),
    "ce": lambda p, q, r: CE(p, Y) + CE(q, Y) + 3 * symmetric_kl(p, q),
    "l1": lambda p, q, r: CE(p, Y) + CE(q, Y) + 3 * l1(p, q),
    "skl": lambda p, q, r: CE(p, Y) + CE(q, Y) + 3 * symmetric_kl(p, q),
    "skl-entropy": lambda p, q, r: (
        0.7 * (CE(p, Y) + CE(q, Y)) + 0.3 * (entropy(p) + entropy(q)) + 3 * symmetric_kl(p, q)
    ),
    "skl-uniform": lambda p, q, r: (
        0.997 * (CE(p, Y) + CE(q, Y))
        - 0.003 * (uniform_skl(p) + uniform_skl(q))
        + 3 * symmetric_kl(p, q)
    ),
    "entropy-top5": lambda p, q, r: 0.7 * CE(p, Y) + 0.3 * entropy(top(p)),
    "uniform-skl-top5": lambda p, q, r: 0.997 * CE(p, Y) - 0.003 * uniform_skl(top(p)),
    "skl3": three,
    "smoothing": lambda p, q, r: CE(p, Y, label_smoothing=0.1),
    "2-ensemble": lambda p, q, r: CE(p, Y) + CE(q, Y),
    "ensemble": lambda p, q, r: CE(p, Y) + CE(q, Y) + CE(r, Y),
    "average": lambda p, q, r: CE((p + q + r) / 3, Y),
    "self-distillation": lambda p, q, r: distilled(p, S, temperature=3),
    "2-distillation": lambda p, q, r: distilled(p, S, R, temperature=3),
    "distillation": lambda p, q, r: distilled(p, S, R, temperature=3),
}


def small(name):
    """The method, with at most three members, and three classes of its top k."""
    method = METHODS[name]
    changes = {"members": min(method.members, 3)}
    if method.top_k:
        changes["top_k"] = 3
    return dataclasses.replace(method, **changes)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_each_method_is_its_formula_at_full_weight(name):
    method = small(name)
    logits = torch.stack([P, Q, R])[: method.members]
    others = torch.stack([S, R])[: method.teachers] if method.teachers else None
    loss = objective(method, 1.0, logits, Y, others)
    torch.testing.assert_close(loss / 6, OBJECTIVES[name](P, Q, R))
    if method.ramp != "none":
        start = objective(method, 0.0, logits, Y, others)
        torch.testing.assert_close(start / 6, sum(CE(z, Y) for z in logits))


def test_every_method_has_its_formula_here():
    assert set(OBJECTIVES) | {"ce-stale"} == set(METHODS)


@pytest.mark.parametrize("members", [2, 3])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_stale_partner_that_is_fresh_gives_the_gradient_of_ce_codistillation(
    members, temperature
):
    changes = {"members": members, "temperature": temperature}
    logits = torch.stack([P, Q, R])[:members]
    gradients = []
    for name, others in (("ce", None), ("ce-stale", logits)):
        z = logits.clone().requires_grad_()
        method = dataclasses.replace(METHODS[name], **changes)
        objective(method, 1.0, z, Y, others).backward()
        gradients.append(z.grad)
    torch.testing.assert_close(*gradients)


def test_a_stale_partner_is_what_a_model_is_pulled_to():
    z = torch.stack([P, Q]).requires_grad_()
    objective(METHODS["ce-stale"], 1.0, z, Y, torch.stack([R, S])).backward()
    wanted = torch.stack([P, Q]).requires_grad_()
    held = S.softmax(1), R.softmax(1)  # each model sees the other's earlier self
    loss = sum(
        CE(z, Y, reduction="sum") - 3 * (fixed * z.log_softmax(1)).sum()
        for z, fixed in zip(wanted, held, strict=True)
    )
    loss.backward()
    torch.testing.assert_close(z.grad, wanted.grad)


def test_before_the_ramp_s_step_a_stale_partner_plays_no_part():
    logits = torch.stack([P, Q])
    loss = objective(METHODS["ce-stale"], 0.5, logits, Y, torch.full_like(logits, torch.nan))
    torch.testing.assert_close(loss / 6, CE(P, Y) + CE(Q, Y))


def test_what_is_measured():
    logits = torch.stack([P, Q, R])
    assert measured_members(METHODS["skl"]) == 1
    assert measured_members(METHODS["ensemble"]) == 10
    assert torch.equal(measured_logits(METHODS["skl"], logits), P)
    torch.testing.assert_close(
        measured_logits(METHODS["ensemble"], logits).softmax(1), logits.softmax(2).mean(0)
    )
    torch.testing.assert_close(measured_logits(METHODS["average"], logits), logits.mean(0))


def test_ramps_reach_full_weight_at_t0():
    at = [0, 0.25, 0.5, 0.999, 1, 3]
    assert [RAMPS["none"](t) for t in at] == [1] * 6
    assert [RAMPS["linear"](t) for t in at] == [0, 0.25, 0.5, 0.999, 1, 1]
    assert [RAMPS["step"](t) for t in at] == [0, 0, 0, 0, 1, 1]
    sigmoid = [RAMPS["sigmoid"](t) for t in at]
    assert sigmoid == sorted(sigmoid)
    assert sigmoid[2] == 0.5
    assert sigmoid[0] == pytest.approx(1 - sigmoid[4]) == pytest.approx(0.0067, rel=0.01)
    assert sigmoid[-1] == pytest.approx(1)


def test_table_of_methods():
    assert all(name == method.name for name, method in METHODS.items())
    assert len({method.label for method in METHODS.values()}) == len(METHODS)
    assert find_method("skl") is METHODS["skl"]
    with pytest.raises(ValueError, match=r"method must be one of baseline, .* got 'kl'; did you m"):
        find_method("kl")
    with pytest.raises(ValueError, match=r"got '12345'; `churn-train methods` describes them"):
        find_method("12345")


def test_a_label_says_what_was_changed():
    assert METHODS["skl"].label == "SKL co-distillation"
    changed = dataclasses.replace(METHODS["skl"], beta=1.0, ramp="step")
    assert changed.label == "SKL co-distillation, beta 1.0, ramp step"


def test_an_ensemble_s_logits_stay_finite_where_probabilities_underflow():
    logits = torch.tensor([[[0.0, -200.0]], [[0.0, -300.0]]])
    wanted = torch.tensor([[0.0, -200 - math.log(2)]])
    torch.testing.assert_close(measured_logits(METHODS["2-ensemble"], logits), wanted)


def test_teachers_are_ensembles_with_the_same_smoothing():
    assert METHODS["skl"].teacher() is None
    assert METHODS["self-distillation"].teacher() == METHODS["baseline"]
    assert METHODS["distillation"].teacher() == METHODS["ensemble"]
    method = Method("2-distillation", teachers=2, label_smoothing=0.2)
    assert method.teacher().label_smoothing == 0.2
    assert method.teacher().members == 2
