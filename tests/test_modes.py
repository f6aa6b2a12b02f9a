"""Reduction modes: what each call gets, and what cannot be had."""

import cases
import pytest
import torch

import churn_kernels as ck
from churn_kernels import _ops, modes


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
        "^mode 'exact' takes fewer than 2\\^31 = 2147483648 rows a call, got 2147483648; split"
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
