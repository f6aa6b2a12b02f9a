"""Logits (..., C) with targets (...): every loss takes them, as it takes rows (N, C)."""

import cases
import pytest
import torch

import churn_kernels as ck
from churn_kernels import _backend

SHAPES = [(2, 3), (3, 1, 2), (0, 3), (1, 1)]


@pytest.mark.parametrize("batch", SHAPES)
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_logits_of_any_leading_dimensions(backend, batch, layout):
    """The rows' losses in the target's shape, with the bits of the rows in one dimension."""
    logits = [torch.randn(*batch, 5) for _ in range(2)]
    if layout == "transposed":  # such rows lie at no one distance
        logits = [z.transpose(0, 1).contiguous().transpose(0, 1) for z in logits]
    logits = [z.requires_grad_() for z in logits]
    flat = [z.detach().reshape(-1, 5).requires_grad_() for z in logits]
    a, b = logits
    p, q = flat
    target = torch.randint(5, batch)
    rows = target.flatten()
    calls = [
        lambda z, t, **o: ck.codistillation_loss(z, t, alpha=0.1, **o),
        lambda z, t, **o: ck.codistillation_loss(z, **o),
        lambda z, t, **o: ck.regularized_cross_entropy(z[0], t, alpha=0.1, **o),
        lambda z, t, **o: ck.symmetric_kl(*z, **o),
        lambda z, t, **o: ck.softmax_entropy(z[0], top_k=2, **o),
        lambda z, t, **o: ck.uniform_skl(z[0], **o),
        lambda z, t, **o: ck.distillation_loss(z[0], z[1], t, alpha=0.5, **o),
        lambda z, t, **o: ck.distillation_loss(z[0], [z[1], z[0]], t, alpha=0.5, **o),
        lambda z, t, **o: ck.distillation_loss(z[0], torch.stack(z), t, alpha=0.5, **o),
        lambda z, t, **o: ck.CodistillationLoss(**o)(z, t),
    ]
    for call in calls:
        got, want = call([a, b], target, reduction="none"), call([p, q], rows, reduction="none")
        assert got.shape == batch
        assert torch.equal(got.flatten(), want)
        for reduction in ("mean", "sum"):
            got, want = (
                call(z, t, reduction=reduction) for z, t in (([a, b], target), ([p, q], rows))
            )
            torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
            gradients = torch.autograd.grad(got, [a, b], materialize_grads=True)
            wanted = torch.autograd.grad(want, [p, q], materialize_grads=True)
            for gradient, of_rows, z in zip(gradients, wanted, logits, strict=True):
                assert gradient.shape == z.shape
                assert torch.equal(gradient.reshape(-1, 5), of_rows)
    terms = ck.codistillation_terms([a, b], target, top_k=2)
    for got, want in zip(terms, ck.codistillation_terms([p, q], rows, top_k=2), strict=True):
        assert got.shape == (*batch, want.shape[1])
        assert torch.equal(got.flatten(0, -2), want)


def test_leading_dimensions_are_not_copied(backend, monkeypatch):
    """Views of the logits come to the backend, where strides allow any."""
    a, b = torch.randn(2, 3, 10)[..., :5], torch.randn(2, 3, 5)
    seen = []
    evaluate = _backend.evaluate
    monkeypatch.setattr(
        _backend, "evaluate", lambda logits, *rest: seen.extend(logits) or evaluate(logits, *rest)
    )
    ck.codistillation_loss([a, b])
    assert [z.data_ptr() for z in seen] == [a.data_ptr(), b.data_ptr()]
    assert [z.shape for z in seen] == [(6, 5)] * 2


def test_leading_dimensions_ignore_rows_and_report_terms(backend):
    logits, target = cases.batch(rows=6)
    grid = [z.detach().view(2, 3, 7) for z in logits]
    options = {"alpha": 0.1, "class_weight": torch.rand(7), "return_terms": True}
    got = ck.codistillation_loss(grid, target.view(2, 3), **options)
    want = ck.codistillation_loss([z.detach() for z in logits], target, **options)
    assert got[0] == want[0]
    for a, b in zip(got[1], want[1], strict=True):
        assert torch.equal(a, b)
