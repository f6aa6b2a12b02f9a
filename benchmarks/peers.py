"""The compared loss, as each peer computes it, and the measured step."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

import churn_kernels as ck

ALPHA = 0.1
SHAPES = ((1024, 1000), (1024, 8142), (256, 21841), (64, 131072))
TINY = (4, 17)  # --tiny: runs every case, with meaningless times

Loss = Callable[[Sequence[Tensor], Tensor], Tensor]


def shape_name(shape: tuple[int, int]) -> str:
    return "x".join(map(str, shape))


def eager(logits: Sequence[Tensor], target: Tensor) -> Tensor:
    """CE + entropy + SKL of a pair, in plain PyTorch."""
    a, b = logits
    log_p, log_q = F.log_softmax(a, dim=1), F.log_softmax(b, dim=1)
    p, q = log_p.exp(), log_q.exp()
    cross_entropy = F.cross_entropy(a, target) + F.cross_entropy(b, target)
    entropy = -(p * log_p).sum(1).mean() - (q * log_q).sum(1).mean()
    skl = ((p - q) * (log_p - log_q)).sum(1).mean()
    return (1 - ALPHA) * cross_entropy + ALPHA * entropy + skl


def fused(logits: Sequence[Tensor], target: Tensor) -> Tensor:
    return ck.codistillation_loss(logits, target, alpha=ALPHA)


PEERS: dict[str, Loss] = {
    "churn_kernels": fused,
    "torch.compile": torch.compile(eager, dynamic=False, fullgraph=True),
    "eager": eager,
}


def batch(
    shape: tuple[int, int],
    dtype: torch.dtype = torch.float32,
    models: int = 2,
    teachers: int = 0,
    device: str = "cpu",
    seed: int = 0,
) -> tuple[list[Tensor], Tensor]:
    """Logits (N, C) of each model, the last `teachers` of them without a gradient, and a target."""
    where = {"generator": torch.Generator(device).manual_seed(seed), "device": device}
    logits = [(2 * torch.randn(shape, **where)).to(dtype) for _ in range(models)]
    for student in logits[: models - teachers]:
        student.requires_grad_()
    return logits, torch.randint(0, shape[1], shape[:1], **where)


def step(
    loss: Loss, logits: Sequence[Tensor], target: Tensor, upstream: float | None = None
) -> Callable[[], Tensor]:
    """The loss's share of a training step: drop the old gradients, forward, backward."""

    def run() -> Tensor:
        for z in logits:
            z.grad = None
        value = loss(logits, target)
        value.backward(None if upstream is None else torch.full_like(value, upstream))
        return value

    return run
