"""The specification against closed forms, PyTorch's own functions and finite differences."""

import math

import cases
import pytest
import torch
import torch.nn.functional as F
from tolerances import assert_close

import churn_kernels as ck

F64 = torch.float64


@pytest.fixture(autouse=True)
def reference():
    with ck.backend("reference"):
        yield


def close(actual, expected):
    assert_close(actual, torch.as_tensor(expected, dtype=F64), "formula", F64)


def gradients(loss, logits):
    return torch.autograd.grad(loss, logits)


class TestClosedForms:
    def test_equal_logits(self):
        z = torch.zeros(3, 8, dtype=F64)
        target = torch.tensor([0, 3, 7])
        close(ck.softmax_entropy(z), math.log(8))
        close(ck.uniform_skl(z), 0.0)
        close(ck.symmetric_kl(z, z), 0.0)
        close(ck.regularized_cross_entropy(z, target), math.log(8))
        # (1 - alpha) CE + alpha H of each of the two models, and no divergence
        close(ck.codistillation_loss([z, z], target, alpha=0.25), 2 * math.log(8))

    def test_two_classes(self):
        p, q = 0.9, 0.3  # probability of the first class
        a = torch.tensor([[math.log(p), math.log(1 - p)]], dtype=F64)
        b = torch.tensor([[math.log(q), math.log(1 - q)]], dtype=F64)
        logit = lambda x: math.log(x / (1 - x))  # noqa: E731
        close(ck.symmetric_kl(a, b), (p - q) * (logit(p) - logit(q)))
        close(ck.softmax_entropy(a), -p * math.log(p) - (1 - p) * math.log(1 - p))
        close(ck.uniform_skl(a), (p - 0.5) * logit(p))
        l1 = ck.codistillation_terms([a, b], divergence="l1").divergence
        close(l1, [[2 * abs(p - q)]])

    def test_one_class(self):
        z = torch.tensor([[3.0], [-2.0]], dtype=F64)
        close(ck.codistillation_loss([z, z + 1], alpha=0.5), 0.0)
        close(ck.uniform_skl(z), 0.0)

    def test_shift_of_the_logits_changes_nothing(self):
        (a, b), target = cases.batch(dtype=F64)
        near = ck.codistillation_loss([a, b], target, alpha=0.3)
        far = ck.codistillation_loss([a + 1e4, b - 1e4], target, alpha=0.3)
        torch.testing.assert_close(far, near, rtol=0, atol=1e-10)


class TestAgainstTorch:
    @pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
    @pytest.mark.parametrize("label_smoothing", [0.0, 0.2, 1.0])
    @pytest.mark.parametrize("weighted", [False, True])
    @pytest.mark.parametrize("ignore_index", [-100, 3])
    def test_cross_entropy(self, reduction, label_smoothing, weighted, ignore_index):
        (z,), target = cases.batch(rows=9, models=1, dtype=F64, ignore=False)
        target[4] = ignore_index
        options = {
            "reduction": reduction,
            "label_smoothing": label_smoothing,
            "ignore_index": ignore_index,
        }
        weight = torch.linspace(0.5, 2, 7, dtype=F64) if weighted else None
        ours = ck.regularized_cross_entropy(z, target, class_weight=weight, **options)
        theirs = F.cross_entropy(z, target, weight=weight, **options)
        close(ours, theirs)
        close(gradients(ours.sum(), z)[0], gradients(theirs.sum(), z)[0])

    def test_symmetric_kl(self):
        (a, b), _ = cases.batch(dtype=F64)
        log_p, log_q = a.log_softmax(1), b.log_softmax(1)
        kl = F.kl_div(log_q, log_p, reduction="none", log_target=True)
        lk = F.kl_div(log_p, log_q, reduction="none", log_target=True)
        close(ck.symmetric_kl(a, b, reduction="none"), (kl + lk).sum(1))

    def test_entropy(self):
        (z,), _ = cases.batch(models=1, dtype=F64)
        entropy = torch.distributions.Categorical(logits=z).entropy()
        close(ck.softmax_entropy(z, reduction="none"), entropy)

    @pytest.mark.parametrize("teachers", [1, 3])
    def test_distillation(self, teachers):
        (s, *t), target = cases.batch(models=1 + teachers, dtype=F64, ignore=False)
        loss = ck.distillation_loss(s, t, target, alpha=0.3, temperature=4.0)
        mean = torch.stack([x.div(4).softmax(1) for x in t]).mean(0)
        kl = F.kl_div((s / 4).log_softmax(1), mean, reduction="batchmean")
        close(loss, 0.7 * F.cross_entropy(s, target) + 0.3 * 16 * kl)
        close(loss, ck.distillation_loss(s, torch.stack(t), target, alpha=0.3, temperature=4.0))


class TestGradients:
    def test_identities(self):
        (a, b), _ = cases.batch(dtype=F64)
        p, q = a.softmax(1), b.softmax(1)
        d = a - b
        in_p, in_q = (p * d).sum(1, keepdim=True), (q * d).sum(1, keepdim=True)
        da, db = gradients(ck.symmetric_kl(a, b, reduction="sum"), (a, b))
        close(da, p * (d - in_p) + (p - q))
        close(db, -q * (d - in_q) - (p - q))
        h = ck.softmax_entropy(a, reduction="none")
        close(gradients(h.sum(), a)[0], -p * (p.log() + h[:, None]))
        (du,) = gradients(ck.uniform_skl(a, reduction="sum"), a)
        mean = (p * a).sum(1, keepdim=True)
        close(du, p * (a - mean) + p - 1 / a.shape[1])

    def test_ce_holds_the_other_model_fixed(self):
        (a, b), _ = cases.batch(dtype=F64)
        loss = ck.codistillation_loss([a, b], divergence="ce", temperature=2.0, reduction="sum")
        p, q = (a / 2).softmax(1), (b / 2).softmax(1)
        da, db = gradients(loss, (a, b))
        close(da, (p - q) / 2)
        close(db, (q - p) / 2)
        close(loss, ck.codistillation_loss([a, b], temperature=2.0, reduction="sum"))

    @pytest.mark.parametrize(
        "name", [n for n, o in cases.OPTIONS.items() if o.get("divergence") != "ce"]
    )
    def test_finite_differences(self, name):
        logits, target = cases.batch(rows=3, dtype=F64)
        options = cases.options(name, F64)

        def loss(*logits):
            return ck.codistillation_loss(logits, target, **options)

        assert torch.autograd.gradcheck(loss, logits, fast_mode=True)
        assert torch.autograd.gradgradcheck(loss, logits, fast_mode=True)

    def test_finite_differences_of_row_terms(self):
        logits, target = cases.batch(rows=3, models=3, dtype=F64)

        def terms(*logits):
            return tuple(ck.codistillation_terms(logits, target, top_k=3, temperature=2.0))

        assert torch.autograd.gradcheck(terms, logits, fast_mode=True)

    def test_finite_differences_of_distillation(self):
        (student, *teachers), target = cases.batch(rows=3, models=3, dtype=F64)

        def loss(z):
            return ck.distillation_loss(z, teachers, target, alpha=0.5, temperature=3.0)

        assert torch.autograd.gradcheck(loss, student, fast_mode=True)
        assert torch.autograd.gradgradcheck(loss, student, fast_mode=True)
        loss(student).backward()
        assert all(teacher.grad is None for teacher in teachers)


class TestTopK:
    z = torch.tensor([[1.0, 3.0, 2.0, 3.0, -1.0]], dtype=F64)

    def test_all_classes_is_no_top_k(self):
        for f in (ck.softmax_entropy, ck.uniform_skl):
            close(f(self.z, top_k=5), f(self.z))
            close(f(self.z, top_k=5, renormalize_top_k=False), f(self.z))

    def test_one_class_has_no_entropy(self):
        close(ck.softmax_entropy(self.z, top_k=1), 0.0)
        close(ck.uniform_skl(self.z, top_k=1), 0.0)

    def test_renormalised_is_the_loss_of_those_classes(self):
        chosen = self.z[:, [1, 3, 2]]
        close(ck.softmax_entropy(self.z, top_k=3), ck.softmax_entropy(chosen))
        close(ck.uniform_skl(self.z, top_k=3), ck.uniform_skl(chosen))

    def test_raw_is_a_part_of_the_whole_sum(self):
        p = self.z.softmax(1)[0, [1, 3, 2]]
        raw = {"top_k": 3, "renormalize_top_k": False}
        close(ck.softmax_entropy(self.z, **raw), -(p * p.log()).sum())
        close(ck.uniform_skl(self.z, **raw), ((p - 1 / 5) * (p.log() + math.log(5))).sum())

    @pytest.mark.parametrize("renormalize", [False, True])
    def test_a_tie_goes_to_the_lowest_index(self, renormalize):
        z = torch.tensor([[0.0, 2.0, 2.0, 2.0, 1.0]], dtype=F64, requires_grad=True)
        entropy = ck.softmax_entropy(z, top_k=2, renormalize_top_k=renormalize)
        (gradient,) = gradients(entropy, z)
        if renormalize:  # two equal classes: nothing moves them, and the third gets nothing either
            close(gradient, torch.zeros(1, 5))
        else:
            assert gradient[0, 1] == gradient[0, 2]
            assert gradient[0, 1] != gradient[0, 3]


class TestTerms:
    def test_values(self):
        logits, target = cases.batch(rows=6, models=3, dtype=F64)
        options = {"alpha": 0.2, "beta": 0.5, "top_k": 2}
        loss, terms = ck.codistillation_loss(logits, target, return_terms=True, **options)
        keep = target != cases.IGNORED
        z = [x.detach()[keep] for x in logits]
        p = torch.stack([x.softmax(1) for x in z])
        top = p.sort(2, descending=True).values
        hits = torch.stack([x.argmax(1) for x in z])
        close(terms.cross_entropy, [F.cross_entropy(x, target[keep]) for x in z])
        close(terms.regularizer, [ck.softmax_entropy(x, top_k=2) for x in z])
        pairs = [(0, 1), (0, 2), (1, 2)]
        close(terms.divergence, [ck.symmetric_kl(z[i], z[j]) for i, j in pairs])
        close(terms.accuracy, (hits == target[keep]).to(F64).mean(1))
        close(terms.confidence, (top[:, :, 0] - top[:, :, 1]).mean(1))
        close(terms.entropy, -(p * p.log()).sum(2).mean(1))
        close(terms.agreement, ((hits[0] == hits[1]) & (hits[0] == hits[2])).to(F64).mean())
        parts = 0.8 * terms.cross_entropy.sum() + 0.2 * terms.regularizer.sum()
        close(loss, parts + 0.5 * terms.divergence.mean())
        assert not any(term.requires_grad for term in terms)

    def test_row_terms_add_up_to_the_loss(self):
        logits, target = cases.batch(models=3, dtype=F64)
        rows = ck.codistillation_terms(logits, target, divergence="l1")
        loss = ck.codistillation_loss(
            logits, target, alpha=0.2, divergence="l1", beta=0.5, reduction="none"
        )
        parts = 0.8 * rows.cross_entropy.sum(1) + 0.2 * rows.regularizer.sum(1)
        close(parts + 0.5 * rows.divergence.mean(1), loss)
        assert all((column[1] == 0).all() for column in rows)  # the ignored row

    def test_without_a_target(self):
        logits, _ = cases.batch()
        _, terms = ck.codistillation_loss(logits, return_terms=True)
        assert terms.cross_entropy.isnan().all()
        assert terms.accuracy.isnan().all()
        assert (ck.codistillation_terms(logits).cross_entropy == 0).all()

    def test_of_one_model(self):
        (z,), target = cases.batch(models=1)
        _, terms = ck.regularized_cross_entropy(z, target, return_terms=True)
        assert terms.divergence.shape == (0,)
        assert terms.agreement == 1


class TestEdges:
    """What has no finite value, and what must not spread."""

    inf = float("inf")

    @pytest.mark.parametrize("name", sorted(cases.OPTIONS))
    def test_a_class_at_minus_infinity_everywhere_is_no_class(self, name):
        logits, target = cases.batch(classes=7, dtype=F64, ignore=False)
        target = target.clamp(max=5)
        options = cases.options(name, F64)
        options.pop("label_smoothing", None)  # which wants a probability of every class
        masked = [torch.cat([z[:, :6], torch.full_like(z[:, 6:], -self.inf)], 1) for z in logits]
        narrow = [z[:, :6] for z in logits]
        narrow_options = dict(options)
        if "class_weight" in options:
            narrow_options["class_weight"] = options["class_weight"][:6]
        ours = ck.codistillation_loss(masked, target, **options)
        theirs = ck.codistillation_loss(narrow, target, **narrow_options)
        close(ours, theirs)
        for a, b in zip(gradients(ours, logits), gradients(theirs, logits), strict=True):
            close(a, b)

    @pytest.mark.parametrize("labels", [[0, 1], [0, 0]])
    @pytest.mark.parametrize("reduction", ["none", "mean"])
    def test_a_label_of_weight_0_hides_no_nan(self, labels, reduction):
        """As in PyTorch, whose mean over weights of 0 is NaN, too."""
        found, theirs = (
            torch.tensor([[1.0, math.nan], [0.5, 2.0]], dtype=F64, requires_grad=True)
            for _ in range(2)
        )
        weight = torch.tensor([0.0, 1.0], dtype=F64)
        options = {"class_weight": weight, "reduction": reduction}
        ours = ck.regularized_cross_entropy(found, torch.tensor(labels), **options)
        wanted = F.cross_entropy(theirs, torch.tensor(labels), weight=weight, reduction=reduction)
        close(ours, wanted)
        ours.sum().backward()
        wanted.sum().backward()
        close(found.grad, theirs.grad)

    def test_a_class_of_one_model_only_is_infinitely_far(self):
        (a, b), _ = cases.batch(rows=2, dtype=F64)
        mask = torch.zeros_like(a)
        mask[0, 3] = -self.inf
        a_masked = a + mask

        def divergence(kind):
            return ck.codistillation_loss([a_masked, b], divergence=kind, reduction="none")

        for kind in ("skl", "ce"):
            assert divergence(kind)[0] == self.inf
            assert divergence(kind)[1].isfinite()
        da, db = gradients(divergence("skl").sum(), (a, b))
        assert da[0].isnan().all()
        assert db[0].isnan().all()
        assert da[1].isfinite().all()
        da, _ = gradients(divergence("ce").sum(), (a, b))
        close(da, a_masked.softmax(1) - b.softmax(1))
        p, q = a_masked.softmax(1), b.softmax(1)
        close(divergence("l1"), (p - q).abs().sum(1))

    def test_a_term_of_weight_zero_is_left_out(self):
        a = torch.tensor([[0.0, -self.inf]], dtype=F64)
        b = torch.tensor([[-self.inf, 0.0]], dtype=F64)
        assert ck.codistillation_loss([a, b], torch.tensor([0]), beta=0.0)[()] == self.inf
        close(ck.codistillation_loss([a, b], beta=0.0, alpha=0.5), 0.0)

    def test_full_smoothing_has_no_target_left(self):
        z = torch.tensor([[-self.inf, 0.3, 1.0]], dtype=F64)
        for target in (torch.tensor([0]), torch.tensor([1])):
            assert ck.regularized_cross_entropy(z, target, label_smoothing=1.0) == self.inf

    @pytest.mark.parametrize("poison", [float("nan"), -float("inf"), float("inf")])
    @pytest.mark.parametrize("name", sorted(cases.OPTIONS))
    def test_a_broken_row_stays_alone(self, name, poison):
        logits, target = cases.batch(rows=4, dtype=F64)
        options = cases.options(name, F64)
        with torch.no_grad():
            if poison == -self.inf:
                logits[0][2] = poison
            else:
                logits[0][2, 1] = poison
        loss = ck.codistillation_loss(logits, target, reduction="none", **options)
        found = gradients(loss[torch.tensor([0, 1, 3])].sum() + loss[2], logits)
        assert loss[2].isnan()
        assert found[0][2].isnan().all()
        others = torch.tensor([0, 1, 3])
        clean, _ = cases.batch(rows=4, dtype=F64)
        want = ck.codistillation_loss(clean, target, reduction="none", **options)
        close(loss[others], want[others])
        for a, b in zip(found, gradients(want.sum(), clean), strict=True):
            close(a[others], b[others])

    def test_a_broken_row_that_is_ignored_is_not_there(self):
        logits, target = cases.batch(dtype=F64)
        with torch.no_grad():
            logits[0][1] = float("nan")
        loss, terms = ck.codistillation_loss(logits, target, alpha=0.2, return_terms=True)
        assert loss.isfinite()
        assert all(term.isfinite().all() for term in terms)
        for gradient in gradients(loss, logits):
            assert (gradient[1] == 0).all()
            assert gradient.isfinite().all()

    @pytest.mark.parametrize("rows", [0, 3])
    def test_no_row_left(self, rows):
        logits, _ = cases.batch(rows=rows, dtype=F64)
        target = torch.full((rows,), cases.IGNORED)
        mean, terms = ck.codistillation_loss(logits, target, return_terms=True)
        assert mean.isnan()
        assert all(term.isnan().all() for term in terms)
        assert all((g == 0).all() for g in gradients(mean, logits))
        close(ck.codistillation_loss(logits, target, reduction="sum"), 0.0)
        assert ck.codistillation_loss(logits, target, reduction="none").shape == (rows,)

    def test_results_are_float32_unless_the_logits_are_float64(self):
        for dtype in (torch.float16, torch.bfloat16, torch.float32, F64):
            logits, target = cases.batch(dtype=dtype)
            loss, terms = ck.codistillation_loss(logits, target, return_terms=True)
            wanted = F64 if dtype == F64 else torch.float32
            assert loss.dtype == wanted
            assert {term.dtype for term in terms} == {wanted}
            assert {g.dtype for g in gradients(loss, logits)} == {dtype}

    def test_one_tensor_is_its_models(self):
        logits, target = cases.batch(models=3, dtype=F64)
        stacked = torch.stack(logits)
        loss = ck.codistillation_loss(stacked, target, alpha=0.2)
        expected = ck.codistillation_loss(logits, target, alpha=0.2)
        close(loss, expected)
        close(gradients(loss, stacked)[0], torch.stack(gradients(expected, logits)))
