"""Gradients of the kernel for any upstream, as often as asked, without touching an input."""

import gc
import warnings
from concurrent.futures import ThreadPoolExecutor

import cases
import parity
import pytest
import torch
from tolerances import assert_close, gradient_error_bound
from torch.utils.checkpoint import checkpoint

import churn_kernels as ck
from churn_kernels import _autograd, _backend, _ops

pytestmark = pytest.mark.skipif(not _ops.LOADED, reason="the compiled library is not built")

F32 = torch.float32


@pytest.fixture(autouse=True)
def kernel():
    with ck.backend("cpu"):
        yield


def expected(function, logits):
    """Gradients of `function(logits)` on the reference, in float64."""
    with ck.backend("reference"):
        wide = [z.detach().double().requires_grad_() for z in logits]
        return torch.autograd.grad(function(wide), wide)


def matches(function, logits, dtype=F32, largest=1.0):
    """The kernel's gradients of `function(logits)` are the reference's; `largest` upstream."""
    found = torch.autograd.grad(function(logits), logits)
    for gradient, wanted in zip(found, expected(function, logits), strict=True):
        assert gradient.dtype == dtype
        parity.assert_close(gradient, wanted, gradient_error_bound(wanted, dtype, logits, largest))
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", sorted(cases.OPTIONS))
def test_scalar_upstream(name, dtype):
    logits, target = cases.batch(dtype=dtype)
    options = cases.options(name, dtype)
    matches(lambda z: 0.5 * ck.codistillation_loss(z, target, **options), logits, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", sorted(cases.OPTIONS))
def test_per_row_upstream(name, dtype):
    logits, target = cases.batch(dtype=dtype)
    options = cases.options(name, dtype)
    weight = torch.tensor([0.5, 3.0, 0.0, -1.0, 2.0])

    def loss(z):
        return (weight * ck.codistillation_loss(z, target, reduction="none", **options)).sum()

    matches(loss, logits, dtype, largest=3.0)


@pytest.mark.parametrize("divergence", ["skl", "l1", "ce"])
@pytest.mark.parametrize("top_k", [None, 3])
def test_per_term_upstream(divergence, top_k):
    logits, target = cases.batch(models=3)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(5, 3, generator=generator) for _ in range(3)]
    options = {"divergence": divergence, "top_k": top_k, "temperature": 2.0}

    def loss(z):
        rows = ck.codistillation_terms(z, target, **options)
        return sum((weight * term).sum() for weight, term in zip(weights, rows, strict=True))

    matches(loss, logits)


def test_one_term_alone_leaves_the_others_out():
    logits, target = cases.batch(models=3)
    rows = ck.codistillation_terms(logits, target)
    gradients = torch.autograd.grad(rows.divergence[:, 1].sum(), logits)  # the pair (0, 2)
    assert (gradients[1] == 0).all()
    assert gradients[0].abs().sum() > 0


def test_an_expanded_upstream():
    logits, target = cases.batch()
    rows = ck.codistillation_loss(logits, target, reduction="none")
    found = torch.autograd.grad(rows, logits, torch.ones(()).expand(5))
    total = ck.codistillation_loss(logits, target, reduction="sum")
    for a, b in zip(found, torch.autograd.grad(total, logits), strict=True):
        assert_close(a, b, "gradient", F32)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_every_backward_pass_is_the_same(reduction):
    logits, target = cases.batch()
    loss = ck.codistillation_loss(logits, target, alpha=0.2, reduction=reduction).sum()
    first = torch.autograd.grad(loss, logits, retain_graph=True)
    kept = [g.clone() for g in first]
    for g in first:
        g.zero_()  # what was handed out belongs to the caller
    second = torch.autograd.grad(loss, logits, torch.tensor(2.0), retain_graph=True)
    third = torch.autograd.grad(loss, logits)
    for a, b, c in zip(kept, second, third, strict=True):
        assert_close(b, 2 * a, "gradient", F32)
        assert_close(c, a, "gradient", F32)


@pytest.mark.parametrize("mode", ["fast", "run_to_run", "invariant", "exact"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_backward_pass_of_a_graph_has_the_same_bits(mode, reduction, dtype):
    logits, target = cases.batch(rows=64, classes=100, dtype=dtype)
    loss = ck.codistillation_loss(logits, target, alpha=0.2, reduction=reduction, mode=mode)
    upstream = torch.full_like(loss, 3.0)
    (want, _) = torch.autograd.grad(loss, logits, upstream, retain_graph=True)
    for options in ({"retain_graph": True}, {"create_graph": True}, {}):
        (found, _) = torch.autograd.grad(loss, logits, upstream, **options)
        assert torch.equal(found, want), options


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("mode", ["fast", "exact"])
def test_a_batch_of_upstreams(backend, reduction, mode):
    """is_grads_batched=True: the bits of one backward pass for each."""
    if (backend, mode) == ("reference", "exact"):
        mode = "run_to_run"
    logits, target = cases.batch(models=3)
    loss = ck.codistillation_loss(logits, target, alpha=0.2, reduction=reduction, mode=mode)
    upstreams = torch.randn(3, *loss.shape, generator=torch.Generator().manual_seed(1))
    found = torch.autograd.grad(loss, logits, upstreams, is_grads_batched=True, retain_graph=True)
    for i, upstream in enumerate(upstreams):
        one = torch.autograd.grad(loss, logits, upstream, retain_graph=True)
        for a, b in zip(found, one, strict=True):
            if backend == "reference":
                assert_close(a[i], b, "gradient", F32)
            else:
                assert torch.equal(a[i], b)


def test_accumulation():
    logits, target = cases.batch()
    loss = ck.codistillation_loss(logits, target)
    loss.backward(retain_graph=True)
    once = [z.grad.clone() for z in logits]
    loss.backward()
    for z, g in zip(logits, once, strict=True):
        assert_close(z.grad, 2 * g, "gradient", F32)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_create_graph_is_fine_until_it_is_used(reduction):
    logits, target = cases.batch()
    loss = 3 * ck.codistillation_loss(logits, target, reduction=reduction).sum()
    graph = torch.autograd.grad(loss, logits, create_graph=True)
    plain = torch.autograd.grad(loss, logits)
    for a, b in zip(graph, plain, strict=True):
        assert_close(a.detach(), b, "gradient", F32)
    message = (
        "double backward is not implemented by the kernel; compute the loss inside "
        '`with churn_kernels.backend("reference")`, which supports all derivatives, or detach what '
        "needs no gradient"
    )
    with pytest.raises(NotImplementedError) as caught:
        graph[0].sum().backward()
    assert str(caught.value) == message


def test_the_remedy_of_double_backward():
    logits, target = cases.batch()
    with ck.backend("reference"):
        loss = ck.codistillation_loss(logits, target)
    (gradient,) = torch.autograd.grad(loss, logits[:1], create_graph=True)
    gradient.square().sum().backward()
    assert logits[0].grad.isfinite().all()


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("wanting", [0, 1])
def test_only_what_wants_a_gradient_gets_one(reduction, wanting):
    logits, target = cases.batch()
    logits[1 - wanting].requires_grad_(False)
    ck.codistillation_loss(logits, target, reduction=reduction).sum().backward()
    assert logits[1 - wanting].grad is None
    (full, _) = cases.batch()
    loss = ck.codistillation_loss(full, target, reduction=reduction).sum()
    assert_close(logits[wanting].grad, torch.autograd.grad(loss, full)[wanting], "gradient", F32)


def test_detaching_one_holds_it_fixed():
    (a, b), _ = cases.batch()
    ck.symmetric_kl(a, b.detach()).backward()
    assert a.grad is not None
    assert b.grad is None


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_teachers_get_no_gradient(reduction):
    (student, *teachers), target = cases.batch(models=3)
    options = {"alpha": 0.5, "temperature": 2.0, "reduction": reduction}
    ck.distillation_loss(student, teachers, target, **options).sum().backward()
    assert all(teacher.grad is None for teacher in teachers)
    with ck.backend("reference"):
        loss = ck.distillation_loss(student, teachers, target, **options).sum()
    assert_close(student.grad, torch.autograd.grad(loss, student)[0], "gradient", F32)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_one_tensor_of_models(reduction):
    logits, target = cases.batch(models=3)
    stacked = torch.stack([z.detach() for z in logits]).requires_grad_()
    ck.codistillation_loss(stacked, target, alpha=0.2, reduction=reduction).sum().backward()
    loss = ck.codistillation_loss(logits, target, alpha=0.2, reduction=reduction).sum()
    assert_close(stacked.grad, torch.stack(torch.autograd.grad(loss, logits)), "gradient", F32)


def test_the_same_tensor_twice():
    (z,), target = cases.batch(models=1)
    loss = ck.codistillation_loss([z, z], target)
    twice = 2 * ck.regularized_cross_entropy(z, target)
    (found,) = torch.autograd.grad(loss, z)
    assert_close(found, torch.autograd.grad(twice, z)[0], "gradient", F32)


def test_inputs_are_never_modified():
    logits, target = cases.batch(dtype=torch.bfloat16)
    weight = torch.rand(7)
    inputs = [*logits, target, weight]
    copies = [x.detach().clone() for x in inputs]
    for reduction in ("mean", "none"):
        ck.codistillation_loss(
            logits, target, class_weight=weight, reduction=reduction
        ).sum().backward()
    for tensor, copy in zip(inputs, copies, strict=True):
        assert torch.equal(tensor, copy)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("changed", ["logits", "target"])
def test_a_change_in_place_is_noticed(reduction, changed):
    logits, target = cases.batch()
    hidden = [z * 1.0 for z in logits]
    loss = ck.codistillation_loss(hidden, target, reduction=reduction).sum()
    (hidden[1] if changed == "logits" else target).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_strided_logits():
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(10, 5, 2, generator=generator).requires_grad_()
    target = torch.tensor([0, 1, 2, 3, 4])

    def loss(z):
        return ck.codistillation_loss([z[::2, :, 0], z[1::2, :, 1]], target, alpha=0.1)

    (found,) = torch.autograd.grad(loss(wide), wide)
    with ck.backend("reference"):
        assert_close(found, torch.autograd.grad(loss(wide), wide)[0], "gradient", F32)


def test_float16_survives_a_loss_scaler():
    # A probability of 1/1000 over 4096 rows is 2.4e-7, where float16 has two bits left.
    z = torch.zeros(4096, 1000, dtype=torch.float16, requires_grad=True)
    target = torch.zeros(4096, dtype=torch.long)
    scale = 2.0**16
    (scale * ck.regularized_cross_entropy(z, target)).backward()
    wanted = torch.full((4096, 999), scale / 4096 / 1000, dtype=torch.float16)
    assert_close(z.grad[:, 1:], wanted, "gradient", torch.float16)


def bytes_alive(smallest):
    """What tensors of that many elements and more hold."""
    gc.collect()
    with warnings.catch_warnings():  # of what it touches among all objects
        warnings.simplefilter("ignore")
        tensors = [x for x in gc.get_objects() if isinstance(x, torch.Tensor)]
        storages = [x.untyped_storage() for x in tensors if x.numel() >= smallest]
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("inference", [False, True])
def test_a_checkpointed_head_keeps_nothing(reentrant, reduction, inference):
    rows, classes = 1024, 4000
    features = torch.randn(rows, 8, requires_grad=True)
    heads = [torch.randn(8, classes, requires_grad=True) for _ in range(2)]
    target = torch.randint(classes, (rows,))

    def head(features):
        logits = [features @ weight for weight in heads]
        if inference:
            with torch.inference_mode():
                logits[1] = features @ heads[1]
        loss = ck.codistillation_loss(logits, target, alpha=0.2, reduction=reduction)
        return loss.sum()

    before = bytes_alive(rows * classes)
    loss = checkpoint(head, features, use_reentrant=reentrant)
    assert bytes_alive(rows * classes) == before
    loss.backward()
    found = [heads[0].grad, features.grad]
    want = torch.autograd.grad(head(features), [heads[0], features])
    assert all(map(torch.equal, found, want))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_saved_tensor_hooks_see_all_that_is_kept(reduction):
    logits, target = cases.batch(rows=64, classes=100)
    packed = []

    def pack(x):
        packed.append(x.shape)
        return x.clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, torch.clone):
        loss = ck.codistillation_loss(logits, target, reduction=reduction).sum()
    assert packed.count((64, 100)) == (4 if reduction == "mean" else 2)
    plain = ck.codistillation_loss(logits, target, reduction=reduction).sum()
    want = torch.autograd.grad(plain, logits)
    for options in ({"retain_graph": True}, {}):
        found = torch.autograd.grad(loss, logits, **options)
        assert all(map(torch.equal, found, want))


def test_save_on_cpu():
    logits, target = cases.batch()
    with torch.autograd.graph.save_on_cpu():
        loss = ck.codistillation_loss(logits, target)
    found = torch.autograd.grad(loss, logits)
    want = torch.autograd.grad(ck.codistillation_loss(logits, target), logits)
    assert all(map(torch.equal, found, want))


def test_threads_share_a_graph_that_is_kept():
    logits, target = cases.batch(rows=256, classes=64)
    loss = ck.codistillation_loss(logits, target)
    want = torch.autograd.grad(loss, logits, torch.tensor(3.0), retain_graph=True)

    def one(_):
        return torch.autograd.grad(loss, logits, torch.tensor(3.0), retain_graph=True)

    with ThreadPoolExecutor(8) as pool:
        for found in pool.map(one, range(32)):
            assert all(map(torch.equal, found, want))


class TestPaths:
    """Which function computes a call: the fused one exactly where it can."""

    def name(self, loss):
        return loss.grad_fn.name()

    def test_one_scalar(self):
        logits, target = cases.batch()
        for reduction in ("mean", "sum"):
            loss = ck.codistillation_loss(logits, target, reduction=reduction)
            assert self.name(loss) == f"{_autograd._FusedLoss.__name__}Backward"

    def test_rows_and_float16(self):
        logits, target = cases.batch()
        loss = ck.codistillation_loss(logits, target, reduction="none")
        assert self.name(loss) == f"{_autograd._Loss.__name__}Backward"
        halves = [z.half() for z in logits]
        loss = ck.codistillation_loss(halves, target)
        assert self.name(loss) == f"{_autograd._Loss.__name__}Backward"

    def test_no_gradient_no_graph(self, monkeypatch):
        logits, target = cases.batch()
        wanted = []
        ops = _backend._OPS["cpu"]
        watched = ops._replace(loss=lambda *args: wanted.append(args[-1]) or ops.loss(*args))
        monkeypatch.setitem(_backend._OPS, "cpu", watched)
        with torch.no_grad():
            assert not ck.codistillation_loss(logits, target).requires_grad
        ck.codistillation_loss([z.detach() for z in logits], target, return_terms=True)
        ck.codistillation_loss(logits, target)
        ck.codistillation_loss(logits, target, reduction="none")
        assert wanted == [0, 4, 1, 2]

    def test_gradients_are_handed_out_without_a_copy(self):
        logits, target = cases.batch()
        loss = ck.codistillation_loss(logits, target)
        computed = [g.data_ptr() for g in loss.grad_fn.saved_tensors[-2:]]
        loss.backward()
        assert [z.grad.data_ptr() for z in logits] == computed

    def test_a_graph_that_is_kept_hands_out_copies(self):
        logits, target = cases.batch()
        loss = ck.codistillation_loss(logits, target)
        saved = loss.grad_fn.saved_tensors[-2:]
        before = [g.clone() for g in saved]
        for g in torch.autograd.grad(loss, logits, torch.tensor(3.0), retain_graph=True):
            g.zero_()
        assert all(map(torch.equal, saved, before))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_an_undefined_upstream_gradient_gives_none(reduction):
    class Stop(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, upstream):
            return None

    z = torch.randn(3, 4, requires_grad=True)
    loss = ck.softmax_entropy(z, reduction=reduction)
    (Stop.apply(loss).sum() + 0 * z.sum()).backward()
    assert torch.count_nonzero(z.grad) == 0
