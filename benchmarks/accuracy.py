"""Errors of the CPU kernel's terms and gradients, compared with eager PyTorch in float32.

`python -m benchmarks.accuracy [ROWS] [--kinds | --widths]` prints Markdown tables of mean errors in
float32 ulps: every term and its gradients, over several kinds of difficult rows, of 2 to 131072
classes.
The true values are computed with 64 bits of mantissa (NumPy's longdouble on x86), in forms without
cancellation. An ulp is the distance of two float32 numbers at the true value; for a gradient, at
the row's largest gradient, or at 2^-24 if that is smaller, because single classes and whole rows
may cancel to anything. An ulp is at least the contribution of a float32 exponential below the
smallest normal number to the row, because the kernels flush it to 0.

A kind's error is the geometric mean over the numbers of classes, each counted as at least one
ulp, which two roundings may cost. A kind exceeds its limit if its error is above `LIMITS` times
that of eager PyTorch, to two decimal places; then the exit status is 1.
"""

import argparse
import math
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

import churn_kernels as ck
from benchmarks.truth import (
    TOP_K,
    Truth,
    Wide,
    true_cross_entropy,
    true_distillation,
    true_entropy,
    true_l1,
    true_smoothed,
    true_symmetric_kl,
    true_tempered,
    true_top_k_entropy,
    true_uniform_skl,
    wide,
)

CLASSES = (2, 10, 100, 1000, 8142, 131072)
ELEMENTS = 2**18  # maximum number of logits per kind and number of classes
# The largest mean error, as a multiple of eager PyTorch's.
LIMITS = {"fast": 2.0, "exact": 1.0}
ROUNDING = 1.0  # ulp
SMALLEST_GRADIENT = 2.0**-24
LOWEST = torch.finfo(torch.float32).min

# Rows ---------------------------------------------------------------------------------------------


def kinds(g: torch.Generator) -> dict[str, Callable[[int, int], tuple[Tensor, Tensor]]]:
    """Generators of pairs of (rows, classes) logits, by kind."""

    def normal(rows: int, classes: int, scale: float) -> Tensor:
        return scale * torch.randn(rows, classes, generator=g)

    def spread(scale: float) -> Callable[[int, int], tuple[Tensor, Tensor]]:
        return lambda rows, classes: (normal(rows, classes, scale), normal(rows, classes, scale))

    def near(relative: float) -> Callable[[int, int], tuple[Tensor, Tensor]]:
        def make(rows: int, classes: int) -> tuple[Tensor, Tensor]:
            a = normal(rows, classes, 3.0)
            return a, a * (1.0 + normal(rows, classes, relative))

        return make

    def one_hot(scale: float) -> Callable[[int, int], tuple[Tensor, Tensor]]:
        def make(rows: int, classes: int) -> tuple[Tensor, Tensor]:
            a, b = torch.zeros(rows, classes), torch.zeros(rows, classes)
            for z in (a, b):
                z[torch.arange(rows), torch.randint(classes, (rows,), generator=g)] = scale
            return a, b

        return make

    def peaked(rows: int, classes: int) -> tuple[Tensor, Tensor]:
        a, b = normal(rows, classes, 1.0), normal(rows, classes, 1.0)
        a[:, 0], b[:, -1] = 40.0, 60.0
        return a, b

    def sure(rows: int, classes: int) -> tuple[Tensor, Tensor]:
        a, b = normal(rows, classes, 1.0), normal(rows, classes, 1.0)
        a[:, 0], b[:, 0] = 20.0, 22.0
        return a, b

    def tied(rows: int, classes: int) -> tuple[Tensor, Tensor]:
        a, b = normal(rows, classes, 3.0), normal(rows, classes, 3.0)
        for z in (a, b):
            z[:, -1] = z.max(1).values
        return a, b

    def shifted(rows: int, classes: int) -> tuple[Tensor, Tensor]:
        return normal(rows, classes, 3.0) + 1e4, normal(rows, classes, 3.0) - 1e4

    def offset(rows: int, classes: int) -> tuple[Tensor, Tensor]:
        return normal(rows, classes, 3.0), normal(rows, classes, 3.0) + 1e6

    def equal(rows: int, classes: int) -> tuple[Tensor, Tensor]:
        a = normal(rows, classes, 3.0)
        return a, a.clone()

    def masked(value: float, *models: int) -> Callable[[int, int], tuple[Tensor, Tensor]]:
        def make(rows: int, classes: int) -> tuple[Tensor, Tensor]:
            pair = normal(rows, classes, 3.0), normal(rows, classes, 3.0)
            for model in models:
                pair[model][:, 1 : 1 + classes // 3 + (classes == 2)] = value
            return pair

        return make

    return {
        "random": spread(3.0),
        "apart by 1e-3": near(1e-3),
        "apart by 1e-4": near(1e-4),
        "apart by 1e-5": near(1e-5),
        "equal models": equal,
        "two tied for the largest": tied,
        "level": lambda rows, classes: (torch.zeros(rows, classes), torch.ones(rows, classes)),
        "flat, 1e-4": spread(1e-4),
        "flat, 1e-3": spread(1e-3),
        "peaked": peaked,
        "both sure": sure,
        "far from 0": shifted,
        "one at 1e6": offset,
        "spread 1": spread(1.0),
        "spread 30": spread(30.0),
        "spread 1e3": spread(1e3),
        "spread 1e6": spread(1e6),
        "spread 1e9": spread(1e9),
        "one-hot, 1e4": one_hot(1e4),
        "one-hot, 1e9": one_hot(1e9),
        "masked by -1e4": masked(-1e4, 0, 1),
        "masked by the lowest": masked(LOWEST, 0, 1),
        "masked in one, -1e4": masked(-1e4, 0),
        "masked in one, -1e30": masked(-1e30, 0),
        "masked in one, the lowest": masked(LOWEST, 0),
        "masked in the other, -1e4": masked(-1e4, 1),
        "masked in the other, the lowest": masked(LOWEST, 1),
    }


# Ours and eager's ---------------------------------------------------------------------------------


def eager_entropy(a: Tensor, b: Tensor, target: Tensor) -> Tensor:
    return -(a.softmax(1) * a.log_softmax(1)).sum(1)


def eager_top_k_entropy(a: Tensor, b: Tensor, target: Tensor) -> Tensor:
    return eager_entropy(a.topk(min(TOP_K, a.shape[1])).values, b, target)


def eager_uniform_skl(a: Tensor, b: Tensor, target: Tensor) -> Tensor:
    u = 1 / a.shape[1]
    return ((a.softmax(1) - u) * (a.log_softmax(1) - np.log(u))).sum(1)


def eager_symmetric_kl(a: Tensor, b: Tensor, target: Tensor) -> Tensor:
    return ((a.softmax(1) - b.softmax(1)) * (a.log_softmax(1) - b.log_softmax(1))).sum(1)


def eager_distillation(a: Tensor, b: Tensor, target: Tensor) -> Tensor:
    return F.kl_div(a.log_softmax(1), b.softmax(1), reduction="none").sum(1)


def ours_distillation(a: Tensor, b: Tensor, target: Tensor, mode: str) -> Tensor:
    return ck.distillation_loss(a, b, None, alpha=1.0, reduction="none", mode=mode)


def ours_divergence(a: Tensor, b: Tensor, mode: str, **options: object) -> Tensor:
    return ck.codistillation_terms([a, b], mode=mode, **options).divergence[:, 0]


class Term(NamedTuple):
    """One term of the losses: each function returns its rows."""

    name: str
    ours: Callable[[Tensor, Tensor, Tensor, str], Tensor]
    eager: Callable[[Tensor, Tensor, Tensor], Tensor]
    truth: Callable[[Tensor, Tensor, Tensor], Truth]
    symmetric: bool = False  # the second model's gradient is measured, too


TERMS = (
    Term(
        "cross entropy",
        lambda a, b, y, mode: ck.regularized_cross_entropy(a, y, reduction="none", mode=mode),
        lambda a, b, y: F.cross_entropy(a, y, reduction="none"),
        true_cross_entropy,
    ),
    Term(
        "label smoothing",
        lambda a, b, y, mode: ck.regularized_cross_entropy(
            a, y, label_smoothing=0.1, reduction="none", mode=mode
        ),
        lambda a, b, y: F.cross_entropy(a, y, label_smoothing=0.1, reduction="none"),
        true_smoothed,
    ),
    Term(
        "entropy",
        lambda a, b, y, mode: ck.softmax_entropy(a, reduction="none", mode=mode),
        eager_entropy,
        true_entropy,
    ),
    Term(
        "top-k entropy",
        lambda a, b, y, mode: ck.softmax_entropy(
            a, top_k=min(TOP_K, a.shape[1]), reduction="none", mode=mode
        ),
        eager_top_k_entropy,
        true_top_k_entropy,
    ),
    Term(
        "SKL to uniform",
        lambda a, b, y, mode: ck.uniform_skl(a, reduction="none", mode=mode),
        eager_uniform_skl,
        true_uniform_skl,
    ),
    Term(
        "symmetric KL",
        lambda a, b, y, mode: ck.symmetric_kl(a, b, reduction="none", mode=mode),
        eager_symmetric_kl,
        true_symmetric_kl,
        True,
    ),
    Term(
        "symmetric KL, T = 4",
        lambda a, b, y, mode: ours_divergence(a, b, mode, temperature=4.0),
        lambda a, b, y: eager_symmetric_kl(a / 4, b / 4, y),
        true_tempered,
        True,
    ),
    Term(
        "L1",
        lambda a, b, y, mode: ours_divergence(a, b, mode, divergence="l1"),
        lambda a, b, y: (a.softmax(1) - b.softmax(1)).abs().sum(1),
        true_l1,
        True,
    ),
    Term("KL to a teacher", ours_distillation, eager_distillation, true_distillation),
)


# Errors -------------------------------------------------------------------------------------------


def least_spacing(a: Tensor, b: Tensor) -> Wide:
    """The contribution of exponentials below the smallest normal number to a row, (N, 1)."""
    distance = torch.zeros(len(a), 1, dtype=torch.float64)
    for z in (a.double(), b.double()):
        distance = torch.maximum(distance, z.amax(1, keepdim=True) - z.amin(1, keepdim=True))
    return a.shape[1] * (1 + distance.numpy().astype(wide)) * wide(2) ** -126


def ulps(got: Tensor, want: Wide, at: Wide, least: Wide) -> Wide:
    """Error in float32 ulps at `at`; 0 if both are the same infinity."""
    found = got.detach().numpy()
    spacing = np.maximum(np.ldexp(wide(1), np.frexp(np.abs(at))[1] - 24), least)
    beyond = np.abs(want) >= wide(2) ** 128
    with np.errstate(invalid="ignore"):
        error = np.abs(found.astype(wide) - want) / spacing
    same = beyond & np.isinf(found) & (np.sign(found) == np.sign(want))
    return np.where(same, 0, np.where(np.isnan(error), np.inf, error))


def errors(
    rows: Callable[[Tensor, Tensor, Tensor], Tensor],
    a: Tensor,
    b: Tensor,
    y: Tensor,
    value: Wide,
    gradients: Sequence[Wide],
) -> tuple[float, float]:
    """Mean error of a term, and the mean over rows of the gradients' largest error."""
    leaves = [z.clone().requires_grad_() for z in (a, b)]
    found = rows(*leaves, y)
    least = least_spacing(a, b)
    worst = np.zeros(len(a))
    for gradient, want in zip(
        torch.autograd.grad(found.sum(), leaves[: len(gradients)]), gradients, strict=True
    ):
        largest = np.maximum(np.abs(want).max(1, keepdims=True), SMALLEST_GRADIENT)
        worst = np.maximum(worst, ulps(gradient, want, largest, least).max(1))
    worst = worst[~np.isnan(gradients[0]).any(1)]
    mean = float(worst.mean()) if len(worst) else 0.0
    return float(ulps(found, value, value, least[:, 0]).mean()), mean


class Errors(NamedTuple):
    """Mean errors of one term, or of its gradient, over rows of one kind."""

    term: str
    kind: str
    classes: int  # 0: all
    eager: float
    ours: dict[str, float]  # by mode

    def ratio(self, mode: str) -> float:
        """Our error over eager's, each at least `ROUNDING`, to two decimal places."""
        return round(max(self.ours[mode], ROUNDING) / max(self.eager, ROUNDING), 2)


def measure(most_rows: int, widths: Sequence[int] = CLASSES, seed: int = 1) -> Iterator[Errors]:
    """The errors of each term, kind and number of classes."""
    g = torch.Generator().manual_seed(seed)
    for kind, make in kinds(g).items():
        for classes in widths:
            rows = max(2, min(most_rows, ELEMENTS // classes))
            a, b = make(rows, classes)
            y = torch.randint(classes, (rows,), generator=g)
            for term in TERMS:
                value, gradient = term.truth(a, b, y)
                gradients = [gradient, *([term.truth(b, a, y)[1]] if term.symmetric else [])]
                eager = errors(term.eager, a, b, y, value, gradients)
                ours = {
                    mode: errors(
                        lambda a, b, y, t=term, m=mode: t.ours(a, b, y, m),
                        a,
                        b,
                        y,
                        value,
                        gradients,
                    )
                    for mode in LIMITS
                }
                for i, name in enumerate((term.name, f"gradient of {term.name}")):
                    by_mode = {mode: found[i] for mode, found in ours.items()}
                    yield Errors(name, kind, classes, eager[i], by_mode)


def over_widths(found: list[Errors]) -> list[Errors]:
    """Geometric means over the numbers of classes, for each term and kind."""

    def mean(values: list[float]) -> float:
        return math.exp(statistics.fmean(math.log(max(value, ROUNDING)) for value in values))

    groups: dict[tuple[str, str], list[Errors]] = {}
    for one in found:
        groups.setdefault((one.term, one.kind), []).append(one)
    return [
        Errors(
            *name,
            0,
            mean([one.eager for one in group]),
            {mode: mean([one.ours[mode] for one in group]) for mode in LIMITS},
        )
        for name, group in groups.items()
    ]


def print_table(found: list[Errors]) -> None:
    """Print one line for each, marked if it exceeds its limit."""
    print("| term | rows | C | eager | fast | exact |")
    print("|---|---|---:|---:|---:|---:|")
    for one in found:
        cells = [one.term, one.kind, one.classes or "all", f"{one.eager:.3g}"]
        for mode, limit in LIMITS.items():
            cells.append(f"{one.ours[mode]:.3g}{' !' if one.ratio(mode) > limit else ''}")
        print("|", " | ".join(map(str, cells)), "|")


def print_summary(found: list[Errors]) -> None:
    """Print each term's worst kind of rows, by mode."""
    print("| term | fast / eager, worst kind | exact / eager, worst kind |")
    print("|---|---|---|")
    for term in dict.fromkeys(one.term for one in found):
        cells = [term]
        for mode in LIMITS:
            worst = max((one for one in found if one.term == term), key=lambda x: x.ratio(mode))
            cells.append(f"{worst.ratio(mode):.2f} ({worst.kind})")
        print("|", " | ".join(cells), "|")


def main() -> int:
    """Measure and print; returns 1 if a kind exceeds its limit."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy")
    parser.add_argument("rows", nargs="?", type=int, default=256)
    parser.add_argument("--kinds", action="store_true", help="print every kind of rows")
    parser.add_argument(
        "--widths", action="store_true", help="print every kind and number of classes"
    )
    arguments = parser.parse_args()
    found = list(measure(arguments.rows))
    by_kind = over_widths(found)
    if arguments.kinds or arguments.widths:
        print_table(found if arguments.widths else by_kind)
        print()
    print_summary(by_kind)
    over = [
        (one, mode) for one in by_kind for mode, limit in LIMITS.items() if one.ratio(mode) > limit
    ]
    for one, mode in over:
        print(f"over the limit: {mode}, {one.term}, {one.kind}: {one.ratio(mode):.2f}")
    return int(bool(over))


if __name__ == "__main__":
    sys.exit(main())
