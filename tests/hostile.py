"""Arguments for the ops that no caller of the package passes: sound ones, with something changed.

Sizes are such that a call which is not refused is over soon: tensors are small, or have more
elements than any memory.
"""

import math
import random
from contextlib import suppress

import torch

from churn_kernels._options import LossOptions

INTEGERS = [-(2**63), -(2**31) - 1, -100, -1, 0, 1, 2, 3, 4, 5, 7, 63, 64, 65, 2**31 - 1, 2**31]
INTEGERS += [2**32, 2**32 + 1, 2**53 + 1, 2**62, 2**63 - 8, 2**63 - 1]
NUMBERS = [math.nan, math.inf, -math.inf, -1.0, -0.0, 0.0, 5e-324, 1e-30, 1e30, -1e30, 1e300]
SIZES = [0, 1, 2**48 + 1, 2**61, 2**63 - 1]
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
OTHER_DTYPES = [torch.int64, torch.int32, torch.uint8, torch.bool, torch.complex64]
REFUSALS = (RuntimeError, ValueError, IndexError, TypeError, OverflowError)


class Arguments:
    """Draws arguments, the same for the same seed."""

    def __init__(self, seed, *, small=False):
        self.rows, self.classes = [0, 1, 5], [1, 2, 17]
        if not small:
            self.rows, self.classes = [*self.rows, 40], [*self.classes, 300, 2100]
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)

    def chance(self, share):
        return self.random.random() < share

    def pick(self, choices):
        return self.random.choice(choices)

    def floats(self, *shape, dtype=torch.float32):
        return (3 * torch.randn(*shape, generator=self.generator)).to(dtype)

    def options(self, models, classes, *, exact=None):
        divergence = self.pick([0, 1, 2, 3, 4] if models > 1 else [0, 1, 2, 3])
        return LossOptions(
            self.pick([0.0, 1.0]),
            self.pick([0.0, 0.3, -0.2]),
            self.pick([0.0, 1.5]),
            regularizer=self.pick([0, 1, 2]),
            top_k=self.pick([0, 0, 1, (classes + 1) // 2, classes]),
            renormalize_top_k=self.chance(0.5),
            divergence=divergence,
            teachers=models - 1 if divergence == 4 else 0,
            label_smoothing=self.pick([0.0, 0.1]),
            ignore_index=self.pick([-100, 0]),
            temperature=self.pick([1.0, 2.5]),
            reduction=self.pick([0, 1, 2, 3]),
            mode=3 if exact or (exact is None and self.chance(0.4)) else self.pick([0, 1, 2]),
        )

    def logits(self, models, rows, classes, dtype):
        if self.chance(0.3):
            return [self.floats(models, rows, classes, dtype=dtype)]
        return [self.floats(rows, classes, dtype=dtype) for _ in range(models)]

    def inputs(self, *, exact=None, classes_of=lambda classes: classes):
        """(logits, target, class_weight, options) that fit each other."""
        models, classes = self.pick([1, 2, 2, 3]), self.pick(self.classes)
        rows = self.pick(self.rows)
        options = self.options(models, classes, exact=exact)
        dtype = self.pick([d for d in DTYPES if options.mode != 3 or d != torch.float64])
        everything = classes_of(classes)
        target = torch.randint(everything, (rows,), generator=self.generator)
        weight = torch.rand(everything, generator=self.generator)
        return (
            self.logits(models, rows, classes, dtype),
            target if self.chance(0.8) else None,
            weight if self.chance(0.3) else None,
            *options,
        )

    def changed(self, arguments):
        """The arguments, with one or two of them changed."""
        changed = list(arguments)
        for _ in range(self.pick([1, 1, 2])):
            place = self.random.randrange(len(changed))
            changed[place] = self.instead_of(changed[place])
        return changed

    def instead_of(self, value):
        if isinstance(value, list | tuple):
            return self.instead_of_list(list(value))
        if value is None or isinstance(value, torch.Tensor):
            return self.instead_of_tensor(value)
        if isinstance(value, bool):
            return not value
        if isinstance(value, float):
            return self.pick(NUMBERS)
        if isinstance(value, int):
            return self.pick(INTEGERS)
        return self.pick(["", "no such thing", "\0", "baseline" * 1000])

    def instead_of_list(self, values):
        kind = self.random.randrange(6)
        if kind == 0 or not values:
            return []
        if kind == 1:
            return values[:-1]
        if kind == 2:
            return values + values[:1]
        if kind == 3 and isinstance(values[0], torch.Tensor):
            return values * 70
        place = self.random.randrange(len(values))
        values[place] = self.instead_of(values[place])
        return values

    def instead_of_tensor(self, x):
        if x is None:
            return self.floats(self.pick([0, 1, 5]), dtype=self.pick(DTYPES + OTHER_DTYPES[:4]))
        if hasattr(x, "was_changed"):  # torch itself crashes on some of them
            return x
        with suppress(RuntimeError, IndexError):  # torch has no such tensor
            x = self.pick(CHANGES)(self, x)
        x.was_changed = True
        return x

    def filled(self, x):
        """Other values in all or one of the elements."""
        x = x.detach().clone()
        value = self.pick(NUMBERS if x.is_floating_point() else INTEGERS)
        place = ... if self.chance(0.5) else (self.random.randrange(x.shape[0]),)
        x[place] = value
        return x

    def of_huge_shape(self, x):
        sizes = [self.pick([size, *SIZES]) for size in x.shape]
        return x.flatten()[:1].view([1] * len(sizes)).expand(sizes)

    def overlapping(self, x):
        return x.as_strided(x.shape, [self.pick([0, 1, 2]) for _ in x.shape])

    def without_memory(self, x):
        x = x.detach().clone()
        x.untyped_storage().resize_(self.pick([0, x.untyped_storage().nbytes() // 2]))
        return x


CHANGES = [
    Arguments.filled,
    Arguments.filled,
    Arguments.filled,
    Arguments.of_huge_shape,
    Arguments.overlapping,
    Arguments.without_memory,
    lambda self, x: x.to(self.pick(DTYPES + OTHER_DTYPES)),
    lambda self, x: x[:-1],
    lambda self, x: x[..., :-1],
    lambda self, x: x.flatten(),
    lambda self, x: x.unsqueeze(0),
    lambda self, x: x.expand(2, *x.shape),
    lambda self, x: torch.cat([x, x], -1)[..., ::2],
    lambda self, x: x.transpose(0, -1).contiguous().transpose(0, -1),
    lambda self, x: torch.cat([x, x]),
    lambda self, x: x[:0],
    lambda self, x: x[0],
    lambda self, x: x.to("meta"),
    lambda self, x: x.to_sparse(),
    lambda self, x: x.to_mkldnn(),
    lambda self, x: torch._neg_view(x),
    lambda self, x: x.detach().clone().requires_grad_(),
]
