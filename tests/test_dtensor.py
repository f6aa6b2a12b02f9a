"""DTensors: the results of whole tensors, wherever their rows and classes lie."""

from contextlib import nullcontext
from itertools import product

import pytest
import torch
import torch.distributed as dist
from processes import run

import churn_kernels as ck
from churn_kernels import _ops

pytestmark = [
    pytest.mark.skipif(not _ops.LOADED, reason="the compiled library is not built"),
    pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed"),
]

ROWS, CLASSES = 13, 11  # divide by no number of processes


def problem(rows=ROWS):
    """Logits of two models and a third, labels of which one is ignored, class weights."""
    generator = torch.Generator().manual_seed(0)
    logits = [3 * torch.randn(ROWS, CLASSES, generator=generator) for _ in range(3)]
    target = torch.randint(CLASSES, (ROWS,), generator=generator)
    target[3] = -100
    weight = torch.rand(CLASSES, generator=generator)
    return [z[:rows] for z in logits], target[:rows], weight


def losses(target, weight, mode, reduction):
    """By name: functions of two models' logits that return a loss, and terms or ()."""
    both = {"mode": mode, "reduction": reduction}
    terms = {**both, "return_terms": True}
    found = {
        "codistillation": lambda a, b: ck.codistillation_loss([a, b], target, alpha=0.2, **terms),
        "weighted": lambda a, b: ck.codistillation_loss(
            *([a, b], target),
            **{"alpha": 0.2, "top_k": 3, "label_smoothing": 0.1, "temperature": 2.0, **terms},
            class_weight=weight,
        ),
        "without a target": lambda a, b: ck.codistillation_loss(
            [a, b], alpha=0.2, regularizer="uniform_skl", divergence="l1", **terms
        ),
        "stacked": lambda a, b: ck.codistillation_loss(
            torch.stack([a, b]), target, class_weight=weight, **terms
        ),
        "distillation": lambda a, b: ck.distillation_loss(
            *(a, [b, b.detach()], target), alpha=0.5, temperature=3.0, class_weight=weight, **terms
        ),
        "regularisers": lambda a, b: (
            ck.softmax_entropy(a, **both) + ck.uniform_skl(b, **both),
            (),
        ),
        "symmetric_kl": lambda a, b: (ck.symmetric_kl(a, b, **both), ()),
    }
    if reduction == "none":
        found["terms"] = lambda a, b: (
            sum(
                weight * term.sum(1)
                for weight, term in enumerate(
                    ck.codistillation_terms([a, b], target, mode=mode), start=1
                )
            ),
            (),
        )
    return found


def evaluate(function, logits, upstream_of):
    """Loss, terms and gradients; `upstream_of(loss)` is a whole tensor, or a DTensor like it."""
    leaves = [z.clone().requires_grad_() for z in logits[:2]]
    loss, terms = function(*leaves)
    gradients = torch.autograd.grad(
        loss, leaves, upstream_of(loss), allow_unused=True, materialize_grads=True
    )
    return [loss.detach(), *terms, *gradients]


def random_upstream(loss):
    return torch.randn(loss.shape, generator=torch.Generator().manual_seed(1))


def check(found, wanted, exact):
    from torch.distributed.tensor import DTensor

    for a, b in zip(found, wanted, strict=True):
        assert isinstance(a, DTensor)
        assert not any(placement.is_partial() for placement in a.placements)
        whole = a.full_tensor()
        assert (whole.shape, whole.dtype) == (b.shape, b.dtype)
        if exact:
            assert whole.numpy().tobytes() == b.numpy().tobytes()
        else:
            torch.testing.assert_close(whole, b, equal_nan=True)


def layouts(world):
    """A mesh, and how (N, C) logits lie on it, by name."""
    from torch.distributed.tensor import Replicate, Shard, init_device_mesh

    line = init_device_mesh("cpu", (world,))
    yield line, [Shard(0)]
    yield line, [Replicate()]
    if world == 4:
        square = init_device_mesh("cpu", (2, 2))
        yield square, [Shard(0), Replicate()]
        yield square, [Shard(0), Shard(0)]


def of_losses(rank, world):
    from torch.distributed.tensor import Replicate, distribute_tensor

    logits, target, weight = problem()
    for mesh, rows in layouts(world):
        whole = [Replicate()] * mesh.ndim
        placed = [distribute_tensor(z, mesh, rows) for z in logits]
        labels, weights = (
            distribute_tensor(target, mesh, rows),
            distribute_tensor(weight, mesh, whole),
        )
        for backend, mode in (("cpu", "fast"), ("cpu", "exact"), ("reference", "fast")):
            for reduction in ("mean", "sum", "none"):
                here = rows if reduction == "none" else whole

                def upstream_of(loss, here=here):
                    return distribute_tensor(random_upstream(loss), loss.device_mesh, here)

                arguments = mode, reduction
                plain = losses(target, weight, *arguments)
                distributed = losses(labels, weights, *arguments)
                with ck.backend(backend):
                    for name, function in plain.items():
                        wanted = evaluate(function, logits, random_upstream)
                        found = evaluate(distributed[name], placed, upstream_of)
                        check(found, wanted, mode == "exact")
                        assert all(x.placements == tuple(rows) for x in found[-2:])
    return True


def of_few_rows(rank, world):
    """Fewer rows than processes, or none at all."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

    mesh = init_device_mesh("cpu", (world,))
    for rows in (2, 0):
        logits, target, weight = problem(rows)
        placed = [distribute_tensor(z, mesh, [Shard(0)]) for z in logits]
        labels = distribute_tensor(target, mesh, [Shard(0)])
        weights = distribute_tensor(weight, mesh, [Replicate()])

        def upstream_of(loss):
            return distribute_tensor(random_upstream(loss), mesh, [Replicate()])

        for mode in ("fast", "exact"):
            plain = losses(target, weight, mode, "mean")
            distributed = losses(labels, weights, mode, "mean")
            for name in ("weighted", "distillation"):
                wanted = evaluate(plain[name], logits, random_upstream)
                check(evaluate(distributed[name], placed, upstream_of), wanted, mode == "exact")
    return True


def of_batches(rank, world):
    """Logits (..., C), sharded by any of their dimensions; 3 and 5 divide by no 2."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

    mesh = init_device_mesh("cpu", (world,))
    generator = torch.Generator().manual_seed(2)
    logits = list(torch.randn(2, 3, 5, CLASSES, generator=generator))
    target = torch.randint(CLASSES, (3, 5), generator=generator)
    for dim in (0, 1, 2):
        rows = [Shard(dim)] if dim < 2 else [Replicate()]
        placed = [distribute_tensor(z, mesh, [Shard(dim)]) for z in logits]
        labels = distribute_tensor(target, mesh, rows)
        weight = distribute_tensor(torch.ones(CLASSES), mesh, [Replicate()])
        block = ck.distributed.class_parallel if dim == 2 else nullcontext
        for mode, reduction in product(("fast", "exact"), ("mean", "none")):
            here = rows if reduction == "none" else [Replicate()]

            def upstream_of(loss, here=here):
                return distribute_tensor(random_upstream(loss), mesh, here)

            for name in ("codistillation", "distillation", "symmetric_kl"):
                plain = losses(target, torch.ones(CLASSES), mode, reduction)[name]
                wanted = evaluate(plain, logits, random_upstream)
                with block():
                    distributed = losses(labels, weight, mode, reduction)[name]
                    found = evaluate(distributed, placed, upstream_of)
                check(found, wanted, mode == "exact")
        if dim == 2:
            continue
        terms = ck.codistillation_terms(placed, labels)
        check(terms, ck.codistillation_terms(logits, target), False)
        report = ck.metrics.churn_report(placed, labels)
        wanted = ck.metrics.churn_report(logits, target)
        assert report.rows == wanted.rows == 15
        torch.testing.assert_close(report.metrics(), wanted.metrics(), equal_nan=True)
        error = ck.metrics.expected_calibration_error(placed[0], labels)
        torch.testing.assert_close(error, ck.metrics.expected_calibration_error(logits[0], target))
    told = []
    whole = [distribute_tensor(z, mesh, [Replicate()]) for z in logits]
    turned = distribute_tensor(target.T.contiguous(), mesh, [Replicate()])
    for models, labels_of in ((placed, labels), (whole, turned)):
        with pytest.raises(ValueError, match="must") as caught:
            ck.codistillation_loss(models, labels_of)
        told.append(str(caught.value))
    return told


@pytest.mark.slow
def test_batches_of_any_dimensions(tmp_path):
    for classes, shape in run(of_batches, 2, tmp_path / "batches"):
        assert classes.startswith("logits[0] must hold whole rows, got sharded classes, [")
        assert "with Shard(0) or Replicate()" in classes
        assert shape.startswith("target must have shape (3, 5), one class for each row of the")


@pytest.mark.slow
def test_fewer_rows_than_processes(tmp_path):
    assert all(run(of_few_rows, 4, tmp_path / "few"))


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2, 4])
def test_losses_are_those_of_the_whole_batch(world, tmp_path):
    assert all(run(of_losses, world, tmp_path / "losses"))


def on_triton(rank, world):
    """The same on Triton's kernels, against the CPU's bits; fewer of them, for its interpreter."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

    mesh, rows = init_device_mesh("cpu", (world,)), [Shard(0)]
    logits, target, weight = problem(rows=5)
    placed = [distribute_tensor(z, mesh, rows) for z in logits]
    labels = distribute_tensor(target, mesh, rows)
    weights = distribute_tensor(weight, mesh, [Replicate()])

    def upstream_of(loss):
        return distribute_tensor(random_upstream(loss), mesh, [Replicate()])

    for name in ("weighted", "distillation"):
        wanted = evaluate(losses(target, weight, "exact", "mean")[name], logits, random_upstream)
        with ck.backend("triton"):
            found = evaluate(losses(labels, weights, "exact", "mean")[name], placed, upstream_of)
        check(found, wanted, True)
    return True


@pytest.mark.slow
@pytest.mark.skipif("triton" not in ck.available_backends(), reason="Triton was not built")
@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter alone takes CPU tensors")
def test_losses_on_triton(tmp_path):
    assert all(run(on_triton, 2, tmp_path / "triton"))


def of_other_functions(rank, world):
    """The other functions, and what does not fit; messages by name."""
    from torch.distributed.tensor import (
        DTensor,
        Partial,
        Replicate,
        Shard,
        distribute_tensor,
        init_device_mesh,
    )

    mesh = init_device_mesh("cpu", (world,))
    rows, classes, whole = [Shard(0)], [Shard(1)], [Replicate()]
    (a, b, c), target, weight = problem()
    labels = target.clamp(min=0)

    def place(x, placements):
        return distribute_tensor(x, mesh, placements)

    wanted = ck.metrics.churn_report([a, b, c], labels, top_k=3)
    for how in (rows, whole):
        runs = [place(z, how) for z in (a, b, c)]
        for given in (runs, torch.stack(runs)):
            report = ck.metrics.churn_report(given, place(labels, how), top_k=3)
            assert report.rows == ROWS
            for name, value in wanted.metrics().items():
                torch.testing.assert_close(report.metrics()[name], value, equal_nan=True)
        error = ck.metrics.expected_calibration_error(runs[0], place(labels, how))
        torch.testing.assert_close(error, ck.metrics.expected_calibration_error(a, labels))
        check(
            [ck.metrics.prediction_confidence(runs[0])], [ck.metrics.prediction_confidence(a)], True
        )
    for how in (rows, classes, whole):
        x = place(a, how).requires_grad_()
        total = ck.exact_sum(x)
        (gradient,) = torch.autograd.grad(2 * total, x)
        check([total.detach(), gradient], [ck.exact_sum(a), torch.full_like(a, 2.0)], True)
        assert ck.ExactSum().add(x) == ck.ExactSum().add(a)

    A, B, X, Y, W = (
        place(a, rows),
        place(b, rows),
        place(a, classes),
        place(target, rows),
        place(weight, whole),
    )
    replicated = ck.codistillation_loss([A, B], place(target, whole), mode="exact")
    check([replicated], [ck.codistillation_loss([a, b], target, mode="exact")], True)
    compiled = torch.compile(ck.symmetric_kl, backend="eager")(A, B, mode="exact")
    check([compiled], [ck.symmetric_kl(a, b, mode="exact")], True)
    wrong, broken = labels.clone(), a.clone()
    wrong[0], broken[0] = CLASSES, torch.nan
    wrong, broken = place(wrong, rows), place(broken, rows)
    stacked = place(torch.stack([a, b]), rows)
    partial = DTensor.from_local(a, mesh, [Partial()])
    report = ck.metrics.churn_report
    calls = {
        "logits": lambda: ck.codistillation_loss([A, b], Y),
        "first logits": lambda: ck.codistillation_loss([a, B], Y),
        "target": lambda: ck.codistillation_loss([A, B], target),
        "target alone": lambda: ck.codistillation_loss([a, b], Y),
        "class_weight": lambda: ck.codistillation_loss([A, B], Y, class_weight=weight),
        "class_weight alone": lambda: (
            ck.softmax_entropy(a) + ck.regularized_cross_entropy(a, target, class_weight=W)
        ),
        "q_logits": lambda: ck.symmetric_kl(A, b),
        "teacher": lambda: ck.distillation_loss(A, b, Y, alpha=0.5),
        "runs": lambda: report([A, b]),
        "labels": lambda: report([A, B], labels),
        "summand": lambda: ck.distributed.exact_sum(A),
        "models": lambda: ck.distillation_loss(A, stacked, Y, alpha=0.5),
        "models of a loss": lambda: ck.codistillation_loss(stacked),
        "sharded runs": lambda: report(stacked),
        "classes": lambda: ck.softmax_entropy(X),
        "classes of runs": lambda: report([X, X]),
        "confidence": lambda: ck.metrics.prediction_confidence(X),
        "partial": lambda: ck.softmax_entropy(partial),
        "partial sum": lambda: ck.exact_sum(partial),
        "placements": lambda: ck.symmetric_kl(A, place(a, whole)),
        "range": lambda: ck.codistillation_loss([A, B], wrong),
        "exact range": lambda: ck.codistillation_loss([A, B], wrong, mode="exact"),
        "report range": lambda: report([A, B], wrong),
        "report rows": lambda: report([broken, B]),
    }
    told = {}
    for name, call in calls.items():
        try:
            call()
        except Exception as error:  # the type is part of what is checked
            told[name] = f"{type(error).__name__}: {error}"
    return told


LOCAL = "to_local()"
REFUSED = (
    "ValueError: every rank of the mesh must accept its rows, but another rank rejected its own"
)
TOLD = {
    "logits": "TypeError: logits[1] must be a DTensor like logits[0], got a Tensor; pass "
    "torch.distributed.tensor.distribute_tensor(logits[1], mesh, placements), or .to_local()",
    "first logits": "TypeError: logits[0] must be a DTensor like logits[1]",
    "target": "TypeError: target must be a DTensor like logits[0]",
    "target alone": "TypeError: logits[0] must be a DTensor like target or class_weight",
    "class_weight": "TypeError: class_weight must be a DTensor like logits[0]",
    "class_weight alone": "TypeError: logits must be a DTensor like target or class_weight",
    "q_logits": "TypeError: q_logits must be a DTensor like p_logits",
    "teacher": "TypeError: teacher_logits must be a DTensor like student_logits",
    "runs": "TypeError: runs[1] must be a DTensor like runs[0]",
    "labels": "TypeError: target must be a DTensor like runs[0]",
    "summand": "TypeError: x must be a Tensor, this process's part of the sum, got a DTensor",
    "models": "ValueError: teacher_logits must have every model on every rank, got [Shard(",
    "models of a loss": "ValueError: logits must be sharded by rows or replicated, got [Shard(",
    "sharded runs": "ValueError: runs must have every model on every rank, got [Shard(",
    "classes": "ValueError: logits must hold whole rows, got sharded classes, [Shard(dim=1)] on",
    "classes of runs": "ValueError: runs[0] must hold whole rows, got sharded classes, [",
    "confidence": "ValueError: logits must hold whole rows, got [Shard(dim=1)] on",
    "partial": "ValueError: logits must be sharded by rows or replicated, got [Partial(sum)] on",
    "partial sum": "ValueError: x must be sharded or replicated, got a DTensor with Partial",
    "placements": "ValueError: q_logits must have the mesh and placements of p_logits, [Shard(",
}
FIRST_ROW = {
    "range": "TargetError: target must hold class indices in [0, 11), got 11 at row 0",
    "exact range": "TargetError: target must hold class indices in [0, 11), got 11 at row 0",
    "report range": "TargetError: target must hold class indices in [0, 11), got 11 at row 0",
    "report rows": "ValueError: runs[0] must have probabilities in every row, got NaN",
}


@pytest.mark.slow
def test_other_functions_and_what_does_not_fit(tmp_path):
    for rank, told in enumerate(run(of_other_functions, 2, tmp_path / "others")):
        assert told.keys() == TOLD.keys() | FIRST_ROW.keys()
        for name, message in TOLD.items():
            assert told[name].startswith(message), name
            assert LOCAL in told[name], name
        for name, message in FIRST_ROW.items():
            assert told[name].startswith(message if rank == 0 else REFUSED), name


def of_classes(rank, world):
    """Logits sharded by classes, in class_parallel; with four processes by rows, too."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

    logits, target, weight = problem()
    if world == 4:
        mesh, group = init_device_mesh("cpu", (2, 2)), 1
        placements, rows = [Shard(0), Shard(1)], [Shard(0), Replicate()]
    else:
        mesh, group = init_device_mesh("cpu", (world,)), 0
        placements, rows = [Shard(1)], [Replicate()]
    whole = [Replicate()] * mesh.ndim
    placed = [distribute_tensor(z, mesh, placements) for z in logits]
    labels, weights = distribute_tensor(target, mesh, rows), distribute_tensor(weight, mesh, whole)
    for reduction in ("mean", "none"):
        here = rows if reduction == "none" else whole

        def upstream_of(loss, here=here):
            return distribute_tensor(random_upstream(loss), loss.device_mesh, here)

        for name, function in losses(target, weight, "exact", reduction).items():
            wanted = evaluate(function, logits, random_upstream)
            with ck.distributed.class_parallel(mesh.get_group(group)):
                distributed = losses(labels, weights, None, reduction)[name]
                found = evaluate(distributed, placed, upstream_of)
            check(found, wanted, True)
    told = []
    few = distribute_tensor(logits[0][:, :1].contiguous(), mesh, placements)
    by_rows = distribute_tensor(logits[0], mesh, [Shard(0)] * mesh.ndim)
    with ck.distributed.class_parallel():
        for x in (by_rows, *([few] if world == 2 else placed[:1])):
            with pytest.raises(ValueError, match=r"to_local\(\)") as caught:
                ck.softmax_entropy(x)
            told.append(str(caught.value))
    return told


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_classes(world, tmp_path):
    group = f"over the ranks of class_parallel, {list(range(world))}, got "
    for by_rows, other in run(of_classes, world, tmp_path / "classes"):
        assert by_rows.startswith("logits must be sharded by classes " + group)
        if world == 2:
            few = "logits must have at least one class on every rank of class_parallel, got 1 "
            assert other.startswith(few)
        else:
            assert other.startswith("logits must be sharded by classes " + group)
