"""The modules are their functions."""

import cases
import pytest
import torch

import churn_kernels as ck

(A, B), TARGET = cases.batch()


@pytest.mark.parametrize(
    ("module", "function", "inputs"),
    [
        (ck.CodistillationLoss, ck.codistillation_loss, ([A, B], TARGET)),
        (ck.RegularizedCrossEntropy, ck.regularized_cross_entropy, (A, TARGET)),
    ],
)
def test_losses_with_class_weights(backend, module, function, inputs):
    weight = torch.linspace(0.5, 2, 7)
    options = {"alpha": 0.2, "top_k": 3, "reduction": "none"}
    loss = module(class_weight=weight, **options)
    assert torch.equal(loss(*inputs), function(*inputs, class_weight=weight, **options))
    assert not torch.equal(loss(*inputs), module(**options)(*inputs))


def test_distillation(backend):
    loss = ck.DistillationLoss(alpha=0.5, temperature=3.0)
    assert loss(A, B, TARGET) == ck.distillation_loss(A, B, TARGET, alpha=0.5, temperature=3.0)


def test_divergences_and_regularizers(backend):
    assert ck.SymmetricKL(reduction="sum")(A, B) == ck.symmetric_kl(A, B, reduction="sum")
    assert ck.SoftmaxEntropy(top_k=2)(A) == ck.softmax_entropy(A, top_k=2)
    assert ck.UniformSKL(top_k=2)(A) == ck.uniform_skl(A, top_k=2)


def test_return_terms(backend):
    loss, terms = ck.CodistillationLoss(return_terms=True)([A, B])
    assert loss.isfinite()
    assert isinstance(terms, ck.LossTerms)


def test_class_weights_move_and_are_saved_with_the_module():
    loss = ck.CodistillationLoss(class_weight=torch.ones(7), beta=0.5)
    assert loss.double().class_weight.dtype == torch.float64
    assert list(loss.state_dict()) == ["class_weight"]
    assert list(ck.CodistillationLoss().state_dict()) == []


def test_repr_names_the_options():
    assert repr(ck.CodistillationLoss(beta=0.5, divergence="l1")) == (
        "CodistillationLoss(beta=0.5, divergence='l1')"
    )
    assert repr(ck.SoftmaxEntropy()) == "SoftmaxEntropy()"


def test_wrong_options():
    with pytest.raises(TypeError, match="unexpected keyword argument 'gamma'"):
        ck.CodistillationLoss(gamma=1.0)([A, B])
    with pytest.raises(TypeError, match="alpha"):
        ck.DistillationLoss()(A, B, TARGET)
