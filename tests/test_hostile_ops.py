"""Whatever an op is given, it returns or raises: no crash, no read or write out of bounds.

`make sanitize` runs these under AddressSanitizer and UndefinedBehaviorSanitizer.
"""

import os
import subprocess
import sys
from collections import Counter

import pytest
import torch
from hostile import REFUSALS, Arguments

import churn_kernels as ck
from churn_kernels import _backend, _ops
from churn_kernels._class_shards import stages
from churn_kernels._options import LossOptions
from churn_kernels.exact import exact_sum

pytestmark = pytest.mark.skipif(not _ops.LOADED, reason="the compiled library is not built")

OPS = torch.ops.churn_kernels
WANT_STATS = 2
PLAIN = LossOptions(1.0, 0.3, 1.5, regularizer=1, divergence=1)


@pytest.fixture(params=["cpu", "triton"])
def ops(request):
    """The ops of both backends."""
    return _backend._OPS.get(request.param) or pytest.skip(f"no {request.param} here")


def tables_of(logits, target, weight, first, classes, options, count):
    """The tables of the first stages, of one shard alone."""
    tables = []
    for _ in range(count):
        arguments = (logits, target, weight, tables, first, classes, *options)
        tables.append(OPS.class_table(*arguments))
    return tables


def loss(draw, ops):
    logits, target, weight, *options = draw.inputs()
    reduced = LossOptions(*options).reduction in (1, 2)
    wants = range(8) if reduced else range(0, 8, 2)  # gradients come with a reduced loss
    return ops.loss, (logits, target, weight, *options, draw.pick(wants))


def loss_backward(draw, ops):
    logits, target, weight, *options = draw.inputs()
    value, stats, _, _ = ops.loss(logits, target, weight, *options, WANT_STATS)
    return ops.loss_backward, (logits, target, weight, stats, torch.ones_like(value), *options)


def scale_(draw, ops):
    dtype = draw.pick([torch.float32, torch.float64, torch.bfloat16])
    gradients = [draw.floats(5, 7, dtype=dtype) for _ in range(draw.pick([1, 2, 3]))]
    return ops.scale_, (gradients, torch.tensor(2.0), dtype != torch.float64 and draw.chance(0.5))


def exact_words(draw, ops):
    return ops.exact_words, (draw.floats(draw.pick([0, 1, 600, 5000])),)


def exact_round(draw, ops):
    return ops.exact_round, (ops.exact_words(draw.floats(600)),)


def hash_words(draw, ops):
    pieces = [draw.floats(draw.pick([0, 1, 24, 300])) for _ in range(draw.pick([1, 2]))]
    run = [draw.pick([4, 8, 1200, 2**40]) for _ in pieces]
    step = [size + draw.pick([0, 1, 4]) for size in run]
    return ops.hash_words, (pieces, [draw.pick([0, 3, 2**40]) for _ in pieces], run, step)


def shard(draw):
    """(logits, target, weight, first class, classes, options) of a shard."""
    first, behind = draw.pick([0, 5]), draw.pick([0, 4])
    arguments = draw.inputs(exact=True, classes_of=lambda own: first + own + behind)
    logits, target, weight, *options = arguments
    return logits, target, weight, first, first + logits[0].shape[-1] + behind, options


def class_table(draw, ops):
    *inputs, first, classes, options = shard(draw)
    tables = tables_of(*inputs, first, classes, options, draw.pick(range(5)))
    return OPS.class_table, (*inputs, tables, first, classes, *options)


def class_loss(draw, ops):
    *inputs, first, classes, options = shard(draw)
    tables = tables_of(*inputs, first, classes, options, 5)
    return OPS.class_loss, (*inputs, tables, first, classes, *options, draw.pick(range(8)))


def class_loss_backward(draw, ops):
    *inputs, first, classes, options = shard(draw)
    tables = tables_of(*inputs, first, classes, options, 5)
    value, stats, _ = OPS.class_loss(*inputs, tables, first, classes, *options, WANT_STATS)
    upstream = torch.ones_like(value)
    return OPS.class_loss_backward, (*inputs, stats, upstream, first, classes, *options)


def plan(draw, ops):
    logits, _, _, *options = draw.inputs()
    return OPS.plan, (logits, *options)


def cpu_isa(draw, ops):
    return OPS.cpu_isa, ("",)


# Each with the share of calls that are to be refused, and to return, at least.
KINDS = [loss, loss_backward, scale_, exact_words, exact_round, hash_words]
SHARDS = [class_table, class_loss, class_loss_backward, plan, cpu_isa]


def outcomes(kind, ops, calls, seed, *, small=False):
    """How many calls with hostile arguments returned, and how many were refused."""
    draw, found = Arguments(seed, small=small), Counter()
    for _ in range(calls):
        op, arguments = kind(draw, ops)
        op(*arguments)  # they are sound until something is changed
        try:
            op(*draw.changed(arguments))
        except REFUSALS:
            found["refused"] += 1
        else:
            found["returned"] += 1
    return found


class TestFuzz:
    @pytest.mark.parametrize("seed", range(3))
    @pytest.mark.parametrize("kind", [*KINDS, *SHARDS])
    def test_cpu_ops(self, kind, seed):
        found = outcomes(kind, _ops.COMPILED, 100, seed)
        assert found["refused"] > 5
        assert found["returned"] > (0 if kind is cpu_isa else 5)

    @pytest.mark.parametrize("kind", KINDS)
    def test_triton_ops(self, kind):
        if "triton" not in _backend._OPS:
            pytest.skip("Triton cannot run here")
        found = outcomes(kind, _ops.triton(), 12, 0, small=True)  # the interpreter is slow
        assert found["refused"] > 0
        assert found["returned"] > 0


class TestRefusals:
    """What the fuzzer has found, and its kind."""

    LOGITS = (torch.linspace(-2, 2, 15).view(3, 5), torch.linspace(2, -2, 15).view(3, 5))
    TARGET = torch.tensor([0, 1, 2])

    def refused(self, message, op, *arguments):
        with pytest.raises(RuntimeError, match=message):
            op(*arguments)

    @pytest.mark.parametrize(
        ("name", "count"),
        [("regularizer", 3), ("divergence", 5), ("teachers", 64), ("reduction", 4), ("mode", 4)],
    )
    def test_codes(self, ops, name, count):
        for value in (-1, count, 2**31, 2**32, 2**32 + 1, 2**63 - 1, -(2**63)):
            options = PLAIN._replace(**{name: value})
            message = rf"{name} must be in \[0, {count}\), got {value}"
            self.refused(message, ops.loss, self.LOGITS, self.TARGET, None, *options, 0)

    def test_want(self, ops):
        for want in (-1, 8, 2**32):
            message = rf"want must be in \[0, 8\), got {want}"
            self.refused(message, ops.loss, self.LOGITS, None, None, *PLAIN, want)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"ce_weight": float("nan")}, "weights must be finite, got nan"),
            ({"divergence_weight": float("inf")}, "weights must be finite, got inf"),
            ({"temperature": 0.0}, "temperature must be > 0 and finite, got 0"),
            ({"temperature": float("inf")}, "temperature must be > 0 and finite, got inf"),
            ({"label_smoothing": 1.5}, r"label_smoothing must be in \[0, 1\], got 1.5"),
            ({"label_smoothing": float("nan")}, r"label_smoothing must be in \[0, 1\], got nan"),
            ({"top_k": 6}, r"top_k must be in \[0, C\]"),
            ({"top_k": -1}, r"top_k must be in \[0, C\]"),
        ],
    )
    def test_numbers(self, ops, change, message):
        options = PLAIN._replace(**change)
        self.refused(message, ops.loss, self.LOGITS, self.TARGET, None, *options, 0)

    def test_more_logits_than_any_memory_holds(self, ops):
        message = "logits must hold at most 281474976710656 numbers, got 1 x"
        for shape in ((2**18, 2**44 + 1), (1, 2**63 - 1), (2**63 - 1, 1), (0, 2**63 - 1)):
            huge = torch.zeros(1, 1)[: shape[0]].expand(shape)
            options = PLAIN._replace(divergence=0)
            self.refused(message, ops.loss, [huge], None, None, *options, 1)

    def test_a_loss_of_an_expanded_tensor(self):
        logits = torch.zeros(1, 1).expand(2**18, 2**44 + 1).requires_grad_()
        target = torch.zeros(2**18, dtype=torch.int64)
        with pytest.raises(RuntimeError, match="logits must hold at most"):
            ck.regularized_cross_entropy(logits, target)

    def test_gradients_without_memory(self):
        logits = torch.zeros(1, 1).expand(2**20, 2**28).requires_grad_()
        with pytest.raises(RuntimeError, match="not enough memory for this call"):
            ck.softmax_entropy(logits)

    def test_a_thread_without_memory(self):
        """What a body of a parallel loop throws reaches the caller."""
        program = """
import resource, torch, churn_kernels as ck
torch.set_num_threads(2)
logits = torch.zeros(8, 2**22, dtype=torch.float16)
ck.softmax_entropy(logits[:, :8])
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + 2**24
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
try:
    ck.softmax_entropy(logits, top_k=2**22)
except RuntimeError as error:
    print(error)
"""
        if "libasan" in os.environ.get("LD_PRELOAD", ""):
            pytest.skip("AddressSanitizer ends the process where memory runs out")
        done = subprocess.run([sys.executable, "-c", program], text=True, capture_output=True)
        assert "not enough memory for this call; pass fewer rows" in done.stdout, done.stderr

    def test_memory_that_was_taken_away(self, ops):
        gone = torch.zeros(3, 5)
        gone.untyped_storage().resize_(0)
        message = "must lie in its storage, which has been resized"
        self.refused("logits " + message, ops.loss, [gone], None, None, *PLAIN, 0)
        target = torch.zeros(3, dtype=torch.int64)
        target.untyped_storage().resize_(8)
        self.refused("target " + message, ops.loss, self.LOGITS, target, None, *PLAIN, 0)
        self.refused("gradients " + message, ops.scale_, [gone], torch.tensor(2.0), False)
        self.refused("x " + message, ops.exact_words, gone)
        self.refused("pieces " + message, ops.hash_words, [gone], [0], [60], [60])

    def test_gradients_to_scale(self, ops):
        two, factor = torch.zeros(2), torch.tensor(2.0)
        for message, gradients, exact in (
            ("exact gradients are at most float32", [two.double()], True),
            ("gradients must not overlap", [two, two], False),
            ("gradients must not overlap", [torch.zeros(3)[:2], two, two[:]], False),
            ("gradients must share dtype and number of elements", [two, torch.zeros(3)], False),
            ("gradients must share dtype and number of elements", [two, two.half()], False),
            ("gradients must be contiguous", [torch.zeros(2, 2).t()], False),
            ("gradients must be float32, float64", [two.long()], False),
        ):
            self.refused(message, ops.scale_, gradients, factor, exact)
        self.refused("upstream must be a scalar", ops.scale_, [two], two, False)
        self.refused("upstream must be float32 or", ops.scale_, [two], factor.long(), False)
        storage = torch.zeros(4)
        self.refused("must not overlap", ops.scale_, [storage[:3], storage[1:]], factor, False)
        ops.scale_([storage[:2].fill_(1), storage[2:]], factor, False)
        assert storage.tolist() == [2, 2, 0, 0]

    def test_an_upstream_of_another_shape(self, ops):
        options = PLAIN._replace(reduction=0)
        stats = ops.loss(self.LOGITS, self.TARGET, None, *options, WANT_STATS)[1]
        backward = self.LOGITS, self.TARGET, None
        message = "upstream must have the loss's shape"
        self.refused(message, ops.loss_backward, *backward, stats, torch.ones(2), *options)
        message = "upstream must be float32 or float64"
        self.refused(message, ops.loss_backward, *backward, stats, torch.ones(3).long(), *options)

    def test_statistics_of_another_call(self, ops):
        stats = ops.loss(self.LOGITS, self.TARGET, None, *PLAIN, WANT_STATS)[1]
        more = PLAIN._replace(regularizer=2, top_k=2, temperature=2.0, divergence=3)
        backward = self.LOGITS, self.TARGET, None
        for other, options in (
            (stats, more),
            (stats[:-1], PLAIN),
            (stats[:, :-1], PLAIN),
            (stats.int(), PLAIN),
            (stats.t().contiguous().t(), PLAIN),
            (stats[0], PLAIN),
        ):
            message = "stats must be what churn_kernels::"
            self.refused(message, ops.loss_backward, *backward, other, torch.tensor(1.0), *options)

    def test_class_weights_of_any_strides(self, ops):
        weight = torch.linspace(0.5, 2, 10)[::2]
        for strided in (weight, torch.tensor(0.7).expand(5)):
            options = PLAIN._replace(label_smoothing=0.1)
            got = ops.loss(self.LOGITS, self.TARGET, strided, *options, 0)[0]
            want = ops.loss(self.LOGITS, self.TARGET, strided.contiguous(), *options, 0)[0]
            assert torch.equal(got, want)

    def test_words_that_are_no_sum(self):
        """They wrap around, on every backend alike."""
        for lane in (2**63 - 1, -(2**63), 2**62):
            words = torch.full((12,), lane)
            words[9:] = 0
            found = {float(o.exact_round(words)) for o in _backend._OPS.values()}
            assert len(found) == 1
            words[10] = lane
            assert OPS.exact_round(words) == float("inf")
        self.refused("words must be what", OPS.exact_round, torch.zeros(11, dtype=torch.int64))

    def test_pieces_to_hash(self, ops):
        x = torch.zeros(1000)
        too_far = "a piece must lie in a tensor of less than 2\\^63 bytes"
        self.refused(too_far, ops.hash_words, [x], [2**63 - 1], [16], [16])
        self.refused(too_far, ops.hash_words, [x], [2**63 - 4000], [4000], [4000])
        self.refused(too_far, ops.hash_words, [x], [0], [16], [2**62])
        whole = "a piece must hold a whole number of runs"
        self.refused(whole, ops.hash_words, [x], [0], [3000], [3000])
        self.refused("pieces must be contiguous", ops.hash_words, [x[::2]], [0], [16], [16])
        last = ops.hash_words([x + 1], [2**63 - 4001], [4000], [4000])
        assert torch.equal(last, ops.hash_words([x + 1], [2**63 - 4001], [2**40], [2**40]))

    def test_empty_lists(self, ops):
        with pytest.raises(REFUSALS):
            ops.hash_words([], [], [], [])
        with pytest.raises(REFUSALS):
            ops.loss([], None, None, *PLAIN, 0)
        self.refused("pieces must hold at least one", OPS.check_hash_words, [], [], [], [])
        self.refused("logits must hold at least one", OPS.check_loss, [], None, None, *PLAIN, 0)
        ops.scale_([], torch.tensor(2.0), False)

    def test_devices(self):
        """Of every tensor, also where the dispatcher does not look at it."""
        cpu, meta = torch.zeros(3, 5), torch.zeros(3, 5, device="meta")
        place = "must be on the same device as the first tensor"
        self.refused(place, OPS.check_loss, [cpu, meta], None, None, *PLAIN, 0)
        target = torch.zeros(3, dtype=torch.int64, device="meta")
        self.refused(place, OPS.check_loss, [cpu, cpu], target, None, *PLAIN, 0)
        self.refused(place, OPS.check_scale_, [cpu], torch.ones((), device="meta"), False)
        self.refused(place, OPS.check_hash_words, [cpu, meta], [0, 0], [60, 60], [60, 60])
        keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
        stack = torch.zeros(2, 3, 5, device="meta")
        message = "logits must be on the CPU"
        self.refused(message, OPS.loss.default.redispatch, keys, [stack], None, None, *PLAIN, 0)


class TestShards:
    EXACT = PLAIN._replace(mode=3, top_k=2)

    def test_a_table_too_wide(self):
        logits = [torch.zeros(1, 1)] * 32
        options = self.EXACT._replace(divergence=0, top_k=2**25 + 1)
        tables = tables_of(logits, None, None, 0, 2**26, options._replace(top_k=1), 1)
        message = "top_k must be smaller where classes lie in shards: 2147483712 numbers a row"
        with pytest.raises(RuntimeError, match=message):
            OPS.class_table(logits, None, None, tables, 0, 2**26, *options)

    @pytest.mark.parametrize(
        ("first", "classes"),
        [(-1, 9), (5, 9), (0, 4), (0, -(2**63)), (2**63 - 1, 2**63 - 1), (0, 2**48 + 1)],
    )
    def test_shards_outside_of_the_classes(self, first, classes):
        with pytest.raises(RuntimeError, match=r"shards of classes .* lie in \[0, classes\)"):
            OPS.class_table([torch.zeros(3, 5)] * 2, None, None, [], first, classes, *self.EXACT)

    def test_a_target_far_away(self):
        target = torch.tensor([-(2**63), 2**63 - 1, 3])
        table = OPS.class_table([torch.zeros(3, 5)], target, None, [], 5, 10, *self.EXACT)
        assert table.shape == (3, 3)

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30, -1.0])
    def test_tables_of_any_content(self, value):
        """Every stage, the loss and the backward pass take them, and mean nothing."""
        logits = [torch.zeros(3, 5), torch.ones(3, 5)]
        target = torch.tensor([0, 7, 9])
        for options in (self.EXACT, self.EXACT._replace(divergence=3, temperature=2.0)):
            tables = tables_of(logits, target, None, 3, 10, options, 5)
            for table in tables:
                table.fill_(value if table.is_floating_point() else 2**63 - 1)
                for count in range(5):
                    OPS.class_table(logits, target, None, tables[:count], 3, 10, *options)
                arguments = logits, target, None, tables, 3, 10, *options, 6
                value_, stats, _ = OPS.class_loss(*arguments)
                stats.fill_(value)
                OPS.class_loss_backward(logits, target, None, stats, value_, 3, 10, *options)

    def test_every_stage_has_a_merge(self):
        assert len(stages(self.EXACT)) == 5


class TestMemory:
    """Calls that read or wrote where they should not."""

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("classes", [2, 15, 300])
    def test_one_model_in_exact_mode(self, classes, dtype):
        logits = torch.randn(4, classes).to(dtype).requires_grad_()
        target = torch.zeros(4, dtype=torch.int64)
        ck.regularized_cross_entropy(logits, target, mode="exact").backward()
        assert logits.grad.isfinite().all()

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30, -1e30])
    @pytest.mark.parametrize("classes", [7, 5000])
    def test_sums_out_of_bounds(self, classes, value):
        """Fixed point wraps around: no sum of it overflows."""
        for models in (1, 2, 3):
            logits = [torch.randn(2, classes) for _ in range(models)]
            for z in logits:
                z[0, ::3] = value
            for divergence in ("skl", "l1"):
                ck.codistillation_loss(logits, None, alpha=0.1, divergence=divergence, mode="exact")

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30, -1e30, -1.0])
    def test_statistics_of_any_content(self, value):
        logits = [torch.randn(3, 40), torch.randn(3, 40)]
        target = torch.tensor([0, 1, 2])
        for mode in (0, 3):
            for divergence in (1, 3):
                options = PLAIN._replace(top_k=3, mode=mode, divergence=divergence)
                value_, stats, *_ = OPS.loss(logits, target, None, *options, WANT_STATS)
                stats.fill_(value)
                gradients = OPS.loss_backward(logits, target, None, stats, value_, *options)
                assert [g.shape for g in gradients] == [(3, 40)] * 2

    def test_a_block_of_the_exact_sum_is_not_too_long(self):
        """2^20 mantissas of one exponent fill a bin; blocks of 2^16 leave it room."""
        assert exact_sum(torch.full((2**20,), 1.9999999)) == 2097151.875

    @pytest.mark.parametrize(("second", "rest"), [(-7.0, -9.0), (30.0, -99.0)])
    @pytest.mark.parametrize("places", [(0, 1), (0, 3000), (3000, 0), (5000, 2500)])
    def test_the_second_largest_of_several_chunks(self, threads, places, second, rest):
        """Threads share out one row; sums are scaled by its second largest logit, wherever it is.

        Too large a one loses the digits of a loss of exp(-47), too small a one lets sums overflow.
        """
        logits, target = torch.full((1, 6000), rest), torch.tensor(places[:1])
        logits[0, places[0]], logits[0, places[1]] = 40.0, second
        options, found = LossOptions(mode=3), []
        for count, shared in ((2, "chunks"), (1, "rows")):
            threads(count)
            assert shared in OPS.plan([logits], *options)
            found.append(OPS.loss([logits], target, None, *options, 0)[0])
        assert found[0] == found[1] > 0

    @pytest.mark.parametrize(("second", "rest"), [(-7.0, -9.0), (30.0, -99.0)])
    def test_the_second_largest_of_several_vectors(self, second, rest):
        """In the largest one's lane or another, before it or after it."""
        found, target = set(), torch.tensor([32])
        for place in (0, 1, 16, *range(48, 400, 16)):
            logits = torch.full((1, 400), rest)
            logits[0, 32], logits[0, place] = 40.0, second
            found.add(OPS.loss([logits], target, None, *LossOptions(mode=3), 0)[0].item())
        assert len(found) == 1
        assert found.pop() > 0
