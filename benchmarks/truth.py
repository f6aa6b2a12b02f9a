"""Values and gradients of the terms with 64 bits of mantissa, in forms without cancellation.

NumPy's longdouble has 64 bits on x86. Each `true_` function takes two models' logits and the
target, and returns the term's values (N,) and its gradient for the first model (N, C).
"""

import numpy as np
import torch
from torch import Tensor

Wide = np.ndarray  # of longdouble
wide = np.longdouble
TOP_K = 10  # of `true_top_k_entropy`


class Softmax:
    """Softmax of rows, from the differences to the largest logit."""

    def __init__(self, z: Tensor, temperature: float = 1.0) -> None:
        self.z = z.numpy().astype(wide) / wide(temperature)
        d = self.z - self.z.max(1, keepdims=True)
        e = np.exp(d)
        first = e.argmax(1)[:, None]
        rest = e.copy()
        np.put_along_axis(rest, first, 0, 1)
        self.tail = rest.sum(1, keepdims=True)  # the mass minus the largest class's 1
        self.p = e / (1 + self.tail)
        self.log_p = d - np.log1p(self.tail)

    def centred(self, x: Wide) -> Wide:
        """x - E[x], computed relative to x at the largest class, for x not far from it."""
        top = np.take_along_axis(x, self.p.argmax(1)[:, None], 1)
        away = x - top
        return away - (self.p * away).sum(1, keepdims=True)


Truth = tuple[Wide, Wide]  # a term's values (N,), and its gradient for the first model (N, C)


def true_cross_entropy(a: Tensor, b: Tensor, target: Tensor) -> Truth:
    s = Softmax(a)
    label = target.numpy()[:, None]
    gradient = s.p.copy()
    rest = s.p.copy()
    np.put_along_axis(rest, label, 0, 1)
    np.put_along_axis(gradient, label, -rest.sum(1, keepdims=True), 1)
    return -np.take_along_axis(s.log_p, label, 1)[:, 0], gradient


def true_smoothed(a: Tensor, b: Tensor, target: Tensor) -> Truth:
    s = Softmax(a)
    hard, gradient = true_cross_entropy(a, b, target)
    eps = wide(0.1)
    soft = -s.log_p.mean(1)
    return (1 - eps) * hard + eps * soft, (1 - eps) * gradient + eps * (s.p - wide(1) / a.shape[1])


def true_entropy(a: Tensor, b: Tensor, target: Tensor) -> Truth:
    s = Softmax(a)
    return -(s.p * s.log_p).sum(1), -s.p * s.centred(s.z)


def true_top_k_entropy(a: Tensor, b: Tensor, target: Tensor) -> Truth:
    k = min(TOP_K, a.shape[1])
    top = torch.sort(a, dim=1, descending=True, stable=True).indices[:, :k]
    value, gradient = true_entropy(a.gather(1, top), b, target)
    whole = np.zeros(a.shape, wide)
    np.put_along_axis(whole, top.numpy(), gradient, 1)
    return value, whole


def true_uniform_skl(a: Tensor, b: Tensor, target: Tensor) -> Truth:
    s = Softmax(a)
    u = wide(1) / a.shape[1]
    x = s.z - s.z.mean(1, keepdims=True)
    return ((s.p - u) * x).sum(1), s.p * s.centred(s.z) + (s.p - u)


def differences(p: Softmax, q: Softmax) -> tuple[Wide, Wide]:
    """log p - log q and p - q, with the common part cancelled first."""
    first = p.p.argmax(1)[:, None]
    apart = (p.z - q.z) - np.take_along_axis(p.z - q.z, first, 1)
    # Its value at the first model's largest class follows from E_p[q / p] = 1.
    offset = np.log1p((p.p * np.expm1(-np.maximum(apart, -11000))).sum(1, keepdims=True))
    plain = p.log_p - q.log_p
    log_ratio = np.where(np.abs(plain) < 1, apart + offset, plain)
    near = np.clip(log_ratio, -1, 1)
    p_less_q = np.where(np.abs(log_ratio) < 1, -p.p * np.expm1(-near), p.p - q.p)
    return log_ratio, p_less_q


def true_symmetric_kl(a: Tensor, b: Tensor, target: Tensor, temperature: float = 1.0) -> Truth:
    p, q = Softmax(a, temperature), Softmax(b, temperature)
    log_ratio, p_less_q = differences(p, q)
    gradient = p.p * p.centred(p.z - q.z) + p_less_q
    return (p_less_q * log_ratio).sum(1), gradient / wide(temperature)


def true_tempered(a: Tensor, b: Tensor, target: Tensor) -> Truth:
    return true_symmetric_kl(a, b, target, 4.0)


def true_l1(a: Tensor, b: Tensor, target: Tensor) -> Truth:
    p, q = Softmax(a), Softmax(b)
    _, p_less_q = differences(p, q)
    gradient = p.p * p.centred(np.sign(p_less_q))
    # If two probabilities are all but equal, either sign is right: nothing is measured.
    tied = (p_less_q != 0) & (np.abs(p_less_q) < 2.0**-20 * np.maximum(p.p, q.p))
    return np.abs(p_less_q).sum(1), np.where(tied.any(1, keepdims=True), np.nan, gradient)


def true_distillation(a: Tensor, b: Tensor, target: Tensor) -> Truth:
    p, q = Softmax(a), Softmax(b)
    log_ratio, p_less_q = differences(p, q)
    bounded = np.clip(log_ratio, -1, 1)
    small = np.expm1(bounded) - bounded
    near = np.abs(bounded) < wide(0.05)  # expm1(x) - x would cancel here
    series = bounded**2 * (
        wide(1) / 2
        + bounded
        * (
            wide(1) / 6
            + bounded
            * (
                wide(1) / 24
                + bounded * (wide(1) / 120 + bounded * (wide(1) / 720 + bounded / 5040))
            )
        )
    )
    small = np.where(near, series, small)
    term = np.where(np.abs(log_ratio) < 1, q.p * small, p_less_q - q.p * log_ratio)
    return term.sum(1), p_less_q
