"""Order-independent sums of float32 numbers: exact, and rounded once.

A float32 is an integer times 2^-149, and so is a sum of them. `exact_sum` adds the integers in
an accumulator as wide as the range of float32 (csrc/rows/superaccumulator.h, the small
superaccumulator of Neal 2015, "Fast exact summation using small and large superaccumulators"), and
rounds at the end. Integer addition is associative: no bit of the result depends on the order of the
numbers, threads, programs, ranks, strides or the device.

A sum is NaN if the numbers include NaN, or infinities of both signs; always 0x7fc00000 in
float32. Otherwise it is the infinity, if there is one. A sum of 0 is +0. Intermediate overflow is
harmless; the result overflows only if the sum does. Subnormal numbers count, even if the process or
the GPU flushes them to zero elsewhere.
"""

import struct
import zlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from churn_kernels import _backend, _checks
from churn_kernels._constants import CONSTANTS
from churn_kernels._ops import BUILD_COMMAND, OpSet
from churn_kernels._placements import is_placed, replicated, summands

EXACT_SPEC: int | None = CONSTANTS and CONSTANTS.kExactSpec
"""Version of the bits of exact sums: equal versions give equal bits on every machine and backend.

None if the compiled library, which defines it, was not built.
"""


def exact_sum(x: Tensor) -> Tensor:
    """The exact sum of all elements, rounded once to float32: round(sum_i x_i).

    Args:
        x: float32, float16 or bfloat16, of any shape, strides and number of elements, on the CPU or
            a GPU. Non-contiguous tensors are copied first, on the CPU also those that are not
            float32. For a DTensor, sharded or replicated, the whole tensor is summed, with an
            all-reduce of 96 bytes.
    Returns: float32 scalar () on x's device, in the units of x, replicated for a DTensor; +0 for no
        elements. NaN, infinities and zeros as described in the module. Does not wait for a GPU.
    Gradient: the upstream gradient, for every element, in x's dtype. Supports derivatives of any
        order, torch.compile(fullgraph=True) and torch.func.
    Raises: TypeError for another dtype or type; RuntimeError if the library is missing, or on a GPU
        a requirement of the Triton kernels.
    Source: Neal, 2015, "Fast exact summation using small and large superaccumulators".
    """
    x = _checks.summand("x", x)
    if is_placed(x):
        local, total = summands(x)
        return replicated(sum_across(local, total), x)
    return sum_across(x, _identity)


def sum_across(x: Tensor, combine: Callable[[Tensor], Tensor]) -> Tensor:
    """`exact_sum` with `combine` applied to x's words, (12,) int64; x is checked."""
    ops = _backend.exact_ops(x)
    if _needs_autograd(x):
        return _ExactSum.apply(ops, combine, x)
    return ops.exact_round(combine(ops.exact_words(x)))


def _needs_autograd(x: Tensor) -> bool:
    """Whether a derivative, or one sum per example, may be requested."""
    return (
        (torch.is_grad_enabled() and x.requires_grad)
        or torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )


def _identity(words: Tensor) -> Tensor:
    return words


class _ExactSum(Function):
    """The sum; its gradient is the upstream gradient for every element."""

    @staticmethod
    def forward(ops: OpSet, combine: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return ops.exact_round(combine(ops.exact_words(x)))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.ops, ctx.combine, x = inputs
        ctx.shape, ctx.dtype = x.shape, x.dtype

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[None, None, Tensor]:
        return None, None, upstream.to(ctx.dtype).expand(ctx.shape)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Tensor, int]:
        ops, combine, x = inputs
        rows = x.unbind(in_dims[2])
        if not rows:  # an empty result that still depends on x in the graph
            return _ExactSum.apply(ops, combine, x.sum(in_dims[2])).expand(0), 0
        return torch.stack([_ExactSum.apply(ops, combine, row) for row in rows]), 0


# Words are accumulated on their tensors' device until the value is needed. Normalised words of this
# many tensors and elements may be added before a 64-bit lane overflows.
_MOST_TENSORS = 2**31 - 1
_MOST_ELEMENTS = 2**41

_MAGIC = b"CKXS"
_TOTAL_BYTES = 48  # 383 bits and a sign: 2^106 times the largest float32
_HEAD = struct.Struct(f"<4sI{_TOTAL_BYTES}s3Q")
_CHECKSUM = struct.Struct("<I")
_UNIT = 2**149


class _DeviceSum:
    """Words on one device, and how many tensors and elements they hold."""

    def __init__(self, words: Tensor, tensors: int, elements: int) -> None:
        self.words, self.tensors, self.elements = words, tensors, elements


def value_of(words: Tensor) -> float:
    """The sum of the words, rounded once to float64; synchronises with a GPU."""
    total = ExactSum()
    total._add_words(words, 1, 0)
    return total.value()


class ExactSum:
    """A running exact sum of float32 numbers that can be added to, merged, stored and compared.

    It holds the unrounded sum of everything added, independent of the order, and of the calls,
    processes and devices that added it:

        total = ExactSum().add(a).add(b)
        total == ExactSum().add(b).merge(ExactSum().add(a))

    Two sums are equal if their exact values and their counts of NaN, +inf and -inf are equal.
    `copy`, `deepcopy` and `pickle` preserve these. An ExactSum is mutable, so it is not hashable.
    It does not take part in autograd.

    Raises: RuntimeError if the compiled library is missing.
    """

    def __init__(self) -> None:
        if EXACT_SPEC is None:
            raise RuntimeError(
                "ExactSum needs the compiled library, which is missing; "
                f"build it with `{BUILD_COMMAND}`"
            )
        self._total = 0  # in units of 2^-149
        self._specials: tuple[int, ...] = (0, 0, 0)  # NaN, +inf, -inf
        self._device_sums: dict[torch.device, _DeviceSum] = {}

    def add(self, x: Tensor) -> "ExactSum":
        """Add every element of a tensor.

        Args:
            x: as in `exact_sum`, for a DTensor the whole tensor. A GPU sums it on its
                current stream; the host synchronises only once in 2^41 elements.
        Returns: this sum.
        Raises: as `exact_sum`.
        """
        if isinstance(x, ExactSum):
            raise TypeError("x must be a tensor, got an ExactSum; add sums with merge()")
        x = _checks.summand("x", x).detach()
        local, total = summands(x) if is_placed(x) else (x, _identity)
        self._add_words(total(_backend.exact_ops(local).exact_words(local)), 1, x.numel())
        return self

    def merge(self, other: "ExactSum") -> "ExactSum":
        """Add another sum, which stays unchanged. Synchronises with a GPU that holds part of it.

        Args:
            other: an ExactSum, possibly this one.
        Returns: this sum.
        Raises: TypeError for anything else.
        """
        if not isinstance(other, ExactSum):
            raise TypeError(
                f"other must be an ExactSum, got {type(other).__name__}; add tensors with add()"
            )
        total, specials = other._collect()
        self._add_total(total, specials)
        return self

    def value(self) -> float:
        """The sum, rounded once to float64; synchronises with a GPU that holds part of it."""
        total, (nans, plus, minus) = self._collect()
        if nans or (plus and minus):
            return float("nan")
        if plus or minus:
            return float("inf") if plus else -float("inf")
        return total / _UNIT  # Python divides integers with one rounding

    def to_bytes(self) -> bytes:
        """The sum as 84 bytes, the same for equal sums on every machine.

        Little-endian: b"CKXS", EXACT_SPEC (uint32), the sum in units of 2^-149 (384 bits, two's
        complement), the counts of NaN, +inf and -inf (uint64 each), CRC-32 of all preceding bytes.
        """
        total, specials = self._collect()
        packed = total.to_bytes(_TOTAL_BYTES, "little", signed=True)
        head = _HEAD.pack(_MAGIC, EXACT_SPEC, packed, *specials)
        return head + _CHECKSUM.pack(zlib.crc32(head))

    @classmethod
    def from_bytes(cls, data: bytes) -> "ExactSum":
        """The sum that `to_bytes` wrote.

        Args:
            data: bytes or bytearray.
        Raises: TypeError for another type; ValueError for other or corrupt bytes, and for
            those of a later EXACT_SPEC; earlier versions are read unchanged.
        """
        if not isinstance(data, bytes | bytearray):
            raise TypeError(
                f"data must be bytes, got {type(data).__name__}; pass what to_bytes() returned"
            )
        wants = "data must be what ExactSum.to_bytes() returned"
        size = _HEAD.size + _CHECKSUM.size
        if data[: len(_MAGIC)] != _MAGIC:
            raise ValueError(f"{wants}, which begins with {_MAGIC!r}; got {bytes(data[:4])!r}")
        if len(data) != size:
            raise ValueError(f"{wants}, {size} bytes; got {len(data)}: was it truncated or joined?")
        _, spec, packed, *specials = _HEAD.unpack_from(data)
        if _CHECKSUM.unpack_from(data, _HEAD.size) != (zlib.crc32(data[: _HEAD.size]),):
            raise ValueError(f"{wants}; its checksum is wrong: the data is corrupt")
        result = cls()
        if not 1 <= spec <= EXACT_SPEC:
            raise ValueError(
                f"{wants} under EXACT_SPEC 1 to {EXACT_SPEC}, got {spec}; "
                f"read it with the version of churn_kernels that wrote it"
            )
        result._add_total(int.from_bytes(packed, "little", signed=True), tuple(specials))
        return result

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ExactSum):
            return NotImplemented
        return self._collect() == other._collect()

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"ExactSum(value={self.value()!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self).from_bytes, (self.to_bytes(),)

    def _add_words(self, words: Tensor, tensors: int, elements: int) -> None:
        """Add words on their device."""
        sums = self._device_sums.get(words.device)
        if sums is None:
            self._device_sums[words.device] = _DeviceSum(words, tensors, elements)
            return
        sums.tensors += tensors
        sums.elements += elements
        if sums.tensors > _MOST_TENSORS or sums.elements > _MOST_ELEMENTS:
            self._collect()
            self._device_sums[words.device] = _DeviceSum(words, tensors, elements)
        else:
            # Not in place: tensors made in inference mode cannot be modified.
            sums.words = sums.words + words

    def _add_total(self, total: int, specials: tuple[int, ...]) -> None:
        self._total += total
        self._specials = tuple(map(sum, zip(self._specials, specials, strict=True)))

    def _collect(self) -> tuple[int, tuple[int, ...]]:
        """The sum in units of 2^-149, and the specials, after moving all words to the host."""
        lanes = CONSTANTS.kSumLanes
        while self._device_sums:
            words = self._device_sums.popitem()[1].words.tolist()
            total = sum(lane << 32 * i for i, lane in enumerate(words[:lanes]))
            self._add_total(total, tuple(words[lanes:]))
        return self._total, self._specials
