"""The losses as modules: each holds the keyword arguments of the function of its name.

`class_weight` is a buffer, so that it moves with the module and is saved with it.
"""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from churn_kernels import losses


class _LossModule(nn.Module):
    """Keyword arguments of a loss, and its call."""

    class_weight: Tensor | None

    def __init__(
        self, function: Callable[..., Any], class_weight: Tensor | None, **options: Any
    ) -> None:
        super().__init__()
        self._function = function
        self._options = options
        self.register_buffer("class_weight", class_weight)

    def _evaluate(self, *inputs: Any) -> Any:
        if self.class_weight is None:
            return self._function(*inputs, **self._options)
        return self._function(*inputs, class_weight=self.class_weight, **self._options)

    def extra_repr(self) -> str:
        """The keyword arguments, as they would be written in a call."""
        return ", ".join(f"{name}={value!r}" for name, value in self._options.items())


class CodistillationLoss(_LossModule):
    """`codistillation_loss` as a module.

    Args: the keyword arguments of `codistillation_loss`.
    Shapes: logits, K tensors (N, C) or one (K, N, C); target (N,) int64 or None; the loss () or
    (N,).
    """

    def __init__(self, *, class_weight: Tensor | None = None, **options: Any) -> None:
        super().__init__(losses.codistillation_loss, class_weight, **options)

    def forward(self, logits: Sequence[Tensor] | Tensor, target: Tensor | None = None) -> Any:
        """The loss of K models' logits, as `codistillation_loss` returns it."""
        return self._evaluate(logits, target)


class RegularizedCrossEntropy(_LossModule):
    """`regularized_cross_entropy` as a module.

    Args: the keyword arguments of `regularized_cross_entropy`.
    Shapes: logits (N, C); target (N,) int64; the loss () or (N,).
    """

    def __init__(self, *, class_weight: Tensor | None = None, **options: Any) -> None:
        super().__init__(losses.regularized_cross_entropy, class_weight, **options)

    def forward(self, logits: Tensor, target: Tensor) -> Any:
        """The loss of one model's logits, as `regularized_cross_entropy` returns it."""
        return self._evaluate(logits, target)


class SymmetricKL(_LossModule):
    """`symmetric_kl` as a module.

    Args: the keyword arguments of `symmetric_kl`.
    Shapes: p_logits, q_logits (N, C); the divergence () or (N,).
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(losses.symmetric_kl, None, **options)

    def forward(self, p_logits: Tensor, q_logits: Tensor) -> Tensor:
        """The divergence of two models' softmaxes, in nats."""
        return self._evaluate(p_logits, q_logits)


class SoftmaxEntropy(_LossModule):
    """`softmax_entropy` as a module.

    Args: the keyword arguments of `softmax_entropy`.
    Shapes: logits (N, C); the entropy () or (N,).
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(losses.softmax_entropy, None, **options)

    def forward(self, logits: Tensor) -> Tensor:
        """The entropy of one model's softmax, in nats."""
        return self._evaluate(logits)


class UniformSKL(_LossModule):
    """`uniform_skl` as a module.

    Args: the keyword arguments of `uniform_skl`.
    Shapes: logits (N, C); the divergence () or (N,).
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(losses.uniform_skl, None, **options)

    def forward(self, logits: Tensor) -> Tensor:
        """The symmetric KL of one model's softmax to uniform, in nats."""
        return self._evaluate(logits)


class DistillationLoss(_LossModule):
    """`distillation_loss` as a module.

    Args: the keyword arguments of `distillation_loss`; `alpha` is required.
    Shapes: student_logits (N, C); teacher_logits (N, C), M tensors (N, C) or one (M, N, C);
        target (N,) int64 or None; the loss () or (N,).
    """

    def __init__(self, *, class_weight: Tensor | None = None, **options: Any) -> None:
        super().__init__(losses.distillation_loss, class_weight, **options)

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor | Sequence[Tensor],
        target: Tensor | None,
    ) -> Any:
        """The loss of the student's logits, as `distillation_loss` returns it."""
        return self._evaluate(student_logits, teacher_logits, target)
