"""What only a CUDA device can show: no waiting, graphs, streams, memory, and bad input there."""

import os
import subprocess
import sys

import pytest
import torch
from tolerances import assert_close

import churn_kernels as ck

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def batch(rows=64, classes=1001, models=2, dtype=torch.float32, device="cuda"):
    torch.manual_seed(0)
    logits = [torch.randn(rows, classes, device=device).to(dtype) for _ in range(models)]
    return [z.requires_grad_() for z in logits], torch.randint(classes, (rows,), device=device)


def step(logits, target, **options):
    loss = ck.codistillation_loss(logits, target, alpha=0.1, **options)
    return loss, *torch.autograd.grad(loss.sum(), logits)


def test_a_cuda_tensor_takes_the_kernels(recwarn):
    logits, target = batch()
    assert "Fused" in ck.codistillation_loss(logits, target).grad_fn.name()
    assert not recwarn.list  # the fallback would warn


@pytest.mark.parametrize("options", [{}, {"reduction": "none"}, {"top_k": 5}, {"divergence": "l1"}])
def test_nothing_waits_for_the_gpu(options):
    logits, target = batch()
    step(logits, target, **options)
    try:
        torch.cuda.set_sync_debug_mode("error")
        step(logits, target, **options)
        ck.codistillation_loss(logits, target, return_terms=True, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_an_exact_sum_does_not_wait_and_can_be_captured():
    x = torch.randn(100_001, device="cuda")
    want, total = ck.exact_sum(x.cpu()), ck.ExactSum().add(x)
    try:
        torch.cuda.set_sync_debug_mode("error")
        value = ck.exact_sum(x)
        total.add(x[::2])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(value.cpu(), want)
    assert total == ck.ExactSum().add(x.cpu()).add(x[::2].cpu())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        value = ck.exact_sum(x)
    x.neg_()
    for _ in range(2):
        graph.replay()
        assert torch.equal(value.cpu(), -want)


@pytest.mark.parametrize("mode", ["fast", "exact"])
def test_a_ramp_shows_in_the_graphs_of_the_compiler(mode):
    torch.compiler.reset()
    logits, target = batch()
    compiled = torch.compile(
        lambda a, b, beta: ck.codistillation_loss([a, b], target, beta=beta, mode=mode),
        fullgraph=True,
        mode="reduce-overhead",
    )
    for number in range(1, 8):
        beta = number / 4
        torch.compiler.cudagraph_mark_step_begin()
        loss = compiled(*logits, beta)
        got = [loss.clone(), *(g.clone() for g in torch.autograd.grad(loss, logits))]
        wanted = ck.codistillation_loss(logits, target, beta=beta, mode=mode)
        for a, b in zip(got, [wanted, *torch.autograd.grad(wanted, logits)], strict=True):
            assert_close(a, b, "gradient", torch.float32)
            assert mode != "exact" or torch.equal(a, b)


@pytest.mark.parametrize("mode", ["fast", "run_to_run", "invariant"])
@pytest.mark.parametrize("classes", [10, 1001, 21841])
def test_cuda_graph(classes, mode):
    """Gradients have the same bits in every mode; the loss too, but for that of "fast"."""
    logits, target = batch(rows=600, classes=classes)
    step(logits, target, mode=mode)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(logits, target, mode=mode)
    with torch.no_grad():
        for z in logits:
            z.copy_(torch.randn_like(z))
    for _ in range(3):
        graph.replay()
    loss, *gradients = step(logits, target, mode=mode)
    assert_close(captured[0], loss, "loss", torch.float32)
    assert mode == "fast" or torch.equal(captured[0], loss)
    for got, want in zip(captured[1:], gradients, strict=True):
        assert torch.equal(got, want)


def test_another_stream():
    logits, target = batch()
    want = step(logits, target)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        got = step(logits, target)
    torch.cuda.current_stream().wait_stream(stream)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
def test_another_device():
    with torch.cuda.device(0):
        logits, target = batch(device="cuda:1")
        loss, *gradients = step(logits, target)
    assert loss.device.index == 1
    assert all(g.device.index == 1 for g in gradients)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("classes", [1000, 8142, 21841])
def test_memory(dtype, classes):
    logits, target = batch(rows=256, classes=classes, dtype=dtype)
    step(logits, target)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    results = step(logits, target)
    peak = torch.cuda.max_memory_allocated() - before
    gradients = sum(g.nbytes for g in results[1:])
    # The allocator rounds every tensor up to 512 bytes; the call makes about ten.
    assert peak - gradients <= 128 * 256 + 10 * 512


@pytest.mark.parametrize("options", [{}, {"reduction": "none"}])
def test_compiled(options):
    logits, target = batch()
    compiled = torch.compile(
        lambda a, b: ck.codistillation_loss([a, b], target, **options), fullgraph=True
    )
    loss = compiled(*logits)
    got = (loss, *torch.autograd.grad(loss.sum(), logits))
    want = ck.codistillation_loss(logits, target, **options)
    want = (want, *torch.autograd.grad(want.sum(), logits))
    assert_close(got[0], want[0], "loss", torch.float32)
    for a, b in zip(got[1:], want[1:], strict=True):
        assert_close(a, b, "gradient", torch.float32)


def test_a_target_out_of_range_poisons_its_row():
    logits, target = batch(rows=4)
    target[2] = 1001
    loss, *gradients = step(logits, target, reduction="none")
    assert loss.isnan().tolist() == [False, False, True, False]
    for g in gradients:
        assert g.isnan().all(1).tolist() == [False, False, True, False]


def test_a_target_out_of_range_raises_when_asked():
    program = (
        "import torch, churn_kernels as ck\n"
        "z = torch.zeros(2, 5, device='cuda')\n"
        "ck.codistillation_loss([z, z], torch.tensor([0, 7], device='cuda'))\n"
    )
    environment = {**os.environ, "CHURN_DEBUG": "1"}
    result = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 1
    assert "target must hold class indices in [0, 5), got 7 at row 1" in result.stderr


def test_mixed_devices():
    logits, target = batch(rows=4)
    with pytest.raises(ValueError, match=r"logits\[1\] must be on the device of logits\[0\]"):
        ck.codistillation_loss([logits[0], logits[1].cpu()], target)
    with pytest.raises(ValueError, match="target must be on the logits' device, cuda:0, got cpu"):
        ck.codistillation_loss(logits, target.cpu())
    with pytest.raises(ValueError, match="class_weight must be on the logits' device"):
        ck.codistillation_loss(logits, target, class_weight=torch.ones(1001))


def test_the_cpu_backend_refuses_a_gpu():
    logits, target = batch(rows=4)
    with ck.backend("cpu"), pytest.raises(ValueError, match="backend 'cpu' takes CPU tensors"):
        ck.codistillation_loss(logits, target)
