"""How far the fast and the exact mode are from the truth, in float32 ulps: a Markdown table.

`python -m benchmarks.accuracy [ROWS]` computes every row's terms and gradients on the CPU in both
modes, and once more with 200 bits. An ulp is the distance of two float32 numbers at the true value;
for a gradient, at the largest of the row's, since single classes may cancel to anything.
"""

import math
import random
import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from mpmath import mp, mpf

import churn_kernels as ck

mp.prec = 200
Row = list[float]


class Truth(NamedTuple):
    """What a pair of rows comes down to."""

    cross_entropy: mpf
    entropy: mpf
    divergence: mpf
    gradient: list[mpf]  # of the loss below, by the first row


def float32(x: float) -> float:
    return torch.tensor(x).item()


def kinds(draw: random.Random) -> dict[str, Callable[[int], tuple[Row, Row]]]:
    """Pairs of rows of so many classes, by what is hard about them."""

    def normal(scale: float, classes: int) -> Row:
        return [draw.gauss(0.0, scale) for _ in range(classes)]

    def near(classes: int) -> tuple[Row, Row]:
        a = normal(3.0, classes)
        return a, [x + draw.gauss(0.0, 1e-3) for x in a]

    def shifted(classes: int) -> tuple[Row, Row]:
        return [x + 1e4 for x in normal(3.0, classes)], [x - 1e4 for x in normal(3.0, classes)]

    def peaked(classes: int) -> tuple[Row, Row]:
        a, b = normal(1.0, classes), normal(1.0, classes)
        a[0], b[-1] = 40.0, 60.0
        return a, b

    return {
        "random": lambda classes: (normal(3.0, classes), normal(3.0, classes)),
        "nearly equal models": near,
        "flat": lambda classes: (normal(1e-4, classes), normal(1e-4, classes)),
        "peaked": peaked,
        "far from 0": shifted,
        "wide": lambda classes: (normal(30.0, classes), normal(30.0, classes)),
    }


def truth(a: Row, b: Row, target: int) -> Truth:
    def softmax(z: Row) -> tuple[list[mpf], list[mpf]]:
        d = [mpf(x) - mpf(max(z)) for x in z]
        e = [mp.exp(x) for x in d]
        mass = mp.fsum(e)
        return [x / mass for x in e], [x - mp.log(mass) for x in d]

    p, log_p = softmax(a)
    q, log_q = softmax(b)
    entropy = -mp.fsum(x * y for x, y in zip(p, log_p, strict=True))
    apart = [x - y for x, y in zip(log_p, log_q, strict=True)]
    mean = mp.fsum(x * d for x, d in zip(p, apart, strict=True))
    divergence = mean - mp.fsum(x * d for x, d in zip(q, apart, strict=True))
    gradient = [
        mpf("0.9") * (p[c] - (c == target))
        - mpf("0.1") * p[c] * (log_p[c] + entropy)
        + p[c] * (apart[c] - mean)
        + p[c]
        - q[c]
        for c in range(len(a))
    ]
    return Truth(-log_p[target], entropy, divergence, gradient)


def ulps(got: float, want: mpf, at: mpf) -> float:
    spacing = 2.0 ** (max(math.frexp(float(abs(at)))[1], -125) - 24)
    return float(abs(mpf(got) - want)) / spacing


def errors(a: Row, b: Row, target: int, want: Truth, mode: str) -> Iterator[tuple[str, float]]:
    logits = [torch.tensor([z]).requires_grad_() for z in (a, b)]
    label = torch.tensor([target])
    options = {"alpha": 0.1, "beta": 1.0, "mode": mode}
    terms = ck.codistillation_terms(logits, label, mode=mode)
    yield "cross entropy", ulps(terms.cross_entropy[0, 0].item(), want[0], want[0])
    yield "entropy", ulps(terms.regularizer[0, 0].item(), want[1], want[1])
    yield "symmetric KL", ulps(terms.divergence[0, 0].item(), want[2], want[2])
    loss = ck.codistillation_loss(logits, label, **options)
    (gradient,) = torch.autograd.grad(loss, logits[0])
    largest = max(map(abs, want.gradient))
    for got, exact in zip(gradient[0].tolist(), want.gradient, strict=True):
        yield "gradient", ulps(got, exact, largest)


def main(rows: int = 1000) -> None:
    draw = random.Random(1)
    makers = kinds(draw)
    found: dict[tuple[str, str, str], list[float]] = {}
    for number in range(rows):
        kind = list(makers)[number % len(makers)]
        classes = draw.choice([2, 10, 37, 100, 300])
        a, b = ([float32(x) for x in z] for z in makers[kind](classes))
        target = draw.randrange(classes)
        want = truth(a, b, target)
        for mode in ("fast", "exact"):
            for term, error in errors(a, b, target, want, mode):
                found.setdefault((term, kind, mode), []).append(error)
    print("| term | rows | fast: largest | mean | exact: largest | mean |")
    print("|---|---|---:|---:|---:|---:|")
    for term in ("cross entropy", "entropy", "symmetric KL", "gradient"):
        for kind in makers:
            cells = [f"| {term} | {kind} "]
            for mode in ("fast", "exact"):
                values = found[term, kind, mode]
                cells.append(f"| {max(values):.3g} | {sum(values) / len(values):.3g} ")
            print("".join(cells) + "|")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
