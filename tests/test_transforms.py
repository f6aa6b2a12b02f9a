"""torch.func's transforms, forward mode, autocast: right, or a clear error."""

import cases
import pytest
import torch
from tolerances import assert_close
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacrev, jvp, vjp, vmap

import churn_kernels as ck
from churn_kernels import _ops

pytestmark = pytest.mark.skipif(not _ops.LOADED, reason="the compiled library is not built")

F32 = torch.float32


@pytest.fixture
def data():
    logits, target = cases.batch()
    return *(z.detach() for z in logits), target


def on_both(function):
    """`function()` on the kernel, and on the reference."""
    results = []
    for name in ("cpu", "reference"):
        with ck.backend(name):
            results.append(function())
    return results


def same(function):
    found, wanted = on_both(function)
    found, wanted = (x if isinstance(x, tuple) else (x,) for x in (found, wanted))
    for a, b in zip(found, wanted, strict=True):
        assert_close(a, b, "gradient", F32)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_grad(data, reduction):
    a, b, target = data

    def loss(a, b):
        return ck.codistillation_loss([a, b], target, alpha=0.2, reduction=reduction)

    same(lambda: grad(loss, argnums=(0, 1))(a, b))


def test_grad_with_terms(data):
    a, b, target = data

    def loss(a):
        return ck.codistillation_loss([a, b], target, return_terms=True)

    gradient, terms = grad(loss, has_aux=True)(a)
    with ck.backend("reference"):
        wanted, wanted_terms = grad(loss, has_aux=True)(a)
    assert_close(gradient, wanted, "gradient", F32)
    assert_close(tuple(terms), tuple(wanted_terms), "loss", F32)


def test_vjp_of_rows(data):
    a, b, target = data

    def rows(a, b):
        return ck.codistillation_loss([a, b], target, reduction="none")

    same(lambda: vjp(rows, a, b)[1](torch.arange(5.0)))


def test_jacobian(data):
    same(lambda: jacrev(lambda z: ck.softmax_entropy(z, reduction="none"))(data[0]))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_vectorized_jacobian(data, reduction):
    same(
        lambda: torch.autograd.functional.jacobian(
            lambda z: ck.symmetric_kl(z, data[1], reduction=reduction), data[0], vectorize=True
        )
    )


def test_vectorized_jacobian_of_terms(data):
    a, b, target = data

    def terms(z):
        return ck.codistillation_terms([z, b], target).cross_entropy

    same(lambda: torch.autograd.functional.jacobian(terms, a, vectorize=True))


def test_vmap(data):
    a, b, _ = data
    same(lambda: vmap(ck.symmetric_kl, in_dims=(0, None))(torch.stack([a, b, a + b]), b))


def test_per_example_gradients(data):
    a, b, target = data
    target = target.clamp(min=0)

    def loss(a, b, target):
        return ck.codistillation_loss([a[None], b[None]], target[None], alpha=0.1)

    same(lambda: vmap(grad(loss))(a, b, target))


def test_functional_call(data):
    a, _, target = data
    model = torch.nn.Linear(7, 7)
    state = dict(model.named_parameters())

    def loss(state):
        logits = functional_call(model, state, (a,))
        return ck.regularized_cross_entropy(logits, target, alpha=0.1)

    found, wanted = on_both(lambda: grad(loss)(state))
    for name, gradient in found.items():
        assert_close(gradient, wanted[name], "gradient", F32)


# torch's own forward mode still compiles its formulas with torch.jit.
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_what_the_kernel_has_no_derivative_for(data):
    a, b, _ = data

    def loss(z):
        return ck.symmetric_kl(z, b)

    remedy = r'with churn_kernels.backend\("reference"\)'
    with ck.backend("cpu"):
        pull = vjp(loss, a)[1]
        with pytest.raises(
            NotImplementedError, match=f"^forward-mode differentiation is.*{remedy}"
        ):
            jvp(loss, (a,), (b,))
        with pytest.raises(NotImplementedError, match=f"^double backward is not.*{remedy}"):
            grad(lambda z: grad(loss)(z).sum())(a)
        with (
            forward_ad.dual_level(),
            pytest.raises(NotImplementedError, match=r"^forward-mode differentiation is"),
        ):
            loss(forward_ad.make_dual(a, b))
        with pytest.raises(NotImplementedError, match=r"^forward-mode differentiation of the grad"):
            jvp(pull, (torch.tensor(1.0),), (torch.tensor(1.0),))
    with ck.backend("reference"):
        assert jvp(loss, (a,), (b,))[1].isfinite()
        assert grad(lambda z: grad(loss)(z).sum())(a).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(backend, dtype):
    generator = torch.Generator().manual_seed(0)
    x, target = torch.randn(6, 4, generator=generator), torch.tensor([0, 1, 2, 3, 4, 0])
    models = [torch.nn.Linear(4, 5), torch.nn.Linear(4, 5)]
    with torch.autocast("cpu", dtype):
        logits = [model(x) for model in models]
        assert logits[0].dtype == dtype
        loss = ck.codistillation_loss(logits, target, alpha=0.1)
    assert loss.dtype == F32
    outside = ck.codistillation_loss([z.detach() for z in logits], target, alpha=0.1)
    assert torch.equal(loss.detach(), outside)
    loss.backward()
    assert all(model.weight.grad.isfinite().all() for model in models)
