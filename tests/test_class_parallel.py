"""Rows whose classes lie in several shards: the bits of whole rows, however they are split."""

import copy
import itertools
import random
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import reduce

import pytest
import torch
import torch.distributed as dist
from parity import (
    EXACT,
    EXACT_DTYPES,
    EXACT_KINDS,
    PLAIN,
    bytes_of,
    kernel,
    random_logits,
    random_target,
    seeded,
    special_logits,
)
from processes import run
from torch.utils.checkpoint import checkpoint

import churn_kernels as ck
from churn_kernels import _autograd, _blocks, _class_shards, _ops
from churn_kernels._options import LossOptions

pytestmark = pytest.mark.skipif(not _ops.LOADED, reason="the compiled library is not built")

ROWS, CLASSES = 4, 41
CUTS = ([], [5, 20], [1, 2, 3, 40], [37])


class Meeting:
    """An exchange between threads of one process; `together(merge, tables)` merges tables."""

    def __init__(self, holders, together=reduce):
        self.brought = [None] * holders
        self.barrier = threading.Barrier(holders)
        self.together = together
        self.tables = []

    def at(self, place):
        seat = copy.copy(self)
        seat.place = place
        return seat

    def gather(self, x):
        self.brought[self.place] = x
        self.barrier.wait()
        everyone = list(self.brought)
        self.barrier.wait()
        return everyone

    def merge(self, table, merge):
        merged = self.together(merge, self.gather(table))
        if self.place == 0:
            self.tables.append(merged)
        return merged


def split(z, cuts):
    return [part.detach().clone() for part in z.tensor_split(cuts, 1)]


def in_shards(logits, target, weight, options, cuts, upstream, together=reduce):
    """Loss, terms and gradients of whole rows, by one thread a shard; and the merged tables."""
    shards = [
        [z.requires_grad_() for z in shard]
        for shard in zip(*(split(z, cuts) for z in logits), strict=True)
    ]
    meeting = Meeting(len(shards), together)

    def one(place):
        mine = shards[place]
        ops = _class_shards.ShardOps(meeting.at(place))
        loss, terms = _autograd.evaluate_by_rows(ops, mine, target, weight, options, True)
        students = mine[: len(mine) - options.teachers]
        return loss.detach(), terms, torch.autograd.grad(loss, students, upstream)

    with ThreadPoolExecutor(len(shards)) as pool:
        losses, terms, gradients = zip(*pool.map(one, range(len(shards))), strict=True)
    assert len({bytes_of(loss) for loss in losses}) == 1
    assert len({bytes_of(one) for one in terms}) == 1
    whole = [torch.cat(parts, 1) for parts in zip(*gradients, strict=True)]
    return (losses[0], terms[0], *whole), meeting.tables


def assert_no_split_shows(logits, target, weight, options, cuts=CUTS):
    students = len(logits) - options.teachers
    pairs = 1 if options.teachers else students * (students - 1) // 2
    shape = {0: (len(target),), 3: (len(target), 2 * students + pairs)}.get(options.reduction, ())
    upstream = torch.randn(shape, generator=seeded("upstream"))
    loss, terms, gradients = kernel(logits, target, weight, options, upstream)
    want = [bytes_of(x) for x in (loss, terms, *gradients)]
    for ends in cuts:
        got, _ = in_shards(logits, target, weight, options, ends, upstream)
        assert [bytes_of(x) for x in got] == want, ends


@pytest.mark.parametrize("models", [1, 2, 3])
@pytest.mark.parametrize("name", EXACT)
def test_no_split_of_the_classes_shows(name, models):
    for kind in (None, *EXACT_KINDS):
        generator = seeded(name, models, kind)
        dtype = EXACT_DTYPES[models - 1] if kind is None else torch.float32
        logits = random_logits(generator, models, ROWS, CLASSES, dtype)
        if kind is not None:
            logits = special_logits(kind, generator, models, dtype)
        target = random_target(generator, ROWS, CLASSES)
        target[1] = EXACT[name].ignore_index if EXACT[name].ignore_index >= 0 else target[1]
        weight = torch.rand(CLASSES, generator=generator) if models == 2 else None
        assert_no_split_shows(logits, target, weight, EXACT[name])


@pytest.mark.parametrize("teachers", [1, 2])
@pytest.mark.parametrize("kind", EXACT_KINDS)
def test_distillation(teachers, kind):
    generator = seeded("distillation", teachers, kind)
    options = PLAIN._replace(
        divergence=4, teachers=teachers, regularizer=0, temperature=3.0, mode=3
    )
    logits = special_logits(kind, generator, 1 + teachers, torch.float32)
    assert_no_split_shows(logits, random_target(generator, ROWS, CLASSES), None, options)


@pytest.mark.parametrize("name", ["plain", "top_k", "l1_divergence"])
def test_many_classes(name):
    """Where whole rows take other sweeps, and threads share a row."""
    generator = seeded("many classes", name)
    logits = random_logits(generator, 2, 2, 8142)
    target = random_target(generator, 2, 8142)
    assert_no_split_shows(logits, target, None, EXACT[name], ([4071], [1, 2049, 8000]))


def test_a_shard_of_fewer_classes_than_k():
    """All of them are among the k largest."""
    generator = seeded("narrow")
    logits = random_logits(generator, 2, ROWS, CLASSES)
    for z in logits:
        z[:, :2] += 50.0
    target = random_target(generator, ROWS, CLASSES)
    assert_no_split_shows(logits, target, None, EXACT["top_k"], ([2], [1, 2]))


def test_a_target_in_each_shard_in_turn():
    logits = random_logits(seeded("turns"), 2, CLASSES, CLASSES)
    assert_no_split_shows(logits, torch.arange(CLASSES), None, EXACT["per_row"], ([1, 17, 40],))


@pytest.mark.parametrize("name", ["plain", "top_k", "l1_divergence"])
def test_tables_merge_in_any_order_and_grouping(name):
    generator = seeded("grouping", name)
    # Few values: the largest logit, and the k-th, stand in several shards.
    logits = [z.mul(2).round() for z in random_logits(generator, 2, ROWS, CLASSES)]
    target = random_target(generator, ROWS, CLASSES)
    cuts = [3, 9, 10, 30, 33]
    seeds = itertools.count()
    arguments = (logits, target, None, EXACT[name], cuts, torch.tensor(1.0))

    def anyhow(merge, tables):
        draw = random.Random(next(seeds))  # each thread and stage in an order of its own
        tables = list(tables)
        while len(tables) > 1:
            a, b = (tables.pop(draw.randrange(len(tables))) for _ in range(2))
            tables.append(merge(a, b))
        return tables[0]

    want = [[bytes_of(x) for x in found] for found in in_shards(*arguments)]
    for _ in range(5):
        got = in_shards(*arguments, together=anyhow)
        assert [[bytes_of(x) for x in found] for found in got] == want


def test_sums_in_floating_point_are_caught():
    """The negative control: the usual way to split a log-sum-exp, merged in the same ways."""
    z = random_logits(seeded("control"), 1, ROWS, CLASSES)[0]

    def log_sum_exp(cuts):
        parts = split(z, cuts)
        largest = reduce(torch.maximum, [part.amax(1) for part in parts])
        return largest + sum((part - largest[:, None]).exp().sum(1) for part in parts).log()

    assert len({bytes_of(log_sum_exp([cut])) for cut in range(1, CLASSES)}) > 1


def test_differentiating_twice_raises():
    logits = random_logits(seeded("twice"), 2, ROWS, CLASSES)
    leaves = [z.requires_grad_() for z in logits]
    ops = _class_shards.ShardOps(Meeting(1).at(0))
    loss, _ = _autograd.evaluate_by_rows(ops, leaves, None, None, EXACT["plain"], False)
    (gradient,) = torch.autograd.grad(loss, leaves[:1], create_graph=True)
    with pytest.raises(NotImplementedError, match="double backward is not implemented"):
        gradient.sum().backward()


def test_transforms_of_torch_func():
    logits = random_logits(seeded("func"), 2, ROWS, CLASSES)

    def whole(*models):
        return ck.codistillation_loss(models, mode="exact")

    def shard(*models):
        options = LossOptions(1.0, 0.0, 1.0, regularizer=1, divergence=1, mode=3)
        ops = _class_shards.ShardOps(Meeting(1).at(0))
        return _autograd.evaluate_by_rows(ops, models, None, None, options, False)[0]

    assert bytes_of(torch.func.grad(shard)(*logits)) == bytes_of(torch.func.grad(whole)(*logits))
    examples = [torch.stack([z, z * 2]) for z in logits]
    want = torch.func.vmap(whole)(*examples)
    assert bytes_of(torch.func.vmap(shard)(*examples)) == bytes_of(want)


def test_each_thread_has_a_block_of_its_own():
    """Two threads with a shard each, through the public functions, one shard of a single class."""
    logits = torch.randn(2, 2, 3, 5, generator=seeded("blocks"))
    target = torch.randint(5, (2, 3), generator=seeded("blocks"))
    parts = logits.split([1, 4], -1)
    meeting = Meeting(2)

    def one(place):
        with _blocks.block(class_exchange=meeting.at(place)):
            return ck.codistillation_loss(list(parts[place]), target, alpha=0.1, reduction="none")

    with ThreadPoolExecutor(2) as pool:
        losses = list(pool.map(one, range(2)))
    whole = ck.codistillation_loss(list(logits), target, alpha=0.1, reduction="none", mode="exact")
    assert whole.shape == (2, 3)
    assert [bytes_of(loss) for loss in losses] == [bytes_of(whole)] * 2


def test_rows_of_one_class_in_all_processes_are_refused():
    options = LossOptions(mode=3)
    target = torch.zeros(4, dtype=torch.long)
    ops = _class_shards.ShardOps(Meeting(1).at(0))
    with pytest.raises(ValueError, match=r"^logits must have at least 2 classes if there is a"):
        _autograd.evaluate_by_rows(ops, [torch.zeros(4, 1)], target, None, options, False)


# Over processes -----------------------------------------------------------------------------------

WIDTHS = {1: [41], 2: [30, 11], 3: [1, 39, 1], 8: [3, 9, 1, 1, 7, 6, 10, 4]}


def everything(logits, target, weight):
    """Losses, terms and gradients of each function of the library, by name."""
    leaves = [z.detach().requires_grad_() for z in logits]
    loss, terms = ck.codistillation_loss(
        leaves,
        target,
        alpha=0.2,
        top_k=3,
        label_smoothing=0.1,
        class_weight=weight,
        mode="exact",
        return_terms=True,
    )
    loss.backward(torch.tensor(0.7))
    found = {"loss": loss, **terms._asdict(), "gradients": [z.grad for z in leaves]}
    stacked = torch.stack(logits).requires_grad_()
    found["stacked"] = ck.codistillation_loss(stacked, divergence="l1", mode="exact")
    found["stacked"].backward()
    found["gradients"] += list(stacked.grad)
    student, teacher = (z.detach().requires_grad_() for z in logits)
    found["distillation"] = ck.distillation_loss(
        student, teacher, target, alpha=0.5, temperature=2.0, mode="exact"
    )
    found["distillation"].backward()
    found["gradients"].append(student.grad)
    assert teacher.grad is None
    found["rows"] = ck.softmax_entropy(student.detach(), reduction="none", mode="exact")
    return {
        name: [bytes_of(x) for x in value] if name == "gradients" else bytes_of(value)
        for name, value in found.items()
    }


def problem():
    generator = seeded("processes")
    logits = random_logits(generator, 2, ROWS, CLASSES)
    target = random_target(generator, ROWS, CLASSES)
    return logits, target, torch.rand(CLASSES, generator=generator)


def mistakes(rank, mine, target, weight):
    """What each process is told of what does not fit."""

    def told(logits, target, loss=ck.codistillation_loss, **options):
        try:
            loss(logits, target, **options)
        except Exception as error:  # the type is part of what is checked
            return f"{type(error).__name__}: {error}"
        return "nothing"

    other = target.clone()
    other[0] = (other[0] + rank) % CLASSES
    found = {
        "rows": told([z[: ROWS - rank] for z in mine], None),
        "target": told(mine, other),
        "options": told(mine, target, beta=1.0 + rank),
        "range": told(mine, torch.full((ROWS,), CLASSES)),
        "top_k": told(mine, target, top_k=CLASSES + 1),
        "class_weight": told(mine, target, class_weight=weight[1:]),
        "float64": told([z.double() for z in mine], target),
    }
    for name, one in {
        "alone: float64": ([z.double() for z in mine], target),
        "alone: target": (mine, target[1:]),
        "alone: class_weight": (mine, target, [1.0]),
    }.items():
        logits, labels, *weights = one if rank == 1 else (mine, target)
        found[name] = told(logits, labels, class_weight=weights[0] if weights else None)
    with ck.backend("reference"):
        found["reference"] = told(mine, target)
    found["report"] = told(mine, target, loss=lambda z, y: ck.metrics.churn_report(z))
    found["confidence"] = told(
        mine, target, loss=lambda z, y: ck.metrics.prediction_confidence(z[0])
    )
    found["calibration"] = told(
        mine, target, loss=lambda z, y: ck.metrics.expected_calibration_error(z[0], y)
    )
    if rank == 0:  # lost its way: as large a tensor as the others', but no loss
        facts = torch.zeros(_class_shards._FACTS, dtype=torch.float64)
        dist.all_gather([torch.empty_like(facts) for _ in range(dist.get_world_size())], facts)
    else:
        found["lost"] = told(mine, target)
    return found


def worker(rank, world):
    logits, target, weight = problem()
    begin = sum(WIDTHS[world][:rank])
    mine = [z[:, begin : begin + WIDTHS[world][rank]] for z in logits]
    with ck.distributed.class_parallel():
        found = everything(mine, target, weight)
        told = mistakes(rank, mine, target, weight) if world == 3 else {}
    if world == 1:
        with ck.distributed.class_parallel():
            compiled = torch.compile(ck.symmetric_kl, backend="eager")(*mine)
        assert bytes_of(compiled) == bytes_of(ck.symmetric_kl(*mine, mode="exact"))
    ck.symmetric_kl(*mine)  # outside the block every process is alone
    return {"found": found, "told": told}


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed")
def test_no_number_of_processes_shows(tmp_path):
    logits, target, weight = problem()
    whole = everything(logits, target, weight)
    gradients = whole.pop("gradients")
    for world, widths in WIDTHS.items():
        found = run(worker, world, tmp_path / str(world))
        shards = [one["found"].pop("gradients") for one in found]
        assert [one["found"] for one in found] == [whole] * world
        for i, gradient in enumerate(gradients):
            rows = torch.frombuffer(bytearray(gradient), dtype=torch.float32).view(ROWS, CLASSES)
            parts = [bytes_of(part) for part in rows.split(widths, 1)]
            assert [shard[i] for shard in shards] == parts, world


TOLD = {
    "rows": "ValueError: number of rows must be the same on every rank of class_parallel, got "
    "4 on rank 0 and 3 on rank 1; split only the classes of the logits",
    "target": "ValueError: target must be the same on every rank of class_parallel, got one with "
    "checksum ",
    "options": "ValueError: divergence_weight must be the same on every rank of class_parallel, "
    "got 1 on rank 0 and 2 on rank 1; split",
    "range": "TargetError: target must hold class indices in [0, 41), got 41 at row 0; pass "
    "ignore_index for rows without a label",
    "top_k": "ValueError: top_k must be at most the number of classes C = 41, got 42",
    "class_weight": "ValueError: class_weight must have shape (41,), one weight for each class",
    "float64": "ValueError: class_parallel takes float32, float16 or bfloat16 logits, got float64; "
    "pass logits.float()",
    "reference": "ValueError: class_parallel takes CPU tensors, and runs on backend 'cpu', got "
    "backend 'reference'; choose 'cpu', or build the library",
    "report": "ValueError: churn_report takes whole rows, got a class_parallel block; call it "
    "outside the block",
    "confidence": "ValueError: prediction_confidence takes whole rows, got a class_parallel block",
    "calibration": "ValueError: expected_calibration_error takes whole rows, got a class_parallel ",
    "lost": "ValueError: every rank of class_parallel must call the same losses in the same "
    "order, but rank 0 of the group is in another collective; did an earlier call on it raise?",
}


REFUSED = (
    "ValueError: every rank of class_parallel must accept its arguments, but rank 1 of the "
    "group rejected its own; see its error"
)
ALONE = {
    "alone: float64": "ValueError: class_parallel takes float32, float16 or bfloat16",
    "alone: target": "ValueError: target must",
    "alone: class_weight": "TypeError: class_weight must be a tensor of shape (C,), got list",
}


CHECKPOINTED = {
    "mean": lambda a, b, target: ck.codistillation_loss([a, b], target, alpha=0.2),
    "none": lambda a, b, target: ck.codistillation_loss([a, b], target, reduction="none").sum(),
    "behind": lambda a, b, target: (
        ck.codistillation_loss([a, b], target, reduction="none") * torch.arange(ROWS)
    ).sum(),
    "stacked": lambda a, b, target: ck.codistillation_loss(torch.stack([a, b]), target),
    "float16": lambda a, b, target: ck.codistillation_loss([a.half(), b.half()], target),
}


def checkpointing_worker(rank, world):
    """Which losses have the gradients of whole rows if checkpointing computes them again."""
    logits, target, _ = problem()
    found = {}
    for name, loss in CHECKPOINTED.items():
        whole = [z.detach().requires_grad_() for z in logits]
        with ck.reduction_mode("exact"):
            want = torch.autograd.grad(loss(*whole, target), whole)
            want = [z.split(WIDTHS[world], 1)[rank] for z in want]
        for reentrant in (True, False):
            mine = [z.detach().split(WIDTHS[world], 1)[rank].requires_grad_() for z in logits]
            with ck.distributed.class_parallel():
                value = checkpoint(loss, *mine, target, use_reentrant=reentrant)
            value.backward()
            found[name, reentrant] = all(
                bytes_of(z.grad) == bytes_of(g) for z, g in zip(mine, want, strict=True)
            )
        # A loss of whole rows is computed again as such, whatever came before.
        whole = [z.detach().requires_grad_() for z in logits]
        with ck.reduction_mode("exact"):
            checkpoint(loss, *whole, target, use_reentrant=True).backward()
        parts = [z.grad.split(WIDTHS[world], 1)[rank] for z in whole]
        found[name, "whole"] = all(map(torch.equal, parts, want))
    return found


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed")
def test_checkpointing_computes_the_same_loss_again(tmp_path):
    """The backward pass is outside the block; target classes lie in either process."""
    for found in run(checkpointing_worker, 2, tmp_path / "checkpointing"):
        assert len(found) == 3 * len(CHECKPOINTED)
        assert all(found.values()), found


def test_another_loss_in_its_place_is_noticed():
    """Statistics of shards have a shape of their own, which checkpointing compares."""
    logits = random_logits(seeded("noticed"), 2, ROWS, CLASSES)
    leaves = [z.requires_grad_() for z in logits]
    options = PLAIN._replace(mode=3, reduction=0)
    whole, _ = _autograd.evaluate_by_rows(_ops.COMPILED, leaves, None, None, options, False)
    ops = _class_shards.ShardOps(Meeting(1).at(0))
    shard, _ = _autograd.evaluate_by_rows(ops, leaves, None, None, options, False)
    shapes = [
        [x.shape for x in loss.grad_fn.saved_tensors if x is not None] for loss in (whole, shard)
    ]
    assert shapes[0][1:] == shapes[1][1:]
    assert shapes[0][0] != shapes[1][0]


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed")
def test_every_process_is_told_what_does_not_fit(tmp_path):
    processes = run(worker, 3, tmp_path / "told")
    second = processes[1]
    for one in processes:
        alone = {name for name in one["told"] if name.startswith("alone")}
        assert len(alone) == 3
        for name in alone:
            assert one["told"][name].startswith(ALONE[name] if one is second else REFUSED)
        for name in one["told"].keys() - alone:
            assert one["told"][name].startswith(TOLD[name]), name
        assert (one["told"].keys() - alone) | {"lost"} == TOLD.keys()


def test_needs_torch_distributed_to_be_initialised():
    message = (
        "churn_kernels.distributed.class_parallel needs an initialised torch.distributed; call "
        "torch.distributed.init_process_group first, or the losses outside the block in one "
        "process"
    )
    with (
        pytest.raises(RuntimeError, match=re.escape(message)),
        ck.distributed.class_parallel(),
    ):
        pass
