"""The peers of the losses on a GPU: PyTorch and published fused kernels.

The published packages are used if importable; the project does not depend on them.
"""

from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import churn_kernels as ck
from benchmarks.cases import PAIR, Variant
from benchmarks.gpu.table import AUTOTUNED, LIGER, LIGER_JSD, QUACK
from benchmarks.peers import ALPHA, PEERS, Loss, eager, fused
from benchmarks.table import COMPILED, EAGER, OURS


class Peer(NamedTuple):
    """A way to compute a loss and its gradients.

    `load` may raise ImportError. A peer that overwrites its logits gets its own copy, and is
    timed on the output of its last call; one that waits for the GPU cannot be captured.
    """

    name: str
    load: Callable[[], Loss]
    variant: Variant
    overwrites: bool = False
    waits: bool = False
    note: str = ""


def compiled(loss: Loss, mode: str | None = None) -> Loss:
    """`loss` compiled for one shape: without a reset the compiler gives up after a few shapes."""
    torch._dynamo.reset()
    # Tune again in this process, when nothing else runs on the GPU.
    import_module("torch._inductor.config").autotune_local_cache = False
    return torch.compile(loss, dynamic=False, fullgraph=True, mode=mode)


def liger_pair() -> Loss:
    """CE + entropy + SKL of a pair with gradients to both: the parts that Liger supports.

    Its divergence has no gradient for its second argument, so each direction is computed twice, the
    second time with the models swapped. It has no kernel for the entropy; PyTorch computes it.
    """
    functional = import_module("liger_kernel.transformers.functional")

    def divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
        """KL(p||q) + KL(q||p), with a gradient to p alone."""
        fixed = log_q.detach()
        return functional.liger_jsd(log_p, fixed, None, 0.0) + functional.liger_jsd(
            log_p, fixed, None, 1.0
        )

    def loss(logits: Sequence[Tensor], target: Tensor) -> Tensor:
        a, b = logits
        log_p, log_q = F.log_softmax(a, dim=1), F.log_softmax(b, dim=1)
        entropy = -(log_p.exp() * log_p).sum(1).mean() - (log_q.exp() * log_q).sum(1).mean()
        to_b = divergence(log_q, log_p)
        skl = divergence(log_p, log_q) + (to_b - to_b.detach())
        cross_entropy = functional.liger_cross_entropy(a, target)  # overwrites a
        cross_entropy = cross_entropy + functional.liger_cross_entropy(b, target)
        return (1 - ALPHA) * cross_entropy + ALPHA * entropy + skl

    return loss


def liger_cross_entropy() -> Loss:
    functional = import_module("liger_kernel.transformers.functional")
    return lambda logits, target: functional.liger_cross_entropy(logits[0], target)


def liger_jsd() -> Loss:
    """From float32 log-softmaxes: from bfloat16 ones its gradients are 1 to 3 % off."""
    functional = import_module("liger_kernel.transformers.functional")
    log_softmax = partial(F.log_softmax, dim=1, dtype=torch.float32)
    return lambda logits, target: functional.liger_jsd(*map(log_softmax, logits), None, 0.5)


def quack_cross_entropy() -> Loss:
    quack = import_module("quack")
    return lambda logits, target: quack.cross_entropy(logits[0], target)


def jsd(logits: Sequence[Tensor], target: Tensor) -> Tensor:
    """Jensen-Shannon divergence of two softmaxes, as in `liger_jsd`."""
    log_p, log_q = (F.log_softmax(z, dim=1) for z in logits)
    p, q = log_p.exp(), log_q.exp()
    log_m = ((p + q) / 2).log()
    return (p * (log_p - log_m) + q * (log_q - log_m)).sum(1).mean() / 2


def cross_entropy(logits: Sequence[Tensor], target: Tensor) -> Tensor:
    return F.cross_entropy(logits[0], target)


def fused_cross_entropy(logits: Sequence[Tensor], target: Tensor) -> Tensor:
    return ck.regularized_cross_entropy(logits[0], target)


def fused_symmetric_kl(logits: Sequence[Tensor], target: Tensor) -> Tensor:
    return ck.symmetric_kl(*logits)


ONE_MODEL = Variant(fused_cross_entropy, models=1)
IN_PLACE = "overwrites its logits with their gradients"
WAITS = "waits for the GPU in forward and backward"

# The loss of a pair, and the parts of it that published kernels compute alone.
OURS_PAIR = Peer(OURS, lambda: fused, PAIR)
PAIR_PEERS = (
    Peer(COMPILED, lambda: compiled(eager), PAIR),
    Peer(EAGER, lambda: PEERS[EAGER], PAIR),
    Peer(LIGER, liger_pair, PAIR, overwrites=True, waits=True, note=f"{IN_PLACE}; {WAITS}"),
)
AUTOTUNED_PAIR = Peer(AUTOTUNED, lambda: compiled(eager, "max-autotune-no-cudagraphs"), PAIR)
CROSS_ENTROPY_PEERS = (
    Peer(OURS, lambda: fused_cross_entropy, ONE_MODEL),
    Peer(QUACK, quack_cross_entropy, ONE_MODEL),
    Peer(
        LIGER,
        liger_cross_entropy,
        ONE_MODEL,
        overwrites=True,
        waits=True,
        note=f"{IN_PLACE}; {WAITS}",
    ),
    Peer(COMPILED, lambda: compiled(cross_entropy), ONE_MODEL),
    Peer(EAGER, lambda: cross_entropy, ONE_MODEL),
)
DIVERGENCE_PEERS = (
    Peer(OURS, lambda: fused_symmetric_kl, Variant(fused_symmetric_kl)),
    Peer(
        LIGER_JSD,
        liger_jsd,
        Variant(jsd, teachers=1),
        waits=True,
        note=f"a gradient to one side only; float32 log-softmaxes by PyTorch; {WAITS}",
    ),
)
