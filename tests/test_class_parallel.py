"""Rows whose classes lie in several shards: the bits of whole rows, however they are split."""

import itertools
import random
import re
from functools import reduce

import pytest
import torch
import torch.distributed as dist
from parity import (
    EXACT,
    EXACT_DTYPES,
    KINDS,
    PLAIN,
    bytes_of,
    kernel,
    random_logits,
    random_target,
    seeded,
    special_logits,
)
from processes import run

import churn_kernels as ck
from churn_kernels import _class_shards, _ops
from churn_kernels._options import WANT_TERMS

pytestmark = pytest.mark.skipif(not _ops.LOADED, reason="the compiled library is not built")

ROWS, CLASSES = 4, 41
CUTS = ([], [5, 20], [1, 2, 3, 40], [37])


def split(logits, cuts):
    """The shards: where they lie, and their classes of each model."""
    ends = [0, *cuts, logits[0].shape[1]]
    return [
        (
            _class_shards.Shard(begin, ends[-1]),
            [z[:, begin:end].detach().clone().requires_grad_() for z in logits],
        )
        for begin, end in itertools.pairwise(ends)
    ]


def merged_tables(shards, target, weight, options, together=reduce):
    """Every stage's table of all shards; `together(merge, tables)` merges them."""
    tables = []
    for merge in _class_shards.stages(options):
        parts = [
            _class_shards.next_table(
                [z.detach() for z in logits], target, weight, tables, shard, options
            )
            for shard, logits in shards
        ]
        tables.append(together(merge, parts) if parts[0].numel() else parts[0])
    return tables


def results(shards, tables, target, weight, options, upstream):
    """Loss, terms and gradients as the shards find them; the gradients of whole rows."""
    found = []
    for shard, logits in shards:
        loss, terms = _class_shards.ClassShardLoss.apply(
            target, weight, tables, shard, options, WANT_TERMS, *logits
        )
        students = logits[: len(logits) - options.teachers]
        found.append((loss, terms, torch.autograd.grad(loss, students, upstream)))
    losses, terms, gradients = zip(*found, strict=True)
    assert len({bytes_of(loss) for loss in losses}) == 1
    assert len({bytes_of(one) for one in terms}) == 1
    return losses[0], terms[0], [torch.cat(parts, 1) for parts in zip(*gradients, strict=True)]


def assert_no_split_shows(logits, target, weight, options, cuts=CUTS):
    students = len(logits) - options.teachers
    pairs = 1 if options.teachers else students * (students - 1) // 2
    shape = {0: (len(target),), 3: (len(target), 2 * students + pairs)}.get(options.reduction, ())
    upstream = torch.randn(shape, generator=seeded("upstream"))
    loss, terms, gradients = kernel(logits, target, weight, options, upstream)
    for ends in cuts:
        shards = split(logits, ends)
        tables = merged_tables(shards, target, weight, options)
        got = results(shards, tables, target, weight, options, upstream)
        assert bytes_of(got[0]) == bytes_of(loss), ends
        assert bytes_of(got[1]) == bytes_of(terms), ends
        for one, whole in zip(got[2], gradients, strict=True):
            assert bytes_of(one) == bytes_of(whole), ends


@pytest.mark.parametrize("models", [1, 2, 3])
@pytest.mark.parametrize("name", EXACT)
def test_no_split_of_the_classes_shows(name, models):
    for kind in (None, *KINDS):
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
@pytest.mark.parametrize("kind", KINDS)
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


def test_a_target_in_each_shard_in_turn():
    logits = random_logits(seeded("turns"), 2, CLASSES, CLASSES)
    assert_no_split_shows(logits, torch.arange(CLASSES), None, EXACT["per_row"], ([1, 17, 40],))


@pytest.mark.parametrize("name", ["plain", "top_k", "l1_divergence"])
def test_tables_merge_in_any_order_and_grouping(name):
    generator = seeded("grouping", name)
    # Few values: the largest logit, and the k-th, stand in several shards.
    logits = [z.mul(2).round() for z in random_logits(generator, 2, ROWS, CLASSES)]
    target = random_target(generator, ROWS, CLASSES)
    shards = split(logits, [3, 9, 10, 30, 33])
    draw = random.Random(name)

    def anyhow(merge, tables):
        tables = list(tables)
        while len(tables) > 1:
            a, b = (tables.pop(draw.randrange(len(tables))) for _ in range(2))
            tables.append(merge(a, b))
        return tables[0]

    want = merged_tables(shards, target, None, EXACT[name])
    for _ in range(5):
        got = merged_tables(shards, target, None, EXACT[name], anyhow)
        assert [bytes_of(x) for x in got] == [bytes_of(x) for x in want]


def test_sums_in_floating_point_are_caught():
    """The negative control: the usual way to split a log-sum-exp, merged in the same ways."""
    z = random_logits(seeded("control"), 1, ROWS, CLASSES)[0]

    def log_sum_exp(cuts):
        parts = [part.detach() for _, (part,) in split([z], cuts)]
        largest = reduce(torch.maximum, [part.amax(1) for part in parts])
        return largest + sum((part - largest[:, None]).exp().sum(1) for part in parts).log()

    assert len({bytes_of(log_sum_exp([cut])) for cut in range(1, CLASSES)}) > 1


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

    def told(logits, target, **options):
        try:
            ck.codistillation_loss(logits, target, **options)
        except Exception as error:  # the type is part of what is checked
            return f"{type(error).__name__}: {error}"
        return "nothing"

    other = target.clone()
    other[0] = (other[0] + rank) % CLASSES
    return {
        "rows": told([z[: ROWS - rank] for z in mine], None),
        "target": told(mine, other),
        "options": told(mine, target, beta=1.0 + rank),
        "range": told(mine, torch.full((ROWS,), CLASSES)),
        "top_k": told(mine, target, top_k=CLASSES + 1),
        "class_weight": told(mine, target, class_weight=weight[1:]),
        "float64": told([z.double() for z in mine], target),
    }


def worker(rank, world):
    logits, target, weight = problem()
    begin = sum(WIDTHS[world][:rank])
    mine = [z[:, begin : begin + WIDTHS[world][rank]] for z in logits]
    with ck.distributed.class_parallel():
        found = everything(mine, target, weight)
        told = mistakes(rank, mine, target, weight) if world == 3 else {}
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
    "rows": "ValueError: number of rows must be the same in every process of class_parallel, but "
    "process 1 of the group has another one than process 0; split the classes of the logits, and "
    "nothing else",
    "target": "ValueError: target must be the same in every process of class_parallel",
    "options": "ValueError: options must be the same in every process of class_parallel",
    "range": "TargetError: target must hold class indices in [0, 41), got 41 at row 0; pass "
    "ignore_index for rows without a label",
    "top_k": "ValueError: top_k must be at most the number of classes C = 41, got 42",
    "class_weight": "ValueError: class_weight must have shape (41,), one weight for each class",
    "float64": "ValueError: mode 'exact' takes float32, float16 or bfloat16 logits, got float64",
}


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed")
def test_every_process_is_told_what_does_not_fit(tmp_path):
    for one in run(worker, 3, tmp_path / "told"):
        assert one["told"].keys() == TOLD.keys()
        for name, message in TOLD.items():
            assert one["told"][name].startswith(message), name


def test_needs_torch_distributed_to_be_initialised():
    message = (
        "churn_kernels.distributed.class_parallel needs an initialised torch.distributed; call "
        "torch.distributed.init_process_group first, or the losses outside of the block in one "
        "process"
    )
    with (
        pytest.raises(RuntimeError, match=re.escape(message)),
        ck.distributed.class_parallel(),
    ):
        pass
