"""Teachers, partners, targets and weights made under torch.inference_mode()."""

import cases
import pytest
import torch
from torch.func import grad, vmap

import churn_kernels as ck
from churn_kernels import _inference, _ops

pytestmark = pytest.mark.skipif(not _ops.LOADED, reason="the compiled library is not built")

LOSSES = {
    "partner": lambda s, t, y, w, **o: ck.codistillation_loss([s, t], y, class_weight=w, **o),
    "teachers": lambda s, t, y, w, **o: ck.distillation_loss(
        s, [t, t.flip(0)], y, alpha=0.5, class_weight=w, **o
    ),
    "stacked": lambda s, t, y, w, **o: ck.distillation_loss(
        s, torch.stack([t, t.flip(0)]), y, alpha=0.5, class_weight=w, **o
    ),
    "symmetric_kl": lambda s, t, y, w, **o: ck.symmetric_kl(s, t, **o),
    "target": lambda s, t, y, w, **o: ck.regularized_cross_entropy(s, y, class_weight=w, **o),
    "terms": lambda s, t, y, w, mode, reduction: sum(
        weight * term.sum()
        for weight, term in enumerate(
            ck.codistillation_terms([s, t], y, class_weight=w, mode=mode), start=1
        )
    ),
}


def batch(dtype=torch.float32):
    (student, teacher), target = cases.batch(dtype=dtype)
    weight = torch.rand(student.shape[1], dtype=dtype)
    return student, teacher.detach(), target, weight


def in_inference_mode(*tensors):
    with torch.inference_mode():
        return [x.clone() for x in tensors]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", sorted(LOSSES))
def test_gradients_are_those_of_normal_tensors(backend, name, reduction, dtype):
    student, *others = batch(dtype)
    for mode in ["fast"] if backend == "reference" or dtype == torch.float64 else ["fast", "exact"]:

        def gradient(*inputs, mode=mode):
            loss = LOSSES[name](student, *inputs, mode=mode, reduction=reduction)
            return torch.autograd.grad(loss.sum(), student)[0]

        assert torch.equal(gradient(*in_inference_mode(*others)), gradient(*others))


def test_nothing_is_copied():
    student, *others = batch()
    teacher, target, _ = in_inference_mode(*others)
    for reduction in ("mean", "none"):
        loss = ck.distillation_loss(student, teacher, target, alpha=0.5, reduction=reduction)
        saved = {x.data_ptr() for x in loss.grad_fn.saved_tensors if x is not None}
        assert {teacher.data_ptr(), target.data_ptr()} < saved


def test_views():
    (x,) = in_inference_mode(torch.randn(5, 4))
    for view in (x, x.t(), x[1:, ::2], x[0], x[:0]):
        (alias,) = _inference.saveable(view)
        assert not alias.is_inference()
        assert (alias.shape, alias.stride()) == (view.shape, view.stride())
        assert torch.equal(alias, view)
        assert alias.data_ptr() == view.data_ptr()
    normal = torch.randn(3)
    assert _inference.saveable(normal, None)[0] is normal


def test_saved_tensor_hooks_see_them():
    student, *others = batch()
    teacher, target, _ = in_inference_mode(*others)
    seen = []
    hooks = torch.autograd.graph.saved_tensors_hooks(
        lambda x: seen.append(x.data_ptr()) or x, lambda x: x
    )
    with hooks:
        ck.distillation_loss(student, teacher, target, alpha=0.5, reduction="none")
    assert teacher.data_ptr() in seen


def test_transforms(backend):
    student, *others = batch()
    student, others = student.detach(), [others[0], others[1].clamp(min=0), others[2]]

    def gradient(teacher, target, weight):
        return grad(lambda z: ck.codistillation_loss([z, teacher], target, class_weight=weight))(
            student
        )

    def by_example(teacher, target, weight):
        def loss(z, t, y):
            return ck.codistillation_loss([z[None], t[None]], y[None], class_weight=weight)

        return vmap(grad(loss))(student, teacher, target)

    for function in (gradient, by_example):
        assert torch.equal(function(*in_inference_mode(*others)), function(*others))


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", ["teachers", "stacked", "terms"])
@pytest.mark.parametrize(
    "compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]
)
def test_compiled(backend, name, reduction, compiler):
    """One graph each for normal tensors, and for those that are copied."""
    torch.compiler.reset()
    student, *others = batch()

    @torch.compile(fullgraph=True, backend=compiler)
    def compiled(*inputs):
        return LOSSES[name](*inputs, mode=None, reduction=reduction)

    for inputs in (in_inference_mode(*others), others, in_inference_mode(*others)):
        loss = LOSSES[name](student, *others, mode=None, reduction=reduction)
        want = torch.autograd.grad(loss.sum(), student)
        found = torch.autograd.grad(compiled(student, *inputs).sum(), student)
        torch.testing.assert_close(found, want)


def test_compiled_with_the_teacher(backend):
    torch.compiler.reset()
    student, x, target, _ = batch()

    def loss(student, x):
        with torch.inference_mode():
            teacher = (2 * x).relu()
        return ck.distillation_loss(student, teacher, target, alpha=0.5)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    want = torch.autograd.grad(loss(student, x), student)
    for one in (x, *in_inference_mode(x)):
        found = torch.autograd.grad(compiled(student, one), student)
        torch.testing.assert_close(found, want)


def test_a_graph_of_normal_tensors_copies_none():
    torch.compiler.reset()
    student, teacher, target, _ = batch()
    called = []

    def look(graph, inputs):
        called.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    compiled = torch.compile(ck.distillation_loss, fullgraph=True, backend=look)
    compiled(student, teacher, target, alpha=0.5)
    assert any("churn_kernels.loss" in name for name in called)
    assert not any("churn_kernels.copy" in name for name in called)


def test_a_running_sum():
    """What was added in inference mode does not keep others from being added."""
    x = torch.randn(100)
    total = ck.ExactSum()
    with torch.inference_mode():
        total.add(x)
    assert total.add(x) == ck.ExactSum().add(x).add(x)
