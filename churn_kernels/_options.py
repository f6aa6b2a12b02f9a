"""The option set that every loss of the library maps onto, and the ops' option codes."""

from typing import NamedTuple

REGULARIZERS = {"entropy": 1, "uniform_skl": 2}
DIVERGENCES = {"skl": 1, "ce": 2, "l1": 3}
REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}

NO_REGULARIZER = 0
NO_DIVERGENCE = 0
DISTILLATION = 4  # KL from the teachers' mean softmax to the student's
ROW_TERMS = 3  # the reduction that returns every row's terms separately, unweighted

# Bits of the ops' `want`: what to compute besides the loss.
WANT_GRADIENTS = 1
WANT_STATS = 2
WANT_TERMS = 4


class LossOptions(NamedTuple):
    """The ops' scalar arguments, in the ops' order: `op(logits, target, class_weight, *options)`.

    Row loss = sum over models of (ce_weight CE + regularizer_weight R) + divergence_weight times
    the mean of D over the pairs. A term of weight 0 is skipped, so it cannot produce a NaN.
    """

    ce_weight: float = 1.0
    regularizer_weight: float = 0.0
    divergence_weight: float = 0.0
    regularizer: int = NO_REGULARIZER
    top_k: int = 0  # 0: all classes
    renormalize_top_k: bool = True
    divergence: int = NO_DIVERGENCE
    teachers: int = 0  # number of trailing logits held fixed
    label_smoothing: float = 0.0
    ignore_index: int = -100
    temperature: float = 1.0
    reduction: int = REDUCTIONS["mean"]
    mode: int = 0  # index into modes.MODES


WEIGHTS = ("ce_weight", "regularizer_weight", "divergence_weight")  # the leading fields


def pair_count(students: int, teachers: int) -> int:
    """Divergence terms of a row: one for each pair of students, or one to the teachers."""
    return 1 if teachers else students * (students - 1) // 2
