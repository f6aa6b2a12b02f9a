"""A backend's ops against the float64 reference: named option sets, inputs, and the comparison."""

import math
import zlib

import torch
from tolerances import gradient_error_bound, loss_error_bound

from churn_kernels import _autograd, _backend, modes, reference
from churn_kernels._options import LossOptions

INF = float("inf")
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]

PLAIN = LossOptions(0.9, 0.1, 1.5, regularizer=1, divergence=1)
# Every option at least once, by the name of what it adds to the plain loss.
OPTIONS = {
    "plain": PLAIN,
    "sum": PLAIN._replace(reduction=2),
    "per_row": PLAIN._replace(reduction=0),
    "terms": PLAIN._replace(reduction=3),
    "terms_without_weights": PLAIN._replace(reduction=3, ce_weight=0.0, regularizer_weight=0.0),
    "uniform_skl": PLAIN._replace(regularizer=2, regularizer_weight=-0.2),
    "no_regularizer": PLAIN._replace(regularizer=0),
    "no_divergence": PLAIN._replace(divergence=0),
    "divergence_weight_0": PLAIN._replace(divergence_weight=0.0),
    "ce_divergence": PLAIN._replace(divergence=2),
    "l1_divergence": PLAIN._replace(divergence=3),
    "temperature": PLAIN._replace(temperature=2.5),
    "temperature_ce": PLAIN._replace(temperature=0.7, divergence=2),
    "temperature_l1": PLAIN._replace(temperature=3.0, divergence=3, reduction=0),
    "label_smoothing": PLAIN._replace(label_smoothing=0.1),
    "ignore_index": PLAIN._replace(ignore_index=0),
    "top_k": PLAIN._replace(top_k=3),
    "top_k_unnormalised": PLAIN._replace(top_k=3, renormalize_top_k=False),
    "top_k_uniform": PLAIN._replace(top_k=2, regularizer=2),
    "top_k_uniform_unnormalised": PLAIN._replace(
        top_k=2, regularizer=2, renormalize_top_k=False, reduction=0
    ),
    "everything": LossOptions(
        0.7, 0.3, 2.0, 2, 4, False, 3, 0, label_smoothing=0.2, ignore_index=1, temperature=1.5
    ),
}


EXACT_DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EXACT = {name: options._replace(mode=modes.EXACT) for name, options in OPTIONS.items()}

# What `special_logits` makes.
KINDS = ["shifted", "masked", "masked_in_one", "one_hot", "sure", "equal", "tied", "huge"]
KINDS += ["near", "far_in_one", "farthest_in_one"]
# What it makes for comparisons byte by byte: rows without a meaning, and beyond the reference.
EXACT_KINDS = [*KINDS, "broken", "far"]


def seeded(*name: object) -> torch.Generator:
    """A generator of its own for each named case, the same on every run."""
    return torch.Generator().manual_seed(zlib.crc32(repr(name).encode()))


def random_logits(generator, models, rows, classes, dtype=torch.float32, scale=3.0):
    return [
        (torch.randn(rows, classes, generator=generator, dtype=torch.float64) * scale).to(dtype)
        for _ in range(models)
    ]


def random_target(generator, rows, classes):
    return torch.randint(classes, (rows,), generator=generator)


def device_of(backend):
    """Where the backend's tensors live; Triton's on the CPU where only its interpreter can run."""
    return "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"


def kernel(logits, target, class_weight, options, upstream=None, backend="cpu"):
    """Loss, terms and gradients of the students from the backend's ops."""
    device = device_of(backend)
    # The very strides and bytes.
    leaves = [z.detach().to(device).requires_grad_() for z in logits]
    target, class_weight, upstream = (
        None if x is None else x.to(device) for x in (target, class_weight, upstream)
    )
    ops = _backend._OPS[backend]
    loss, terms = _autograd.evaluate(ops, leaves, target, class_weight, options, True)
    alone, _ = _autograd.evaluate(ops, leaves, target, class_weight, options, False)
    torch.testing.assert_close(alone, loss, rtol=1e-6, atol=1e-6, equal_nan=True)
    upstream = torch.ones_like(loss) if upstream is None else upstream.to(loss.dtype)
    students = leaves[: len(leaves) - options.teachers]
    gradients = torch.autograd.grad(loss, students, upstream)
    return loss.detach().cpu(), terms.cpu(), [g.cpu() for g in gradients]


def expected(logits, target, class_weight, options, upstream=None):
    """The same from the reference, in float64 from the very values the kernel sees."""
    leaves = [z.detach().double().requires_grad_() for z in logits]
    weight = None if class_weight is None else class_weight.double()
    loss, terms = reference.loss(leaves, target, weight, options)
    students = leaves[: len(leaves) - options.teachers]
    upstream = torch.ones_like(loss) if upstream is None else upstream.double()
    gradients = torch.autograd.grad(loss, students, upstream, materialize_grads=True)
    return loss.detach(), terms, gradients


def assert_close(got, want, bound):
    """Equal where not finite, and within `bound` of `want` elsewhere."""
    got, want = got.double(), want.double()
    finite = want.isfinite()
    torch.testing.assert_close(got[~finite], want[~finite], rtol=0, atol=0, equal_nan=True)
    error = (got - want)[finite].abs()
    assert bool((error <= bound[finite]).all()), f"error {error.max():.3g} is above the bound"


def check(logits, target, options, class_weight=None, upstream=None, backend="cpu"):
    before = [z.clone() for z in logits]
    dtype = logits[0].dtype
    loss, terms, gradients = kernel(logits, target, class_weight, options, upstream, backend)
    want_loss, want_terms, want_gradients = expected(
        logits, target, class_weight, options, upstream
    )
    heaviest = max(options[:3]) * len(logits)
    if class_weight is not None:
        heaviest *= max(1.0, class_weight.max().item())
    largest = 1.0 if upstream is None or upstream.numel() == 0 else upstream.abs().max().item()
    rows = len(target) if options.reduction == 2 and target is not None else 1
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_close(loss, want_loss, loss_error_bound(want_loss, dtype, logits, 1 + heaviest * rows))
    assert_close(terms, want_terms, loss_error_bound(want_terms, dtype, logits))
    weight = largest * (1 + heaviest)
    for gradient, want in zip(gradients, want_gradients, strict=True):
        assert gradient.dtype == dtype
        assert gradient.is_contiguous()
        assert_close(gradient, want, gradient_error_bound(want, dtype, logits, weight))
    for z, copy in zip(logits, before, strict=True):
        assert bytes_of(z) == bytes_of(copy), "an input was modified"


def bytes_of(tensor: torch.Tensor) -> bytes:
    if tensor.numel() == 0:
        return b""
    return tensor.detach().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()


def special_logits(kind, generator, models, dtype):
    logits = random_logits(generator, models, 4, 41, dtype)
    for k, z in enumerate(logits):
        if kind == "shifted":
            z += 1e4 if dtype in (torch.float32, torch.float64) else 128.0
        elif kind == "masked":
            z[:, 5:20] = -INF
        elif kind == "masked_in_one":
            z[2, 7 + k] = -INF
        elif kind == "one_hot":
            z[:] = -200.0
            z[:, 3 + k] = 200.0
        elif kind == "sure":  # all models of one class, but of the last row
            z[:, 5] = 30.0 + k
            z[3, 6 + k] = 60.0
        elif kind == "broken":  # NaN, +inf, no class at all: each in one model
            z[0, 3] = math.nan if k == 0 else z[0, 3]
            z[1, 5 + k] = INF if k == 0 else z[1, 5 + k]
            z[2] = -INF if k == models - 1 else z[2]
        elif kind == "far":  # a mask of another kind in each model, a mask and a number
            lowest = torch.finfo(dtype).min
            z[0, 3] = -INF if k == 0 else lowest
            z[1, 3] = lowest
            z[2, 3] = lowest if k == 0 else z[2, 3]
            z[3, 3] = -INF if k == 0 else -1e4
        elif kind == "near":  # models that are 1e-4 apart, or equal where the dtype has no room
            signs = torch.randint(2, z.shape, generator=generator) * 2 - 1
            z[:] = (logits[0].double() + 1e-4 * k * signs).to(dtype)
        elif kind == "far_in_one":
            z[:, 7 + k] = max(-1e30, torch.finfo(dtype).min)
        elif kind == "farthest_in_one":
            z[:, 5] = max(-1e38, torch.finfo(dtype).min) if k == 0 else z[:, 5]
        elif kind == "equal":
            z[:] = 0.5
        elif kind == "tied":
            z[:] = torch.randint(3, z.shape, generator=generator).to(dtype)
        elif kind == "huge":
            z *= 1e4 if dtype in (torch.float32, torch.float64) else 64.0
    return logits
