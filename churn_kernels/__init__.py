"""Fused losses, reduction modes and metrics for reproducible predictions."""

from typing import Any

from churn_kernels import audit, distributed, metrics
from churn_kernels._backend import available_backends, backend, build_info
from churn_kernels._checks import TargetError
from churn_kernels.exact import EXACT_SPEC, ExactSum, exact_sum
from churn_kernels.losses import (
    LossTerms,
    RowTerms,
    codistillation_loss,
    codistillation_terms,
    distillation_loss,
    regularized_cross_entropy,
    softmax_entropy,
    symmetric_kl,
    uniform_skl,
)
from churn_kernels.modes import get_reduction_mode, reduction_mode, set_reduction_mode
from churn_kernels.modules import (
    CodistillationLoss,
    DistillationLoss,
    RegularizedCrossEntropy,
    SoftmaxEntropy,
    SymmetricKL,
    UniformSKL,
)

__all__ = [
    "EXACT_SPEC",
    "CodistillationLoss",
    "DistillationLoss",
    "ExactSum",
    "LossTerms",
    "RegularizedCrossEntropy",
    "RowTerms",
    "SoftmaxEntropy",
    "SymmetricKL",
    "TargetError",
    "UniformSKL",
    "audit",
    "available_backends",
    "backend",
    "build_info",
    "codistillation_loss",
    "codistillation_terms",
    "distillation_loss",
    "distributed",
    "exact_sum",
    "get_reduction_mode",
    "metrics",
    "reduction_mode",
    "regularized_cross_entropy",
    "set_reduction_mode",
    "softmax_entropy",
    "symmetric_kl",
    "uniform_skl",
]

__version__: str  # computed on first access, because reading the metadata is slow


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from churn_kernels._version import version

        return version()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
