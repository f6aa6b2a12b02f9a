"""torch.compile and the ops' registrations: fakes, formula, schema."""

import subprocess
import sys
import threading

import cases
import pytest
import torch
from tolerances import assert_close
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode
from torch.func import grad, jacrev, vmap

import churn_kernels as ck
from churn_kernels import _backend, _ops
from churn_kernels._options import LossOptions

pytestmark = pytest.mark.skipif(not _ops.LOADED, reason="the compiled library is not built")

F32 = torch.float32
TARGET = cases.batch()[1]

LOSSES = {
    "codistillation_loss": lambda a, b: ck.codistillation_loss([a, b], TARGET, alpha=0.1, top_k=3),
    "rows": lambda a, b: ck.codistillation_loss([a, b], TARGET, divergence="l1", reduction="none"),
    "stacked": lambda a, b: ck.codistillation_loss(torch.stack([a, b]), TARGET, temperature=2.0),
    "return_terms": lambda a, b: ck.codistillation_loss([a, b], TARGET, return_terms=True),
    "codistillation_terms": lambda a, b: ck.codistillation_terms([a, b], TARGET),
    "regularized_cross_entropy": lambda a, b: ck.regularized_cross_entropy(
        a * b, TARGET, alpha=0.2
    ),
    "symmetric_kl": lambda a, b: ck.symmetric_kl(a, b, mode="run_to_run"),
    "softmax_entropy": lambda a, b: ck.softmax_entropy(a + b, reduction="sum"),
    "uniform_skl": lambda a, b: ck.uniform_skl(a - b),
    "distillation_loss": lambda a, b: ck.distillation_loss(a, [b, a], TARGET, alpha=0.5),
}


def total(result):
    """One number out of what a loss returned."""
    if isinstance(result, torch.Tensor):
        return result.sum()
    if isinstance(result, ck.RowTerms):
        return sum(weight * column.sum() for weight, column in enumerate(result, start=1))
    return result[0]


def gradients(function, logits):
    return torch.autograd.grad(total(function(*logits)), logits, materialize_grads=True)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("mode", ["fast", "exact"])
@pytest.mark.parametrize(
    ("kernel", "weighted", "compiler"),
    [
        ("cpu", False, "aot_eager"),
        ("cpu", True, "aot_eager"),
        ("triton", False, "aot_eager"),
        pytest.param("cpu", False, "inductor", marks=pytest.mark.slow),
    ],
)
def test_ramps_do_not_compile_anew(kernel, weighted, compiler, mode):
    """0 and one other number are two graphs; every further number is an input of the second."""
    if kernel not in ck.available_backends():
        pytest.skip(f"backend {kernel!r} is not available")
    with ck.backend(kernel):
        ramp(CompileCounterWithBackend(compiler), weighted, mode)


def ramp(compiler, weighted, mode):
    class_weight = torch.rand(cases.batch()[0][0].shape[1]) if weighted else None

    def function(a, b, beta):
        return ck.codistillation_loss(
            [a, b], TARGET, alpha=beta / 10, beta=beta, class_weight=class_weight, mode=mode
        )

    compiled = torch.compile(function, fullgraph=True, backend=compiler)
    logits, _ = cases.batch()
    for step in range(12):
        beta = step / 4
        loss, wanted = compiled(*logits, beta), function(*logits, beta)
        torch.testing.assert_close(loss, wanted)
        assert mode != "exact" or torch.equal(loss, wanted)
        for a, b in zip(
            gradients(lambda *z: compiled(*z, beta), logits),  # noqa: B023 - called at once
            gradients(lambda *z: function(*z, beta), logits),  # noqa: B023
            strict=True,
        ):
            assert_close(a, b, "gradient", F32)
            assert mode != "exact" or torch.equal(a, b)
    assert compiler.frame_count == 2


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_every_loss_compiles_in_one_graph(backend, name):
    function = LOSSES[name]
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    logits, _ = cases.batch()
    torch.testing.assert_close(compiled(*logits), function(*logits))
    for a, b in zip(gradients(compiled, logits), gradients(function, logits), strict=True):
        assert_close(a, b, "gradient", F32)


@pytest.mark.slow
def test_the_default_compiler(backend):
    function = LOSSES["return_terms"]
    compiled = torch.compile(function, fullgraph=True)
    logits, _ = cases.batch()
    torch.testing.assert_close(compiled(*logits), function(*logits))
    for a, b in zip(gradients(compiled, logits), gradients(function, logits), strict=True):
        assert_close(a, b, "gradient", F32)


def test_any_number_of_rows(backend):
    def function(a, b, target):
        return ck.codistillation_loss([a, b], target, alpha=0.1)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (2, 5, 9):
        logits, target = cases.batch(rows=rows)
        torch.testing.assert_close(compiled(*logits, target), function(*logits, target))


def test_weights_that_ramp(backend):
    @torch.compile(fullgraph=True, backend="aot_eager")
    def loss(a, b, beta):
        rows = ck.codistillation_terms([a, b])
        return beta * rows.divergence.mean()

    logits, _ = cases.batch()
    for step in range(12):  # more than the compiler would compile anew
        beta = torch.tensor(step / 10)
        wanted = ck.codistillation_loss(logits, beta=step / 10)
        torch.testing.assert_close(loss(*logits, beta), wanted)


TRANSFORMED = {
    "grad": lambda loss, by_row: lambda a, b: grad(loss, argnums=(0, 1))(a, b),
    "vmap": lambda loss, by_row: (
        lambda a, b: vmap(loss, in_dims=(0, None))(torch.stack([a, b, a + b]), b)
    ),
    "vmap of grad": lambda loss, by_row: (
        lambda a, b: vmap(grad(loss), in_dims=(0, None))(torch.stack([a, b]), b)
    ),
    "jacrev": lambda loss, by_row: lambda a, b: jacrev(by_row)(a, b),
}


@pytest.mark.parametrize("mode", ["run_to_run", "exact"])
@pytest.mark.parametrize("name", sorted(TRANSFORMED))
@pytest.mark.parametrize(
    "compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]
)
def test_transforms_compile(backend, name, mode, compiler):
    if (backend, mode) == ("reference", "exact"):
        pytest.skip("the reference has no exact mode")

    def loss(a, b):
        return ck.codistillation_loss([a, b], TARGET, alpha=0.1, mode=mode)

    def by_row(a, b):
        return ck.codistillation_loss([a, b], TARGET, alpha=0.1, mode=mode, reduction="none")

    function = TRANSFORMED[name](loss, by_row)
    logits = [z.detach() for z in cases.batch()[0]]
    compiled = torch.compile(function, fullgraph=True, backend=compiler)
    found, wanted = compiled(*logits), function(*logits)
    if isinstance(found, torch.Tensor):
        found, wanted = [found], [wanted]
    for a, b in zip(found, wanted, strict=True):
        assert_close(a, b, "gradient", F32)
        assert mode != "exact" or torch.equal(a, b)


def test_a_transform_of_what_the_kernel_cannot_derive():
    def twice(a, b):
        return grad(lambda a: grad(ck.symmetric_kl)(a, b).sum())(a)

    compiled = torch.compile(twice, fullgraph=True, backend="aot_eager")
    logits = [z.detach() for z in cases.batch()[0]]
    with ck.backend("cpu"), pytest.raises(Exception, match="double backward is not implemented"):
        compiled(*logits)


def test_a_wrong_argument_raises(backend):
    compiled = torch.compile(ck.symmetric_kl, fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match="q_logits must have the shape of p_logits"):
        compiled(torch.zeros(4, 5), torch.zeros(3, 5))


CRITERION = ck.CodistillationLoss()


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (
            lambda z, w: ck.codistillation_loss([z, z], beta=w),
            "beta must be a number, got a tensor",
        ),
        (
            lambda z, w: ck.CodistillationLoss(beta=-1)([z]),
            "beta must be >= 0, got -1.0; 0 switches",
        ),
        (lambda z, w: CRITERION([z], beta=w), "beta must be a number, got a tensor"),
        (lambda z, w: ck.softmax_entropy(z, reduction="avg"), "reduction must be one of 'none'"),
        (
            lambda z, w: ck.softmax_entropy(z, top_k=9),
            "top_k must be at most the number of classes",
        ),
        (lambda z, w: ck.symmetric_kl(z, w), "q_logits must have shape (N, C) or (..., C), got ()"),
        (lambda z, w: ck.symmetric_kl(z, z, mode="best"), "mode must be one of 'fast', "),
    ],
)
def test_errors_reach_the_user(backend, function, message):
    """The compiler says it in its explanation; without fullgraph it is raised as ever."""
    arguments = torch.zeros(4, 5), torch.ones(())
    with pytest.raises(torch._dynamo.exc.Unsupported) as caught:
        torch.compile(function, fullgraph=True, backend="eager")(*arguments)
    assert f"Explanation: User-inserted graph break. Message: {message}" in str(caught.value)
    with pytest.raises((TypeError, ValueError)) as caught:
        torch.compile(function, backend="eager")(*arguments)
    assert str(caught.value).startswith(message)


def test_a_graph_fits_the_blocks_it_is_called_in(backend):
    """It is compiled anew for another backend or mode, and found again, in every thread."""
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(
        lambda z: (ck.get_reduction_mode(), ck.softmax_entropy(z).sum()),
        fullgraph=True,
        backend=counter,
    )
    z = torch.zeros(4, 5)

    def mode():
        return compiled(z)[0]

    with ck.reduction_mode("run_to_run"):
        assert [mode(), mode()] == ["run_to_run"] * 2
        assert counter.frame_count == 1
        with ck.reduction_mode("fast"):
            assert mode() == "fast"
            assert counter.frame_count == 2
            thread = threading.Thread(target=lambda: results.append(mode()))
            results = []
            thread.start()
            thread.join()
            assert results == [ck.get_reduction_mode().replace("fast", "run_to_run")]
        count = counter.frame_count
        assert mode() == "run_to_run"
        assert counter.frame_count == count


def test_blocks_inside_of_a_graph(backend):
    def function(a, b):
        with ck.reduction_mode("run_to_run"):
            with ck.backend("reference"):
                inside = ck.symmetric_kl(a, b)
            mode = ck.get_reduction_mode()
        return inside, ck.symmetric_kl(a, b), mode, ck.get_reduction_mode()

    compiled = torch.compile(function, fullgraph=True, backend="eager")
    logits = [z.detach() for z in cases.batch()[0]]
    with ck.reduction_mode("fast"):
        got, want = compiled(*logits), function(*logits)
    assert got[2:] == want[2:] == ("run_to_run", "fast")
    torch.testing.assert_close(got[:2], want[:2])
    assert ck.get_reduction_mode() == "run_to_run"


def test_a_module_whose_weights_ramp(backend):
    """As of the function: 0 and one other number are two graphs, all others inputs."""
    criterion = ck.CodistillationLoss(class_weight=torch.rand(7))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(criterion, fullgraph=True, backend=counter)
    logits, target = cases.batch()
    for step in range(12):
        criterion.beta = step / 4
        torch.testing.assert_close(compiled(logits, target), criterion(logits, target))
    assert counter.frame_count == 2
    overridden = torch.compile(lambda z: criterion(z, beta=0.5), fullgraph=True, backend="eager")
    torch.testing.assert_close(overridden(logits), criterion(logits, beta=0.5))


def test_any_leading_dimensions(backend):
    def function(a, b, target):
        return ck.codistillation_loss([a, b], target, reduction="none")

    compiled = torch.compile(function, fullgraph=True, backend="eager", dynamic=True)
    for shape in ((2, 3, 7), (4, 5, 7), (2, 1, 3, 7)):
        logits = torch.randn(2, *shape)
        target = torch.randint(7, shape[:-1])
        torch.testing.assert_close(compiled(*logits, target), function(*logits, target))


OPTIONS = {
    "mean": LossOptions(0.9, 0.1, 1.0, 1, divergence=1),
    "rows": LossOptions(0.9, 0.1, 1.0, 2, 3, False, 3, temperature=2.0, reduction=0),
    "terms": LossOptions(1.0, 0.0, 1.0, 1, 3, True, 2, reduction=3),
    "distillation": LossOptions(0.5, 0.0, 1.0, divergence=4, teachers=2),
}


@pytest.fixture(params=["cpu", "triton"])
def ops(request):
    """Each backend's ops."""
    if request.param not in _backend._OPS:
        pytest.skip(f"backend {request.param!r} is not available")
    return _backend._OPS[request.param]


@pytest.mark.parametrize("name", sorted(OPTIONS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_op_registrations(ops, name, dtype):
    if ops.loss is not _ops.COMPILED.loss and dtype != torch.float32:
        pytest.skip("the registration does not know dtypes, and the interpreter is slow")
    options = OPTIONS[name]
    logits, target = cases.batch(models=3, dtype=dtype)
    plain = [z.detach() for z in logits]
    weight = torch.rand(7, dtype=torch.float64 if dtype == torch.float64 else F32)
    opcheck = torch.library.opcheck
    for want in (0, 1, 2, 4, 7):
        if options.reduction in (1, 2) or not want & 1:
            opcheck(ops.loss, (plain, target, weight, *options, want))
    opcheck(ops.loss, (logits, target, None, *options, 6))
    loss, stats, _, _ = ops.loss(plain, target, None, *options, 2)
    upstream = torch.ones_like(loss)
    opcheck(ops.loss_backward, (plain, target, None, stats, upstream, *options))
    weights = [torch.tensor(w, dtype=torch.float64) if w else None for w in options[:3]]
    opcheck(ops.loss_tensor_weights, (logits, target, None, *weights, *options[3:], 6))


@pytest.mark.parametrize("stacked", [False, True])
def test_fakes_promise_what_the_ops_return(ops, stacked):
    logits, target = cases.batch(models=3)
    plain = [torch.stack(logits).detach()] if stacked else [z.detach() for z in logits]
    for options in OPTIONS.values():
        if stacked and options.teachers:
            continue
        want = 7 if options.reduction == 1 else 6
        real = ops.loss(plain, target, None, *options, want)
        with FakeTensorMode() as mode:
            inputs = [mode.from_tensor(z) for z in plain]
            fake = ops.loss(inputs, mode.from_tensor(target), None, *options, want)
        for a, b in zip([*real[:3], *real[3]], [*fake[:3], *fake[3]], strict=True):
            assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())


def test_scale_changes_its_gradients_only(ops):
    gradients = [torch.ones(3, 2), torch.ones(3, 2)]
    torch.library.opcheck(ops.scale_, (gradients, torch.tensor(3.0), False))
    ops.scale_(gradients, torch.tensor(3.0), False)
    assert all((g == 3).all() for g in gradients)


def test_the_import_leaves_the_compiler_alone():
    """It would double the time of `import churn_kernels`."""
    code = "import sys, churn_kernels; sys.exit('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0

    @torch.compiler.assume_constant_result
    def marked():
        return None

    assert vars(marked) == vars(_backend._gpu_problem)
