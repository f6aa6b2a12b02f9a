"""The modules are their functions, and their options attributes."""

import copy
import inspect
import pickle

import cases
import numpy as np
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
    assert list(loss.state_dict()) == ["class_weight", "_extra_state"]
    assert list(ck.CodistillationLoss().state_dict()) == ["_extra_state"]


def test_repr_names_the_options():
    loss = ck.CodistillationLoss(beta=0.5, divergence="l1")
    assert repr(loss) == "CodistillationLoss(beta=0.5, divergence='l1')"
    loss.beta, loss.class_weight = 2, torch.ones(7)
    assert repr(loss) == ("CodistillationLoss(beta=2.0, divergence='l1', class_weight=<7 weights>)")
    assert repr(ck.SoftmaxEntropy()) == "SoftmaxEntropy()"
    assert repr(ck.DistillationLoss(alpha=0.5)) == "DistillationLoss(alpha=0.5)"


CLASSES = {
    ck.CodistillationLoss: ck.codistillation_loss,
    ck.RegularizedCrossEntropy: ck.regularized_cross_entropy,
    ck.SymmetricKL: ck.symmetric_kl,
    ck.SoftmaxEntropy: ck.softmax_entropy,
    ck.UniformSKL: ck.uniform_skl,
    ck.DistillationLoss: ck.distillation_loss,
}
REQUIRED = {ck.DistillationLoss: {"alpha": 0.5}}
VALUES = {
    "alpha": (0.25, -1, ValueError),
    "beta": (0.25, "a lot", TypeError),
    "regularizer": ("uniform_skl", "max", ValueError),
    "top_k": (3, 0, ValueError),
    "renormalize_top_k": (False, 1, TypeError),
    "divergence": ("l1", "kl", ValueError),
    "label_smoothing": (0.1, 1.5, ValueError),
    "class_weight": (torch.ones(7), [1.0] * 7, TypeError),
    "ignore_index": (-1, None, TypeError),
    "temperature": (2.0, 0.0, ValueError),
    "reduction": ("sum", "avg", ValueError),
    "mode": ("run_to_run", "best", ValueError),
    "return_terms": (True, "yes", TypeError),
}


@pytest.mark.parametrize("temperature", [1e-200, 1e300])
def test_a_temperature_that_cannot_be_squared(temperature):
    message = (
        r"^temperature squared must be finite and > 0, got .*; 1 leaves the logits as they are"
    )
    with pytest.raises(ValueError, match=message):
        ck.DistillationLoss(alpha=0.5, temperature=temperature)
    loss = ck.DistillationLoss(alpha=0.5)
    with pytest.raises(ValueError, match=message):
        loss.temperature = temperature
    with pytest.raises(ValueError, match=message):
        ck.distillation_loss(A, B, TARGET, alpha=0.5, temperature=temperature)


@pytest.mark.parametrize("module", CLASSES)
def test_every_option_is_an_attribute(module):
    """As the function's signature has them: set, read, checked, shown, saved, copied, pickled."""
    keywords = [
        option
        for option in inspect.signature(CLASSES[module]).parameters.values()
        if option.kind is option.KEYWORD_ONLY
    ]
    assert list(inspect.signature(module).parameters.values()) == keywords
    required = REQUIRED.get(module, {})
    for name in (option.name for option in keywords):
        value, wrong, error = VALUES[name]
        with pytest.raises(error, match=f"^{name} must be"):
            module(**{**required, name: wrong})
        loss = module(**{**required, name: value})
        assert getattr(loss, name) is value
        loss = module(**required)
        before = getattr(loss, name)
        with pytest.raises(error, match=f"^{name} must be"):
            setattr(loss, name, wrong)
        assert getattr(loss, name) is before
        setattr(loss, name, value)
        assert f"{name}=" in repr(loss)
        restored = module(**required)
        if name == "class_weight":
            restored.class_weight = torch.zeros(7)
        restored.load_state_dict(loss.state_dict())
        shallow = copy.copy(loss)
        for same in (restored, copy.deepcopy(loss), pickle.loads(pickle.dumps(loss)), shallow):
            assert type(same) is module
            held = getattr(same, name)
            assert torch.equal(held, value) if name == "class_weight" else held == value
        if name != "class_weight":
            setattr(loss, name, before)
            assert getattr(shallow, name) == value


def test_a_weight_can_ramp(backend):
    loss = ck.CodistillationLoss()
    for beta in (0, 0.5, 2):
        loss.beta = beta
        assert loss([A, B], TARGET) == ck.codistillation_loss([A, B], TARGET, beta=beta)


@pytest.mark.parametrize(
    ("loss", "inputs", "overrides"),
    [
        (ck.CodistillationLoss(class_weight=torch.rand(7)), ([A, B], TARGET), {"beta": 0.5}),
        (ck.CodistillationLoss(), ([A, B], TARGET), {"class_weight": torch.rand(7)}),
        (ck.RegularizedCrossEntropy(alpha=0.5), (A, TARGET), {"alpha": 0.1, "top_k": 2}),
        (ck.SymmetricKL(), (A, B), {"reduction": "none"}),
        (ck.SoftmaxEntropy(), (A,), {"top_k": 2}),
        (ck.UniformSKL(), (A,), {"top_k": 2}),
        (ck.DistillationLoss(alpha=0.5), (A, B, TARGET), {"alpha": 1.0, "temperature": 2.0}),
    ],
)
def test_a_call_overrides_options(backend, loss, inputs, overrides):
    own = {"class_weight": loss.class_weight} if hasattr(loss, "class_weight") else {}
    if isinstance(loss, ck.DistillationLoss):
        own["alpha"] = 0.5
    if isinstance(loss, ck.RegularizedCrossEntropy):
        own["alpha"] = 0.5
    state = repr(loss)
    wanted = CLASSES[type(loss)](*inputs, **{**own, **overrides})
    assert torch.equal(loss(*inputs, **overrides), wanted)
    assert not torch.equal(loss(*inputs), wanted)
    assert repr(loss) == state


def test_wrong_options():
    message = (
        "^CodistillationLoss got an unexpected keyword argument 'bta'; its options are alpha, beta,"
    )
    with pytest.raises(TypeError, match=message):
        ck.CodistillationLoss(bta=1.0)
    with pytest.raises(TypeError, match=message):
        ck.CodistillationLoss()([A, B], bta=1.0)
    with pytest.raises(
        TypeError, match=r"^SymmetricKL got an unexpected keyword .* 'class_weight'"
    ):
        ck.SymmetricKL(class_weight=torch.ones(7))
    with pytest.raises(ValueError, match=r"^beta must be >= 0, got -2\.0; 0 switches the term off"):
        ck.CodistillationLoss()([A, B], beta=-2.0)
    message = r"^DistillationLoss\(\) requires alpha, got none; pass alpha=\.\.\., as in "
    with pytest.raises(TypeError, match=message):
        ck.DistillationLoss()
    with pytest.raises(TypeError, match=r"^beta must be a number, got a tensor; pass"):
        ck.CodistillationLoss().beta = torch.nn.Parameter(torch.ones(()))
    with pytest.raises(ValueError, match=r"^class_weight must not require a gradient, "):
        ck.CodistillationLoss().class_weight = torch.nn.Parameter(torch.ones(7))


class TestState:
    """A ramped weight goes on where it was saved."""

    def test_resumes_inside_of_a_model_from_a_file(self, tmp_path):
        model = torch.nn.ModuleDict({"net": torch.nn.Linear(2, 2), "loss": ck.CodistillationLoss()})
        model["loss"].beta = np.float32(0.75)
        torch.save(model.state_dict(), tmp_path / "state.pt")
        other = copy.deepcopy(model)
        other["loss"].beta, other["loss"].top_k = 0, 3
        other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        assert other["loss"].state_dict() == model["loss"].state_dict()
        assert (other["loss"].beta, other["loss"].top_k) == (0.75, None)

    @pytest.mark.parametrize("strict", [True, False])
    def test_of_before_it_held_options_leaves_them(self, strict):
        model = torch.nn.Sequential(ck.CodistillationLoss(class_weight=torch.ones(7), beta=2))
        old = {"0.class_weight": torch.zeros(7)}
        assert str(model.load_state_dict(old, strict=strict)) == "<All keys matched successfully>"
        assert list(old) == ["0.class_weight"]
        assert model[0].beta == 2
        assert model[0].class_weight.sum() == 0

    def test_that_does_not_fit_changes_nothing(self):
        loss = ck.CodistillationLoss()
        with pytest.raises(ValueError, match=r"^beta must be >= 0, got -1"):
            loss.load_state_dict({"_extra_state": {"alpha": 0.5, "beta": -1.0}})
        with pytest.raises(TypeError, match=r"^CodistillationLoss got an unexpected .* 'gamma'"):
            loss.load_state_dict({"_extra_state": {"alpha": 0.5, "gamma": 1.0}})
        message = "^the state of CodistillationLoss must be a dict of its options, got list; load"
        with pytest.raises(TypeError, match=message):
            loss.load_state_dict({"_extra_state": [0.5]})
        assert loss.alpha == 0


def test_a_class_of_ones_own(backend):
    class Ramped(ck.CodistillationLoss):
        def __init__(self, steps, **options):
            super().__init__(**options)
            self.steps = steps

        def step(self):
            self.beta += 1 / self.steps

    loss = Ramped(4, beta=0, divergence="l1")
    assert list(inspect.signature(Ramped).parameters) == ["steps", "options"]
    loss.step()
    assert loss([A, B]) == ck.codistillation_loss([A, B], beta=0.25, divergence="l1")
