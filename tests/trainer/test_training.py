"""Data, models, methods and the loop."""

import math

import pytest
import torch
from churn_trainer import loop, models
from churn_trainer.config import Draw, Study, Training
from churn_trainer.data import DATASETS, digits, make_splits, standardise
from churn_trainer.loop import TrainingDiverged, fit
from churn_trainer.methods import METHODS, RAMPS, Method, find_method
from churn_trainer.models import BatchedMLP
from churn_trainer.optim import ClippedSGD
from small_study import small_study

from churn_kernels import codistillation_loss, symmetric_kl, uniform_skl

# Settings -----------------------------------------------------------------------------------------


def test_seeds_differ_by_what_and_where_and_follow_from_the_study_s():
    study = small_study()
    places = [(draw, *where) for draw in Draw for where in [(0,), (1,), (0, 1), (1, 0), (0, 0, 1)]]
    seeds = [study.seed_for(*place) for place in places]
    assert len(set(seeds)) == len(places)
    assert seeds == [small_study(runs=5).seed_for(*place) for place in places]
    assert small_study(seed=1).seed_for(*places[0]) != seeds[0]
    assert all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize(
    ("epochs", "points", "wanted"),
    [(10, 5, (2, 4, 6, 8, 10)), (3, 20, (1, 2, 3)), (7, 1, (7,)), (5, 2, (2, 5))],
)
def test_measured_epochs_end_with_the_last(epochs, points, wanted):
    study = small_study(training=Training(epochs=epochs), curve_points=points)
    assert study.measured_epochs() == wanted


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: small_study(runs=1), "runs must be at least 2, got 1; churn compares runs"),
        (lambda: small_study(splits=0), "splits must be at least 1, got 0; with one split"),
        (lambda: small_study(train_rows=0), "train_rows must be at least 1, got 0; 300 is"),
        (lambda: small_study(seed=-1), "seed must be at least 0, got -1; any whole number"),
        (lambda: small_study(curve_points=0), "curve_points must be at least 1, got 0; the last"),
        (lambda: small_study(hidden=(8, 0)), "hidden must be at least 1, got 0; list the widths"),
        (lambda: small_study(level=1), r"level must be in \(0, 1\), got 1; 0.95 is customary"),
        (lambda: small_study(methods=()), r"methods must name each .* got \[\]; drop what is"),
        (lambda: small_study(methods=("skl", "skl")), r"got \['skl', 'skl'\]; drop what is there"),
        (lambda: Training(epochs=0), "epochs must be at least 1, got 0; one epoch is one pass"),
        (lambda: Training(batch_rows=0), "batch_rows must be at least 1, got 0; 32 is the default"),
        (lambda: Training(learning_rate=0), "learning_rate must be a finite number above 0, got 0"),
        (lambda: Training(clip_norm=math.inf), "clip_norm must be a finite .* got inf; pass a lar"),
        (lambda: Training(momentum=1), r"momentum must be in \[0, 1\), got 1; 0 is plain"),
        (lambda: Training(ramp_share=0), r"ramp_share must be in \(0, 1\], got 0; 1 lets ramps"),
    ],
)
def test_wrong_settings_say_what_is_wanted(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# Data ---------------------------------------------------------------------------------------------


def test_digits_are_the_bundled_images():
    dataset = digits()
    assert dataset.features.shape == (1797, 64)
    assert dataset.features.dtype == torch.float32
    assert dataset.labels.dtype == torch.int64
    assert dataset.labels.unique().tolist() == list(range(dataset.classes)) == list(range(10))
    assert set(DATASETS) == {"digits"}


def test_splits_are_stratified_disjoint_and_their_own():
    dataset = digits()
    splits = make_splits(dataset, small_study(splits=3, train_rows=100))
    assert splits.train_features.shape == (3, 100, 64)
    assert splits.test_features.shape == (3, 1697, 64)
    for labels in splits.train_labels:
        assert ((labels.bincount(minlength=10) - 10).abs() <= 1).all()
    together = torch.cat([splits.train_labels, splits.test_labels], dim=1)
    assert (together.sort(dim=1).values == dataset.labels.sort().values).all()
    assert not torch.equal(splits.train_features[0], splits.train_features[1])
    again = make_splits(dataset, small_study(splits=2, train_rows=100))
    assert torch.equal(again.test_features, splits.test_features[:2])


def test_standardising_uses_the_training_rows_alone():
    train = torch.tensor([[0.0, 5.0], [2.0, 5.0]])
    test = torch.tensor([[4.0, 6.0]])
    standard, other = standardise(train, test)
    assert standard.tolist() == [[-1, 0], [1, 0]]
    assert other.tolist() == [[3, 1]]


@pytest.mark.parametrize("rows", [9, 1788])
def test_a_split_that_leaves_a_class_out_is_refused(rows):
    message = rf"train_rows must be in \[10, 1787\], got {rows}; every class needs rows on both"
    with pytest.raises(ValueError, match=message):
        make_splits(digits(), small_study(train_rows=rows))


# Models -------------------------------------------------------------------------------------------


def test_batched_model_is_its_models_one_by_one():
    seeds = [3, 1, 4]
    batched = BatchedMLP((7, 5, 6, 4), seeds)
    features = torch.randn(3, 11, 7, generator=torch.Generator().manual_seed(0))
    logits = batched(features)
    assert logits.shape == (3, 11, 4)
    for index, seed in enumerate(seeds):
        alone = BatchedMLP((7, 5, 6, 4), [seed])
        for many, one in zip(batched.parameters(), alone.parameters(), strict=True):
            assert torch.equal(many[index], one[0])
        values = features[index]
        for weight, bias in zip(alone.weights[:-1], alone.biases[:-1], strict=True):
            values = torch.relu(values @ weight[0] + bias[0])
        wanted = values @ alone.weights[-1][0] + alone.biases[-1][0]
        torch.testing.assert_close(logits[index], wanted)
    some = batched.predict(features[1:], slice(1, 3))
    torch.testing.assert_close(some, logits[1:])
    assert not some.requires_grad


def test_initial_weights_have_he_s_variance():
    weight = BatchedMLP((64, 64), range(50)).weights[0].detach()
    assert float(weight.var()) == pytest.approx(2 / 64, rel=0.02)
    assert float(weight.mean()) == pytest.approx(0, abs=0.002)


# Methods ------------------------------------------------------------------------------------------


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
    assert list(METHODS) == ["baseline", "entropy", "uniform-skl", "ce", "l1", "skl", "skl-entropy"]
    assert all(name == method.name for name, method in METHODS.items())
    assert len({method.label for method in METHODS.values()}) == len(METHODS)
    assert find_method("skl") is METHODS["skl"]
    with pytest.raises(
        ValueError, match=r"method must be one of baseline, .* got 'kl'; `churn-tra"
    ):
        find_method("kl")


P, Q = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(5))
Y = torch.arange(6) % 4
CE = torch.nn.functional.cross_entropy
OBJECTIVES = {
    "baseline": lambda p, q: CE(p, Y),
    "entropy": lambda p, q: 0.7 * CE(p, Y) + 0.3 * entropy(p),
    "uniform-skl": lambda p, q: 0.997 * CE(p, Y) - 0.003 * uniform_skl(p),
    "ce": lambda p, q: CE(p, Y) + CE(q, Y) + 3 * symmetric_kl(p, q),
    "l1": lambda p, q: CE(p, Y) + CE(q, Y) + 3 * (p.softmax(1) - q.softmax(1)).abs().sum(1).mean(),
    "skl": lambda p, q: CE(p, Y) + CE(q, Y) + 3 * symmetric_kl(p, q),
    "skl-entropy": lambda p, q: (
        0.7 * (CE(p, Y) + CE(q, Y)) + 0.3 * (entropy(p) + entropy(q)) + 3 * symmetric_kl(p, q)
    ),
}


def entropy(logits):
    return torch.special.entr(logits.softmax(1)).sum(1).mean()


@pytest.mark.parametrize("name", METHODS)
def test_each_method_is_its_formula_at_full_weight(name):
    method = METHODS[name]
    loss = codistillation_loss([P, Q][: method.members], Y, **method.loss_options(1.0))
    torch.testing.assert_close(loss, OBJECTIVES[name](P, Q))
    if method.ramp != "none":
        start = codistillation_loss([P, Q], Y, **method.loss_options(0.0))
        torch.testing.assert_close(start, CE(P, Y) + CE(Q, Y))


# The loop -----------------------------------------------------------------------------------------


def test_clipping_holds_each_model_s_step_by_itself():
    training = Training(learning_rate=0.5, momentum=0.9, clip_norm=1.0)
    parameters = [
        torch.zeros(2, 2, 2, requires_grad=True),
        torch.zeros(2, 1, 2, requires_grad=True),
    ]
    slope = [torch.full((2, 2, 2), 3.0), torch.full((2, 1, 2), 4.0)]
    slope[0][1] /= 1000
    slope[1][1] /= 1000
    optimizer = ClippedSGD(parameters, training)
    for steps in (1, 1.9):  # the second step's velocity is .9 + 1 of the first's
        before = [parameter.detach().clone() for parameter in parameters]
        optimizer.step(sum((p * s).sum() for p, s in zip(parameters, slope, strict=True)))
        moved = [(p.detach() - b).flatten(1) for p, b in zip(parameters, before, strict=True)]
        lengths = torch.cat(moved, dim=1).norm(dim=1)
        free = torch.cat([part.flatten(1) for part in slope], dim=1).norm(dim=1)
        assert lengths[0] == pytest.approx(0.5 * steps)
        assert lengths[1] == pytest.approx(0.5 * steps * free[1])


def test_a_model_without_gradient_stays():
    parameter = torch.ones(1, 1, 1, requires_grad=True)
    ClippedSGD([parameter], Training()).step((parameter * 0).sum())
    assert parameter.tolist() == [[[1]]]


@pytest.mark.parametrize("name", ["baseline", "skl-entropy"])
def test_batched_training_is_each_run_trained_alone(name, monkeypatch):
    study = small_study(runs=3)
    splits = make_splits(digits(), study)
    together = fit(METHODS[name], splits, study)

    # The same run alone: its own split, and the seeds of its place.
    split, run = 1, 2
    lonely = small_study(runs=1 + 1, splits=1)  # a study has two runs or more; look at the second
    places = {0: 0, 1: run}
    monkeypatch.setattr(
        Study,
        "seed_for",
        lambda self, draw, _, r, *member, seed_for=Study.seed_for: seed_for(
            study, draw, split, places[r], *member
        ),
    )
    own = type(splits)(
        *(part[split : split + 1] for part in vars(splits).values() if torch.is_tensor(part)),
        classes=splits.classes,
    )
    alone = fit(METHODS[name], own, lonely)
    for member in range(METHODS[name].members):
        for many, one in zip(together.parameters(), alone.parameters(), strict=True):
            wanted = one[member * 2 + 1]
            torch.testing.assert_close(
                many[member * 6 + split * 3 + run], wanted, rtol=1e-3, atol=1e-5
            )


def test_members_of_a_run_share_minibatches_and_start_apart():
    study = small_study()
    splits = make_splits(digits(), study)
    uncoupled = Method("pair", "pair", "two baselines", members=2)
    pair = fit(uncoupled, splits, study)
    single = fit(METHODS["baseline"], splits, study)
    runs = study.runs * study.splits
    for two, one in zip(pair.parameters(), single.parameters(), strict=True):
        torch.testing.assert_close(two[:runs], one, rtol=1e-3, atol=1e-5)
    assert not torch.equal(pair.weights[0][:runs], pair.weights[0][runs:])


def test_epochs_are_told_and_learning_happens():
    study = small_study(training=Training(epochs=5))
    told = []
    fit(METHODS["baseline"], make_splits(digits(), study), study, told.append)
    assert [epoch.number for epoch in told] == [1, 2, 3, 4, 5]
    losses = [epoch.cross_entropy for epoch in told]
    assert losses == sorted(losses, reverse=True)
    assert losses[0] < 1.2 * math.log(10) + 1


def test_divergence_of_the_training_is_named(monkeypatch):
    study = small_study()
    splits = make_splits(digits(), study)
    draw = models._draw_weights
    monkeypatch.setattr(
        models, "_draw_weights", lambda layers, seed: [w * math.inf for w in draw(layers, seed)]
    )
    with pytest.raises(TrainingDiverged, match="the loss of baseline diverged in epoch 1"):
        fit(METHODS["baseline"], splits, study)


def test_the_loss_is_the_library_s(monkeypatch):
    calls = []

    def spy(logits, target, **options):
        calls.append((tuple(logits.shape), tuple(target.shape), options["beta"]))
        return codistillation_loss(logits, target, **options)

    monkeypatch.setattr(loop, "codistillation_loss", spy)
    study = small_study(training=Training(epochs=2, ramp_share=1))
    fit(METHODS["skl"], make_splits(digits(), study), study)
    # 60 rows in minibatches of 32: 2 x 2 runs' rows at once, and the weight rises with each step.
    assert [call[:2] for call in calls] == [((2, 128, 10), (128,)), ((2, 112, 10), (112,))] * 2
    assert [call[2] for call in calls] == pytest.approx([0, 0.75, 1.5, 2.25])
