"""Values and gradients where float32 is short of range or digits."""

import math

import pytest
import torch
from parity import INF, seeded

import churn_kernels as ck
from benchmarks import accuracy, truth
from churn_kernels import _ops

LOWEST = torch.finfo(torch.float32).min
LARGEST = torch.finfo(torch.float32).max


@pytest.fixture(params=["fast", "exact"])
def mode(request, backend):
    """Each backend in both modes; the reference has no exact mode."""
    if backend == "reference" and request.param == "exact":
        pytest.skip("the reference does not keep exact mode")
    return request.param


def evaluated(loss, *logits):
    """Value and gradients of a loss of these logits."""
    leaves = [torch.tensor(z).requires_grad_() for z in logits]
    value = loss(*leaves)
    return value.detach(), torch.autograd.grad(value.sum(), leaves, materialize_grads=True)


def assert_is(found, wanted, rtol=1e-6):
    torch.testing.assert_close(
        found.double(), torch.tensor(wanted).double(), rtol=rtol, atol=0, equal_nan=True
    )


class TestFarApart:
    """Distances of logits up to the largest float32; what lies beyond counts as that."""

    @pytest.mark.parametrize("far", [1e28, 1e30, 1e36, 1.7e38, LARGEST])
    def test_symmetric_kl(self, mode, far):
        value, (a, b) = evaluated(
            lambda a, b: ck.symmetric_kl(a, b, mode=mode), [[0.0, -far]], [[0.0, 0.0]]
        )
        assert_is(value, far / 2)
        assert_is(a, [[0.5, -0.5]])
        assert_is(b, [[-far / 4, far / 4]])

    @pytest.mark.parametrize("far", [1e28, 1e30, LARGEST])
    def test_a_mask_in_either_model(self, mode, far):
        """The order of the models, more classes, several masks."""
        value, (a, b) = evaluated(
            lambda a, b: ck.symmetric_kl(a, b, mode=mode),
            [[0.0, 0.0, 0.0, 0.0]],
            [[0.0, 0.0, -far, -far]],
        )
        assert_is(value, far / 2)
        assert_is(a, [[-far / 8, -far / 8, far / 8, far / 8]])
        assert_is(b, [[0.25, 0.25, -0.25, -0.25]])

    @pytest.mark.parametrize("far", [1e30, LARGEST])
    def test_opposite_masks(self, mode, far):
        value, (a, b) = evaluated(
            lambda a, b: ck.symmetric_kl(a, b, mode=mode), [[0.0, -far / 4]], [[-far / 4, 0.0]]
        )
        assert_is(value, far / 2)
        assert not torch.cat([a, b]).isnan().any()

    @pytest.mark.parametrize("far", [1e28, 1e30, LARGEST])
    def test_distillation(self, mode, far):
        value, (student, _) = evaluated(
            lambda s, t: ck.distillation_loss(s, t, None, alpha=1.0, mode=mode),
            [[0.0, -far]],
            [[0.0, 0.0]],
        )
        assert_is(value, far / 2)
        assert_is(student, [[0.5, -0.5]])

    @pytest.mark.parametrize("far", [1e28, 1e30, LARGEST])
    def test_uniform_skl(self, mode, far):
        value, (z,) = evaluated(lambda z: ck.uniform_skl(z, mode=mode), [[0.0, -far]])
        assert_is(value, far / 2)
        assert_is(z, [[0.5, -0.5]])

    @pytest.mark.parametrize("masks", [1, 5])
    def test_label_smoothing(self, mode, masks):
        """More masks than float32 has room for in a sum of distances."""
        row = [1.0, 2.0, 3.0, *[LOWEST] * masks]
        target = torch.tensor([0])
        value, (z,) = evaluated(
            lambda z: ck.regularized_cross_entropy(z, target, label_smoothing=0.1, mode=mode),
            [row],
        )
        assert_is(value, 0.1 * masks / len(row) * LARGEST)
        wanted = torch.tensor(row).double().softmax(0) - 0.1 / len(row)
        wanted[0] -= 0.9
        torch.testing.assert_close(z[0].double(), wanted, rtol=1e-5, atol=1e-7)

    def test_a_weighted_distance_beyond_counts_as_the_largest(self, mode):
        value, (z,) = evaluated(
            lambda z: ck.regularized_cross_entropy(
                z,
                torch.tensor([0]),
                class_weight=torch.tensor([1.0, 1.99]),
                label_smoothing=0.1,
                mode=mode,
            ),
            [[0.0, LOWEST]],
        )
        assert_is(value, 0.1 / 2 * LARGEST)
        assert_is(z, [[0.1 / 2 * 1.99, -0.1 / 2 * 1.99]])

    @pytest.mark.parametrize("temperature", [0.25, 0.5, 2.0])
    def test_distillation_at_a_temperature(self, mode, temperature):
        value, (student, _) = evaluated(
            lambda s, t: ck.distillation_loss(
                s, t, None, alpha=1.0, temperature=temperature, mode=mode
            ),
            [[0.0, LOWEST]],
            [[0.0, 0.0]],
        )
        assert_is(value, temperature**2 * min(1.0, 1 / temperature) * LARGEST / 2)
        assert_is(student, [[temperature / 2, -temperature / 2]])

    def test_a_distance_beyond_counts_as_the_largest(self, mode):
        value, (z,) = evaluated(
            lambda z: ck.uniform_skl(z, mode=mode), [[LARGEST, LOWEST, LARGEST, LARGEST]]
        )
        assert_is(value, LARGEST / 4)
        assert not z.isnan().any()

    def test_cross_entropy_of_a_target_at_the_other_end(self, mode):
        found = ck.regularized_cross_entropy(
            torch.tensor([[LARGEST, LOWEST]]), torch.tensor([1]), mode=mode
        )
        assert_is(found, LARGEST)

    @pytest.mark.parametrize("scale", [1e4, 1e9])
    def test_gradients_keep_their_digits(self, mode, scale):
        a = (torch.eye(6) * scale).requires_grad_()
        b = (torch.eye(6).flip(1) * scale).requires_grad_()
        target = torch.arange(6)
        loss = ck.codistillation_loss([a, b], target, alpha=0.1, beta=0.5, mode=mode)
        found = torch.autograd.grad(loss, (a, b))
        wanted = (torch.zeros(6, 6), (0.9 * (torch.eye(6).flip(1) - torch.eye(6)) / 6))
        for gradient, exact in zip(found, wanted, strict=True):
            # Each row is sure of one class: nothing is left of the divergence's gradient but p - q.
            other = torch.eye(6) - torch.eye(6).flip(1)
            exact = exact + 0.5 / 6 * (other if gradient is found[0] else -other)
            torch.testing.assert_close(gradient, exact, rtol=0, atol=1.2e-7)

    def test_a_low_temperature(self, mode):
        g = seeded("a low temperature")
        a, b = (10 * torch.randn(8, 10, generator=g) for _ in range(2))

        def gradients(a, b, mode):
            leaves = [z.clone().requires_grad_() for z in (a, b)]
            loss = ck.codistillation_loss(leaves, beta=0.5, temperature=0.001, mode=mode)
            return torch.autograd.grad(loss, leaves)

        found = gradients(a, b, mode)
        with ck.backend("reference"):
            wanted = gradients(a.double(), b.double(), None)
        for gradient, exact in zip(found, wanted, strict=True):
            torch.testing.assert_close(gradient.double(), exact, rtol=1e-6, atol=1e-6)


class TestNearlyEqual:
    """What is left of two models that almost agree, and of rows that are almost flat."""

    @pytest.mark.parametrize("apart", [1e-3, 1e-4, 1e-5])
    @pytest.mark.parametrize("term", ["skl", "l1", "kl"])
    def test_no_bias_and_never_negative(self, mode, backend, apart, term):
        g = seeded(apart, term)
        rows, classes = (4, 300) if backend == "triton" else (64, 1000)
        a = 3 * torch.randn(rows, classes, generator=g)
        b = a * (1 + apart * torch.randn(rows, classes, generator=g))
        target = torch.zeros(rows, dtype=torch.int64)
        if term == "kl":
            found = ck.distillation_loss(a, b, None, alpha=1.0, reduction="none", mode=mode)
            true = truth.true_distillation
        else:
            found = ck.codistillation_terms([a, b], divergence=term, mode=mode).divergence[:, 0]
            true = truth.true_l1 if term == "l1" else truth.true_symmetric_kl
        wanted = torch.from_numpy(true(a, b, target)[0].astype("float64"))
        assert found.min() >= 0
        bias = ((found.double() - wanted).sum() / wanted.sum()).abs()
        assert bias < (1e-2 if apart == 1e-5 else 1e-3)

    @pytest.mark.parametrize("classes", [2, 3])
    @pytest.mark.parametrize("divergence", ["skl", "l1"])
    def test_rounding_makes_no_divergence_negative(self, mode, backend, divergence, classes):
        """Logits a last place apart, and rows enough for any sign of what rounding leaves."""
        g, rows = seeded(0), 100 if backend == "triton" else 10000
        a = torch.randn(rows, classes, generator=g)
        b = a * (1 + 1e-7 * torch.randn(rows, classes, generator=g))
        found = ck.codistillation_terms([a, b], divergence=divergence, mode=mode).divergence
        assert found.min() >= 0

    @pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
    @pytest.mark.parametrize("teachers", [1, 2])
    def test_models_that_agree_are_at_no_distance(self, mode, temperature, teachers):
        z = 3 * torch.randn(5, 100, generator=seeded("equal"))
        options = {"temperature": temperature, "mode": mode, "reduction": "none"}
        found = ck.distillation_loss(z, [z] * teachers, None, alpha=1.0, **options)
        assert bool(((found >= 0) & (found < 1e-11)).all())
        for divergence in ("skl", "ce", "l1"):
            found = ck.codistillation_loss([z, z.clone()], divergence=divergence, **options)
            assert bool(((found >= 0) & (found < 1e-11)).all())

    @pytest.mark.parametrize("top_k", [None, 50])
    @pytest.mark.parametrize("renormalize", [True, False])
    def test_uniform_skl_of_flat_rows(self, mode, backend, top_k, renormalize):
        if top_k is None and not renormalize:
            pytest.skip("the same as renormalised")
        classes = 300 if backend == "triton" else 50000
        z = 1e-3 * torch.randn(4, classes, generator=seeded("flat"))
        options = {"top_k": top_k, "renormalize_top_k": renormalize, "reduction": "none"}
        found = ck.uniform_skl(z, mode=mode, **options)
        with ck.backend("reference"):
            wanted = ck.uniform_skl(z.double(), **options)
        assert bool(((found.double() - wanted).abs() <= 2e-5 * wanted.abs()).all())


class TestTermsLargerThanTheLogitsSeem:
    """Exact mode scales its sums by the largest term, which is not what the logits say at once."""

    @pytest.fixture(autouse=True)
    def in_mode(self, mode):
        with ck.reduction_mode(mode):
            yield

    def check(self, loss, *rows):
        def evaluate(rows):
            leaves = [z.clone().requires_grad_() for z in rows]
            value = loss(*leaves)
            return value, *torch.autograd.grad(value, leaves, materialize_grads=True)

        found = evaluate(rows)
        with ck.backend("reference"), ck.reduction_mode("fast"):
            wanted = evaluate([z.double() for z in rows])
        torch.testing.assert_close(found[0].double(), wanted[0], rtol=1e-5, atol=1e-10)
        for a, b in zip(found[1:], wanted[1:], strict=True):
            torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("offset", [1e5, 1e6, 1e9])
    @pytest.mark.parametrize("divergence", ["skl", "ce", "l1"])
    def test_one_model_at_an_offset(self, offset, divergence):
        g = seeded(offset)
        a = torch.randn(3, 200, generator=g)
        b = torch.stack([a[0], a[1] + 0.1, torch.randn(200, generator=g)]) + offset
        self.check(lambda a, b: ck.codistillation_loss([a, b], divergence=divergence), a, b)

    @pytest.mark.parametrize("temperature", [0.003, 0.01, 0.03])
    @pytest.mark.parametrize("divergence", ["skl", "ce", "l1"])
    def test_a_low_temperature(self, temperature, divergence):
        sign = (torch.rand(2, 1000, generator=seeded(temperature)) - 0.5).sign()
        options = {"divergence": divergence, "temperature": temperature}
        self.check(
            lambda a, b: ck.codistillation_loss([a, b], **options),
            torch.zeros(2, 1000),
            temperature * sign,
        )

    @pytest.mark.parametrize("mask", [-100.0, -1e9, LOWEST, -INF])
    @pytest.mark.parametrize("teachers", [1, 2])
    @pytest.mark.parametrize("head", ["zero", "random", "sure"])
    def test_a_masked_teacher(self, mask, teachers, head):
        """Classes that the student alone has, or one teacher of two."""
        z = torch.randn(teachers + 1, 2, 300, generator=seeded(mask, teachers, head))
        if head == "zero":
            z.zero_()
        if head == "sure":
            z[..., 1] += 30
        z[1, :, ::3] = mask
        self.check(lambda s, *t: ck.distillation_loss(s, list(t), None, alpha=1.0), *z)

    def test_a_teacher_that_is_nan_where_the_student_lacks_a_class(self):
        value, _ = evaluated(
            lambda s, t: ck.distillation_loss(s, t, None, alpha=1.0),
            [[0.0, -INF, 1.0]],
            [[0.0, 1.0, math.nan]],
        )
        assert value.isnan()


class TestOneModelWithoutAMeaning:
    """With L1 a partner's gradient stays finite."""

    @pytest.mark.parametrize("broken", [[math.nan, 1.0, 2.0], [INF, 1.0, 2.0], [-INF] * 3])
    @pytest.mark.parametrize("first", [True, False])
    @pytest.mark.parametrize("reduction", ["mean", "none"])
    def test_l1(self, mode, broken, first, reduction):
        healthy = [0.5, 1.0, 0.0]
        rows = (broken, healthy) if first else (healthy, broken)
        value, gradients = evaluated(
            lambda a, b: ck.codistillation_loss(
                [a, b], divergence="l1", reduction=reduction, mode=mode
            ),
            *([row] for row in rows),
        )
        assert value.isnan().all()
        assert gradients[0 if first else 1].isnan().all()
        assert torch.equal(gradients[1 if first else 0], torch.zeros(1, 3))

    def test_three_models(self, mode):
        rows = [[[math.nan, 1.0, 2.0]], [[0.5, 1.0, 0.0]], [[0.0, 1.0, 2.0]]]
        _, (_, b, c) = evaluated(
            lambda *z: ck.codistillation_loss(list(z), divergence="l1", mode=mode), *rows
        )
        _, (alone_b, alone_c) = evaluated(
            lambda *z: ck.codistillation_loss(list(z), divergence="l1", mode=mode), *rows[1:]
        )
        torch.testing.assert_close(b, alone_b / 3)  # one pair of three
        torch.testing.assert_close(c, alone_c / 3)


class TestClassWeights:
    """Classes at -inf, and weights that are no ordinary numbers."""

    @pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 1.0])
    @pytest.mark.parametrize("label", [0, 1])
    def test_a_class_of_weight_0_at_minus_infinity_adds_nothing(self, mode, label_smoothing, label):
        z, weight = torch.tensor([[0.5, -INF, 1.0]]), torch.tensor([1.0, 0.0, 2.0])
        found = ck.regularized_cross_entropy(
            z,
            torch.tensor([label]),
            class_weight=weight,
            label_smoothing=label_smoothing,
            reduction="sum",
            mode=mode,
        )
        surprise = -torch.tensor([0.5, 1.0]).log_softmax(0)
        hard = surprise[0] if label == 0 else 0.0
        soft = (surprise[0] + 2 * surprise[1]) / 3
        assert_is(found, float((1 - label_smoothing) * hard + label_smoothing * soft))

    def test_of_another_weight_it_is_infinite(self, mode):
        found = ck.regularized_cross_entropy(
            torch.tensor([[0.5, -INF, 1.0]]),
            torch.tensor([0]),
            class_weight=torch.tensor([1.0, 1e-3, 2.0]),
            label_smoothing=0.1,
            mode=mode,
        )
        assert found == INF

    def test_an_infinite_weight(self, mode):
        """As in torch: undefined where a label has it, of no effect where none has."""
        z = torch.randn(4, 5, generator=seeded("infinite")).requires_grad_()
        weight = torch.tensor([INF, 1.0, 1.0, 1.0, 1.0])
        for labels in ([0, 1, 2, 3], [1, 2, 3, 4]):
            target = torch.tensor(labels)
            found = ck.regularized_cross_entropy(z, target, class_weight=weight, mode=mode)
            wanted = torch.nn.functional.cross_entropy(z, target, weight=weight)
            torch.testing.assert_close(found, wanted, equal_nan=True)
            torch.testing.assert_close(
                torch.autograd.grad(found, z)[0],
                torch.autograd.grad(wanted, z)[0],
                equal_nan=True,
            )

    def test_an_infinite_weight_leaves_ignored_rows_alone(self, mode):
        z = torch.randn(2, 3, generator=seeded("ignored")).requires_grad_()
        loss = ck.regularized_cross_entropy(
            z, torch.tensor([-100, 2]), class_weight=torch.tensor([INF, 1.0, 1.0]), mode=mode
        )
        (gradient,) = torch.autograd.grad(loss, z)
        assert torch.equal(gradient[0], torch.zeros(3))
        assert gradient[1].isfinite().all()


def test_a_class_that_only_a_teacher_has(mode):
    """However little the teacher gives it."""
    for logit in (0.5, -50.0, -100.0, -1e4):
        found = ck.distillation_loss(
            torch.tensor([[0.0, -INF, 1.0]]),
            [torch.tensor([[0.0, logit, 0.5]]), torch.tensor([[0.0, -INF, 0.5]])],
            None,
            alpha=1.0,
            mode=mode,
        )
        assert found == INF


def test_the_reference_under_anomaly_detection():
    student = torch.tensor([[0.0, -INF, 1.0]], requires_grad=True)
    teacher = torch.tensor([[0.5, -INF, 0.0]])
    with (
        ck.backend("reference"),
        pytest.warns(UserWarning, match="Anomaly Detection"),
        torch.autograd.detect_anomaly(),
    ):
        ck.distillation_loss(student, teacher, torch.tensor([0]), alpha=0.5).backward()
    assert student.grad.isfinite().all()


@pytest.mark.skipif(not _ops.LOADED, reason="the compiled library was not built")
def test_errors_beside_eager_pytorch():
    """As `python -m benchmarks.accuracy` prints, of fewer rows: no kind is over its limit."""
    with ck.backend("cpu"):
        found = accuracy.over_widths(list(accuracy.measure(48, (10, 100, 1000))))
    over = [
        (one.term, one.kind, mode, one.ratio(mode))
        for one in found
        for mode, limit in accuracy.LIMITS.items()
        if one.ratio(mode) > limit
    ]
    assert not over
