"""Reduction modes: what each call gets, what cannot be had, and how far a block reaches."""

import asyncio
import threading
from contextlib import ExitStack

import cases
import pytest
import torch

import churn_kernels as ck
from churn_kernels import _blocks, _ops, modes


@pytest.fixture(autouse=True)
def unset(monkeypatch):
    monkeypatch.setattr(modes, "default", None)


def test_the_default_follows_torch():
    assert torch.are_deterministic_algorithms_enabled()
    assert ck.get_reduction_mode() == "run_to_run"
    torch.use_deterministic_algorithms(False)
    assert ck.get_reduction_mode() == "fast"


def test_set_and_unset():
    ck.set_reduction_mode("invariant")
    assert ck.get_reduction_mode() == "invariant"
    ck.set_reduction_mode(None)
    assert ck.get_reduction_mode() == "run_to_run"


def test_a_block():
    with ck.reduction_mode("invariant"):
        assert ck.get_reduction_mode() == "invariant"
        with ck.reduction_mode("fast"):
            assert ck.get_reduction_mode() == "fast"
        assert ck.get_reduction_mode() == "invariant"
    with pytest.raises(KeyError), ck.reduction_mode("invariant"):
        raise KeyError
    assert ck.get_reduction_mode() == "run_to_run"


def test_exact_asks_for_a_backend_that_keeps_it():
    logits, _ = cases.batch()
    message = "^the reference backend cannot keep mode 'exact'; 'run_to_run' is the strongest"
    with ck.backend("reference"), pytest.raises(NotImplementedError, match=message):
        ck.codistillation_loss(logits, mode="exact")


@pytest.mark.skipif(not _ops.LOADED, reason="the compiled library is not built")
def test_exact_asks_for_float32_at_most():
    logits, _ = cases.batch(dtype=torch.float64)
    message = (
        "^mode 'exact' takes float32, float16 or bfloat16 logits, got float64; pass logits.float"
    )
    with ck.backend("cpu"), pytest.raises(ValueError, match=message):
        ck.codistillation_loss(logits, mode="exact")


@pytest.mark.parametrize("mode", ["Fast", "", 1, None])
def test_unknown_modes(mode):
    message = "^mode must be one of 'fast', 'run_to_run', 'invariant', 'exact', got "
    with pytest.raises(ValueError, match=message):
        modes.check(mode)


@pytest.mark.skipif(not _ops.LOADED, reason="the compiled library is not built")
def test_exact_mode_takes_no_more_rows_than_its_sum_holds():
    many = torch.zeros(1, 1).expand(2**31, 1)  # one number in memory
    message = (
        "^mode 'exact' takes fewer than 2\\^31 = 2147483648 rows per call, got 2147483648; split"
    )
    with pytest.raises(ValueError, match=message):
        ck.softmax_entropy(many, mode="exact")


def test_the_reference_does_not_pretend():
    logits, _ = cases.batch()
    message = "^the reference backend cannot keep mode 'invariant'; 'run_to_run' is the strongest"
    with ck.backend("reference"):
        ck.codistillation_loss(logits, mode="run_to_run")
        with pytest.raises(NotImplementedError, match=message):
            ck.codistillation_loss(logits, mode="invariant")
        with ck.reduction_mode("invariant"), pytest.raises(NotImplementedError, match=message):
            ck.codistillation_loss(logits)


@pytest.mark.skipif(not _ops.LOADED, reason="the compiled library is not built")
@pytest.mark.parametrize("mode", ["fast", "run_to_run", "invariant", "exact"])
def test_every_mode_is_invariant_on_the_cpu(mode):
    """A row's loss and gradient have the same bits alone, in a batch, and on a second call."""
    logits, target = cases.batch(rows=33, classes=1031)

    def run(rows):
        cut = [z.detach()[rows].requires_grad_() for z in logits]
        loss = ck.codistillation_loss(cut, target[rows], alpha=0.1, reduction="none", mode=mode)
        return loss, *torch.autograd.grad(loss.sum(), cut)

    with ck.backend("cpu"):
        whole, again, alone = run(slice(0, 33)), run(slice(0, 33)), run(slice(7, 8))
    for a, b, row in zip(whole, again, alone, strict=True):
        assert torch.equal(a.view(torch.int32), b.view(torch.int32))
        assert torch.equal(a[7:8].view(torch.int32), row.view(torch.int32))


def in_thread(function):
    """What the function returns in a thread of its own."""
    results = []
    thread = threading.Thread(target=lambda: results.append(function()))
    thread.start()
    thread.join()
    return results[0]


def chosen():
    """Which backend computes a loss here, and the mode."""
    loss = ck.softmax_entropy(torch.zeros(2, 3, requires_grad=True))
    return "Fused" not in loss.grad_fn.name(), ck.get_reduction_mode()


class TestBlocks:
    """Each holds for the thread and the task that opened it."""

    def test_blocks_of_two_threads_interleave(self):
        steps = [threading.Event() for _ in range(3)]

        def first():
            with ck.reduction_mode("exact"):
                steps[0].set()
                assert steps[1].wait(10)
                during = ck.get_reduction_mode()
            steps[2].set()
            return during, ck.get_reduction_mode()

        def second():
            assert steps[0].wait(10)
            with ck.reduction_mode("invariant"):
                steps[1].set()
                assert steps[2].wait(10)
                during = ck.get_reduction_mode()
            return during, ck.get_reduction_mode()

        results = []
        threads = [
            threading.Thread(target=lambda f=f: results.append(f())) for f in (first, second)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(results) == [("exact", "run_to_run"), ("invariant", "run_to_run")]
        assert ck.get_reduction_mode() == "run_to_run"

    @pytest.mark.skipif(not _ops.LOADED, reason="the compiled library is not built")
    def test_another_thread_does_not_see_a_block(self):
        outside = chosen()
        with ck.backend("reference"), ck.reduction_mode("fast"):
            assert chosen() == (True, "fast")
            assert in_thread(chosen) == outside == (False, "run_to_run")

    def test_every_thread_sees_the_default_of_the_process(self):
        with ck.reduction_mode("fast"):
            ck.set_reduction_mode("exact")
            assert ck.get_reduction_mode() == "fast"
            assert in_thread(ck.get_reduction_mode) == "exact"
        assert ck.get_reduction_mode() == "exact"

    def test_a_block_can_leave_it_to_torch(self):
        ck.set_reduction_mode("exact")
        with ck.reduction_mode(None):
            assert ck.get_reduction_mode() == "run_to_run"
        assert ck.get_reduction_mode() == "exact"

    def test_tasks_interleave(self):
        async def task(mode):
            with ck.reduction_mode(mode):
                await asyncio.sleep(0)
                inner = await asyncio.create_task(read())  # begins with its parent's mode
                await asyncio.sleep(0)
                return inner, ck.get_reduction_mode()

        async def read():
            return ck.get_reduction_mode()

        async def main():
            with ck.reduction_mode("fast"):
                both = await asyncio.gather(task("exact"), task("invariant"), read())
            return both, ck.get_reduction_mode()

        (*both, third), after = asyncio.run(main())
        assert both == [("exact", "exact"), ("invariant", "invariant")]
        assert (third, after) == ("fast", "run_to_run")

    def test_blocks_close_in_any_order(self):
        first, second = ExitStack(), ExitStack()
        first.enter_context(ck.reduction_mode("exact"))
        second.enter_context(ck.reduction_mode("invariant"))
        first.close()
        assert ck.get_reduction_mode() == "invariant"
        second.close()
        assert ck.get_reduction_mode() == "run_to_run"
        assert _blocks.choices() == _blocks.Choices()

    def test_kinds_of_blocks_do_not_meet(self):
        with ck.reduction_mode("fast"), ck.backend("reference"):
            with _blocks.block(class_exchange="others"):
                assert _blocks.choices() == ("fast", "reference", "others")
            assert _blocks.choices() == ("fast", "reference", None)

    def test_a_wrong_name_raises_before_the_block(self):
        with pytest.raises(ValueError, match=r"^mode must be one of"):
            ck.reduction_mode("best")
        with pytest.raises(ValueError, match=r"^backend must be one of"):
            ck.backend("best")

    def test_autograd_takes_the_block_to_its_own_threads(self):
        """Deeply nested backward passes run there on any machine, those of a GPU always."""
        seen = {}

        class Nested(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x, depth):
                ctx.depth = depth
                return x.clone()

            @staticmethod
            def backward(ctx, upstream):
                if ctx.depth:
                    inner = torch.ones((), requires_grad=True)
                    with torch.enable_grad():
                        Nested.apply(inner, ctx.depth - 1).backward()
                else:
                    seen[threading.get_ident()] = ck.get_reduction_mode()
                    with ck.backend("reference"):  # blocks in there add to it
                        seen["inside"] = tuple(_blocks.choices())
                return upstream, None

        def backward():
            Nested.apply(torch.ones((), requires_grad=True), 70).backward()

        with ck.reduction_mode("fast"):
            backward()
        assert threading.get_ident() not in seen
        assert seen.pop("inside") == ("fast", "reference", None)
        assert list(seen.values()) == ["fast"]
        seen.clear()
        backward()  # the same threads, outside of the block
        assert seen.pop("inside") == (_blocks.UNSET, "reference", None)
        assert list(seen.values()) == ["run_to_run"]

    def test_a_block_in_autograds_thread_leaves_nothing_behind(self):
        """Such a thread lives on; PyTorch's thread-local objects come and go with each task."""

        def task(handed_over):
            torch._C._stash_obj_in_tls(_blocks._KEY, handed_over)
            before = ck.get_reduction_mode()
            with ck.backend("reference"):
                inside = tuple(_blocks.choices())
            return before, inside, ck.get_reduction_mode()

        with ck.reduction_mode("exact"):
            inside = torch._C._get_obj_in_tls(_blocks._KEY)
        outside = torch._C._get_obj_in_tls(_blocks._KEY)
        first, second = in_thread(lambda: (task(inside), task(outside)))
        assert first == ("exact", ("exact", "reference", None), "exact")
        assert second == ("run_to_run", (_blocks.UNSET, "reference", None), "run_to_run")

    def test_reading_takes_no_block_for_its_own(self):
        with pytest.raises(AttributeError, match="has no attribute 'other'"):
            _ = _blocks.other
