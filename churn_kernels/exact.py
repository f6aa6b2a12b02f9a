"""Sums of float32 numbers without an order: exact, and rounded once.

A float32 is an integer times 2^-149, and so is a sum of them. `exact_sum` adds the integers up, in
a number as wide as the range of float32 (csrc/rows/superaccumulator.h, the small superaccumulator
of Neal 2015, "Fast exact summation using small and large superaccumulators"), and rounds when all
are in. Integer addition is associative: neither the order of the numbers, nor threads, programs,
ranks, strides or the device can show in a bit.

A sum is NaN if NaN is among the numbers, or infinities of both signs; the one NaN 0x7fc00000 in
float32. Otherwise it is the infinity, if there is one. A sum of 0 is +0. What exceeds the range on
the way does no harm; the result exceeds it if the sum does. Subnormal numbers count, whether or not
the process or the GPU flushes them to zero elsewhere.
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
"""Numbers the bits of exact sums: where it is the same, so are they, on every machine and backend.

None where the compiled library, which knows it, was not built.
"""


def exact_sum(x: Tensor) -> Tensor:
    """The sum of all elements, exact, rounded once to float32: round(sum_i x_i).

    Args:
        x: float32, float16 or bfloat16, of any shape, strides and number of elements, on the CPU or
            a GPU. What is not contiguous is copied first, and so is, on the CPU, what is not
            float32. Of a DTensor, sharded or replicated, the whole tensor is summed: 96 bytes
            travel.
    Returns: float32 scalar () on x's device, in the units of x, replicated for a DTensor; +0 for no
        elements. NaN, infinities and zeros as the module says. Nothing waits for a GPU.
    Gradient: the upstream gradient, for every element, in x's dtype; derivatives of any order,
        torch.compile(fullgraph=True) and torch.func.
    Raises: TypeError for another dtype or no tensor; RuntimeError where the library, or on a GPU
        what the Triton kernels need, is missing.
    Source: Neal, 2015, "Fast exact summation using small and large superaccumulators".
    """
    x = _checks.summand("x", x)
    if is_placed(x):
        local, total = summands(x)
        return replicated(sum_across(local, total), x)
    return sum_across(x, _unchanged)


def sum_across(x: Tensor, combine: Callable[[Tensor], Tensor]) -> Tensor:
    """`exact_sum` of what `combine` makes of x's words, (12,) int64; x is checked."""
    ops = _backend.exact_ops(x)
    if _watched(x):
        return _ExactSum.apply(ops, combine, x)
    return ops.exact_round(combine(ops.exact_words(x)))


def _watched(x: Tensor) -> bool:
    """Whether someone may ask for a derivative, or for one sum of each example."""
    return (
        (torch.is_grad_enabled() and x.requires_grad)
        or torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )


def _unchanged(words: Tensor) -> Tensor:
    return words


class _ExactSum(Function):
    """The sum, whose gradient is the upstream's everywhere."""

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
        if not rows:  # of no examples: no sums, but on the graph of x
            return _ExactSum.apply(ops, combine, x.sum(in_dims[2])).expand(0), 0
        return torch.stack([_ExactSum.apply(ops, combine, row) for row in rows]), 0


# The words of a tensor stay where it is until someone asks: normalised words of so many tensors and
# elements may be added up before a lane of 64 bits is full.
_MOST_TENSORS = 2**31 - 1
_MOST_ELEMENTS = 2**41

_MAGIC = b"CKXS"
_TOTAL_BYTES = 48  # 383 bits and a sign: 2^106 times the largest float32
_HEAD = struct.Struct(f"<4sI{_TOTAL_BYTES}s3Q")
_CHECKSUM = struct.Struct("<I")
_UNIT = 2**149


class _Held:
    """Words on one device, and how many tensors and elements they hold."""

    def __init__(self, words: Tensor, tensors: int, elements: int) -> None:
        self.words, self.tensors, self.elements = words, tensors, elements


def value_of(words: Tensor) -> float:
    """The sum that words hold, rounded once to float64; waits for a GPU that still adds."""
    total = ExactSum()
    total._hold(words, 1, 0)
    return total.value()


class ExactSum:
    """A running exact sum of float32 numbers, to be added to, merged, stored and compared.

    The sum of everything that was added, without rounding, by whichever calls, processes and
    devices, in whichever order:

        total = ExactSum().add(a).add(b)
        total == ExactSum().add(b).merge(ExactSum().add(a))

    Two sums are equal if their exact values are and they have met NaN, +inf and -inf equally often.
    `copy`, `deepcopy` and `pickle` keep all of that. An ExactSum is changed in place, so it has no
    hash. It does not take part in autograd.

    Raises: RuntimeError where the compiled library is missing.
    """

    def __init__(self) -> None:
        if EXACT_SPEC is None:
            raise RuntimeError(
                "ExactSum needs the compiled library, which is missing; "
                f"build it with `{BUILD_COMMAND}`"
            )
        self._total = 0  # in units of 2^-149
        self._specials: tuple[int, ...] = (0, 0, 0)  # NaN, +inf, -inf
        self._held: dict[torch.device, _Held] = {}

    def add(self, x: Tensor) -> "ExactSum":
        """Add every element of a tensor.

        Args:
            x: as `exact_sum` takes it, of a DTensor the whole tensor. A GPU adds it up on its
                current stream; the host waits for it once in 2^41 elements only.
        Returns: this sum.
        Raises: as `exact_sum`.
        """
        if isinstance(x, ExactSum):
            raise TypeError("x must be a tensor, got an ExactSum; add sums with merge()")
        x = _checks.summand("x", x).detach()
        local, total = summands(x) if is_placed(x) else (x, _unchanged)
        self._hold(total(_backend.exact_ops(local).exact_words(local)), 1, x.numel())
        return self

    def merge(self, other: "ExactSum") -> "ExactSum":
        """Add what another sum holds; the other stays as it is. Waits for a GPU that still adds.

        Args:
            other: an ExactSum, be it this one.
        Returns: this sum.
        Raises: TypeError for anything else.
        """
        if not isinstance(other, ExactSum):
            raise TypeError(
                f"other must be an ExactSum, got {type(other).__name__}; add tensors with add()"
            )
        total, specials = other._collect()
        self._take(total, specials)
        return self

    def value(self) -> float:
        """The sum, rounded once to float64; waits for a GPU that still adds."""
        total, (nans, plus, minus) = self._collect()
        if nans or (plus and minus):
            return float("nan")
        if plus or minus:
            return float("inf") if plus else -float("inf")
        return total / _UNIT  # Python divides integers with one rounding

    def to_bytes(self) -> bytes:
        """The sum as 84 bytes, the same for equal sums on every machine.

        Little-endian: b"CKXS", EXACT_SPEC (uint32), the sum in units of 2^-149 (384 bits, two's
        complement), how often NaN, +inf and -inf were met (uint64 each), CRC-32 of all that.
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
        Raises: TypeError for another type; ValueError for other bytes, for damaged ones, and for
            those of a later EXACT_SPEC; sums of the earlier ones mean the same.
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
            raise ValueError(f"{wants}, {size} bytes; got {len(data)}: was it cut or joined?")
        _, spec, packed, *specials = _HEAD.unpack_from(data)
        if _CHECKSUM.unpack_from(data, _HEAD.size) != (zlib.crc32(data[: _HEAD.size]),):
            raise ValueError(f"{wants}; its checksum is wrong, so a byte of it has changed")
        result = cls()
        if not 1 <= spec <= EXACT_SPEC:
            raise ValueError(
                f"{wants} under EXACT_SPEC 1 to {EXACT_SPEC}, got {spec}; "
                f"read it with the version of churn_kernels that wrote it"
            )
        result._take(int.from_bytes(packed, "little", signed=True), tuple(specials))
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

    def _hold(self, words: Tensor, tensors: int, elements: int) -> None:
        """Add words where they are."""
        held = self._held.get(words.device)
        if held is None:
            self._held[words.device] = _Held(words, tensors, elements)
            return
        held.tensors += tensors
        held.elements += elements
        if held.tensors > _MOST_TENSORS or held.elements > _MOST_ELEMENTS:
            self._collect()
            self._held[words.device] = _Held(words, tensors, elements)
        else:
            held.words = held.words + words  # made in inference mode they cannot be changed

    def _take(self, total: int, specials: tuple[int, ...]) -> None:
        self._total += total
        self._specials = tuple(map(sum, zip(self._specials, specials, strict=True)))

    def _collect(self) -> tuple[int, tuple[int, ...]]:
        """The sum in units of 2^-149, and the specials; no device holds any of it afterwards."""
        lanes = CONSTANTS.kSumLanes
        while self._held:
            words = self._held.popitem()[1].words.tolist()
            total = sum(lane << 32 * i for i, lane in enumerate(words[:lanes]))
            self._take(total, tuple(words[lanes:]))
        return self._total, self._specials
