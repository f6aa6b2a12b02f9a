"""The ops on the Triton kernels: `triton_loss`, `triton_loss_backward`, `triton_scale_`.

They take and return what csrc/ops.cpp's `loss`, `loss_backward` and `scale_` do, but for the row
statistics, which are a record (fields, N), see `record`. No call waits for the GPU.
"""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language import target_info

from churn_kernels import _checks
from churn_kernels._C import constants
from churn_kernels._options import (
    DIVERGENCES,
    NO_REGULARIZER,
    REDUCTIONS,
    REGULARIZERS,
    ROW_TERMS,
    WANT_GRADIENTS,
    WANT_TERMS,
    LossOptions,
    pair_count,
)
from churn_kernels.modes import EXACT, INVARIANT
from churn_kernels.triton import batch, finish, kernels, superaccumulator
from churn_kernels.triton.plan import (
    MOST_REGISTERS,
    SHORT,
    SWEEP_WARPS,
    Plan,
    plan,
    widest_vector,
)
from churn_kernels.triton.spec import Spec, make_spec

SCALE_BLOCK = 4096
SCALE_PROGRAMS = 1024  # enough to fill any GPU, few enough to return early at no cost


class Logits(NamedTuple):
    """The models' logits as the kernels take them."""

    tensors: tuple[Tensor, ...]
    row_strides: tuple[int, ...]
    column_strides: tuple[int, ...]

    @property
    def strided(self) -> bool:
        """Whether a model's columns do not lie side by side."""
        return any(stride != 1 for stride in self.column_strides)


def unstack(logits: Sequence[Tensor]) -> list[Tensor]:
    """A matrix for each model, of a list of them or of one stacked tensor."""
    return list(logits[0].unbind(0)) if logits[0].dim() == 3 else list(logits)


def new_gradients(logits: Sequence[Tensor], teachers: int) -> list[Tensor]:
    """Uninitialised contiguous gradients in the structure of the logits."""
    if logits[0].dim() == 3:
        models, rows, classes = logits[0].shape
        return [logits[0].new_empty((models - teachers, rows, classes))]
    students = logits[: len(logits) - teachers]
    return [torch.empty_like(z, memory_format=torch.contiguous_format) for z in students]


def matrices(tensors: Sequence[Tensor]) -> Logits:
    """The tensors with their strides; that of a single column may be anything, and counts as 1."""
    classes = tensors[0].shape[1]
    return Logits(
        tuple(tensors),
        tuple(z.stride(0) for z in tensors),
        tuple(1 if classes == 1 else z.stride(1) for z in tensors),
    )


def alignment(logits: Logits, classes: int, invariant: bool, apart: int = 0) -> tuple[int, bool]:
    """(classes a load may take at once, whether rows are to be read from the vector before).

    With `invariant` it is a function of the number of classes alone. `apart`: numbers from one
    model's gradients to the next one's in one tensor, 0 where each has a tensor of its own.
    """
    if logits.strided:
        return 1, False
    size = logits.tensors[0].element_size()
    full = widest_vector(len(logits.tensors), size)
    if invariant:
        return math.gcd(classes, full), False
    starts = {apart % full, *(z.data_ptr() // size % full for z in logits.tensors)}
    strides = {stride % full for stride in (*logits.row_strides, classes)}
    if starts == {0} and strides == {0}:
        return full, False
    # A tensor of gradients begins at a multiple of a vector, and its rows follow each other.
    if starts == {0} and len(strides) == 1 and classes >= SHORT:
        return full, True
    return math.gcd(full, *starts, *strides), False


def as_planned(logits: Logits, vector: int) -> Logits:
    """The logits, copied where their rows do not begin at multiples of `vector` classes.

    Only the invariant mode asks for what its plan needs instead of planning for what is there.
    """
    step = vector * logits.tensors[0].element_size()

    def fits(z: Tensor, stride: int) -> bool:
        return z.data_ptr() % step == 0 and stride % vector == 0

    if all(map(fits, logits.tensors, logits.row_strides)):
        return logits
    return matrices([z.clone(memory_format=torch.contiguous_format) for z in logits.tensors])


@lru_cache(maxsize=512)
def cached_spec(
    options: LossOptions, tile: Plan, dtype: torch.dtype, models: int, **facts: Any
) -> Spec:
    """`make_spec`, once for each set of arguments."""
    return make_spec(options, tile, dtype, models, **facts)


def kind_of(options: LossOptions) -> LossOptions:
    """The options without the numbers that kernels take at run time: a ramp compiles nothing."""
    return options._replace(
        ce_weight=float(options.ce_weight != 0),
        regularizer_weight=float(options.regularizer_weight != 0),
        divergence_weight=float(options.divergence_weight != 0),
        top_k=int(options.top_k > 0),
        label_smoothing=float(options.label_smoothing != 0),
        temperature=float(options.temperature != 1) + 1,
        ignore_index=0,
        mode=options.mode if options.mode == EXACT else 0,
    )


def exact_places(options: LossOptions, classes: int) -> int:
    """Binary places of a sum over so many classes (csrc/rows/exact.h); 0 without exact mode."""
    return int(constants.places(classes)) if options.mode == EXACT else 0


def start(
    kernel: Any, grid: tuple[int, ...], warps: int, *arguments: Any, registers: int = 0
) -> None:
    """Launch on the current stream.

    a + b * c stays two roundings unless the kernel says fma. `registers`, of a thread, are a bound
    where the compiler takes one (0: none).
    """
    options = {"num_warps": warps, "num_stages": 1, "enable_fp_fusion": False}
    if registers and on_nvidia():
        options["maxnreg"] = registers
    kernel[grid](*arguments, **options)


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """A block whose current device is `device`."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


@cache
def on_nvidia() -> bool:
    """Whether kernels are compiled for an NVIDIA GPU."""
    return bool(target_info.is_cuda())


def is_plain(options: LossOptions, report: bool) -> bool:
    """Whether the options need no more registers than cross entropy, entropy and SKL do."""
    return (
        options.regularizer in (NO_REGULARIZER, REGULARIZERS["entropy"])
        and options.top_k == 0
        and options.label_smoothing == 0
        and options.temperature == 1
        and options.divergence in (0, DIVERGENCES["skl"], DIVERGENCES["ce"])
        and options.mode != EXACT
        and not report
    )


def is_bounded(dtype: torch.dtype, vector: int) -> bool:
    """Whether the compiler makes do with the registers of two programs, as the tables show."""
    return dtype == torch.float32 or (dtype == torch.bfloat16 and vector > 1)


def sweep_warps(options: LossOptions, models: int) -> int:
    """Half where the sums of many pairs, or exact ones of top k, want more registers."""
    exact = options.mode == EXACT
    many = models > (2 if exact else 3) or (exact and options.top_k > 0)
    return SWEEP_WARPS // 2 if many else SWEEP_WARPS


class Call:
    """The arguments that the kernels of one call share."""

    def __init__(
        self,
        logits: Sequence[Tensor],
        target: Tensor | None,
        class_weight: Tensor | None,
        options: LossOptions,
        report: bool,
    ) -> None:
        self.options = options
        self.models = unstack(logits)
        first = self.models[0]
        self.device = first.device
        self.rows, self.classes = first.shape
        self.dtype = torch.float64 if first.dtype == torch.float64 else torch.float32
        self.logits = matrices(self.models)
        invariant = options.mode == INVARIANT
        apart = self.rows * self.classes if logits[0].dim() == 3 else 0
        vector, shift = alignment(self.logits, self.classes, invariant, apart)
        if invariant and not self.logits.strided:
            self.logits = as_planned(self.logits, vector)
        plain = is_plain(options, report) and not self.logits.strided
        self.tile = plan(
            self.classes,
            len(self.models),
            first.element_size(),
            vector,
            shift,
            plain,
            plain and len(self.models) <= 2 and is_bounded(first.dtype, vector),
            sweep_warps(options, len(self.models)),
        )
        self.target = None if target is None else target.contiguous()
        self.class_weight = (
            None if class_weight is None else class_weight.to(self.dtype).contiguous()
        )
        # The dtype of a row's scalars.
        self.scalar = torch.float64 if options.mode == EXACT else self.dtype
        # Of what class weights add up to.
        self.weight = self.scalar if class_weight is None else torch.float64
        self.spec = cached_spec(
            kind_of(options),
            self.tile,
            first.dtype,
            len(self.models),
            has_target=target is not None,
            weighted=class_weight is not None,
            report=report,
            strided=self.logits.strided,
            places=exact_places(options, self.classes),
        )
        self.programs = triton.cdiv(self.rows, 1 if self.tile.wide else self.tile.height)
        self.counters = 0
        self.counts: Tensor | None = None

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """An uninitialised tensor, in the dtype of the loss unless another is named."""
        return torch.empty(shape, dtype=dtype or self.dtype, device=self.device)

    def guard(self) -> AbstractContextManager[Any]:
        """The device of the logits, where it is not the current one."""
        return on_device(self.device)

    def count(self, report: bool) -> None:
        """Count what "mean" and the report divide by, and the weights that smooth labels."""
        weighs = self.spec.smooths.value and self.spec.weighted.value
        if self.target is None or not (
            report or weighs or self.options.reduction == REDUCTIONS["mean"]
        ):
            return
        self.counters = min(batch.COUNTERS.value, triton.cdiv(self.rows, batch.COUNT_BLOCK.value))
        if self.spec.exact.value and self.spec.weighted.value:
            self.counters = 1
        self.counts = self.empty(3, batch.COUNTERS.value, dtype=self.weight)
        start(
            batch.count_kernel,
            (self.counters,),
            4,
            self.target,
            self.class_weight,
            self.counts,
            self.rows,
            self.classes,
            self.options.ignore_index,
            self.spec,
        )

    def weights(self) -> tuple[float, ...]:
        """The options that kernels take as numbers."""
        o = self.options
        return (
            o.ce_weight,
            o.regularizer_weight,
            o.divergence_weight,
            o.label_smoothing,
            o.temperature,
        )


def fake_record(
    first: Tensor,
    rows: int,
    models: int,
    target: Tensor | None,
    class_weight: Tensor | None,
    options: LossOptions,
    want: int,
) -> Tensor:
    """A tensor like the record of these arguments, for torch.compile."""
    spec = cached_spec(
        kind_of(options),
        plan(1, models, first.element_size(), 1, False, True, False),
        first.dtype,
        models,
        has_target=target is not None,
        weighted=class_weight is not None,
        report=bool(want & WANT_TERMS),
        strided=False,
        places=exact_places(options, 1),
    )
    dtype = torch.float64 if spec.scalar.value == tl.float64 else torch.float32
    return first.new_empty((spec.fields.value, rows), dtype=dtype)


def loss(
    logits: Sequence[Tensor], target: Tensor | None, class_weight: Tensor | None, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Loss, record, report and gradients, as `want` asks; see csrc/ops.cpp."""
    options, want = LossOptions(*arguments[:-1]), arguments[-1]
    report = bool(want & WANT_TERMS)
    call = Call(logits, target, class_weight, options, report)
    if target is not None:
        _checks.target_range(target, call.classes, options.ignore_index)
    students = len(call.models) - options.teachers
    pairs = pair_count(students, options.teachers)
    shape: tuple[int, ...] = ()
    if options.reduction == REDUCTIONS["none"]:
        shape = (call.rows,)
    elif options.reduction == ROW_TERMS:
        shape = (call.rows, 2 * students + pairs)
    spec = call.spec
    value = call.empty(*shape)
    terms = call.empty(5 * students + pairs + 1 if report else 0)
    record = call.empty(spec.fields.value, call.rows, dtype=call.scalar)
    gradients = new_gradients(logits, options.teachers) if want & WANT_GRADIENTS else []
    if call.rows == 0:
        return (
            value.fill_(math.nan if options.reduction == 1 else 0),
            record,
            terms.fill_(math.nan),
            gradients,
        )
    programs = triton.cdiv(call.rows, finish.FINISH_ROWS.value)
    partial = call.empty(spec.total_terms.value, programs, dtype=call.weight)
    exact = spec.exact.value
    words = (superaccumulator.WORDS.value,) if exact else ()
    totals = call.empty(spec.total_terms.value, *words, dtype=torch.int64 if exact else call.weight)
    arrivals = call.empty(1, dtype=torch.int32)
    # A row a thread: the parts of two rows' exact sums do not fit its registers.
    warps, registers = (8, MOST_REGISTERS) if exact else (4, 0)
    with call.guard():
        call.count(report)
        start(
            kernels.rows_kernel,
            (call.programs,),
            call.tile.warps,
            *call.logits,
            tuple(unstack(gradients)) if gradients else None,
            call.target,
            call.class_weight,
            call.counts,
            record,
            totals,
            arrivals,
            call.rows,
            call.classes,
            call.counters,
            options.ignore_index,
            options.top_k,
            *call.weights(),
            spec,
            registers=call.tile.registers,
        )
        start(
            finish.finish_kernel,
            (programs,),
            warps,
            *call.logits,
            call.target,
            call.class_weight,
            call.counts,
            record,
            value,
            terms,
            partial,
            totals,
            arrivals,
            call.rows,
            call.classes,
            call.counters,
            options.ignore_index,
            *call.weights(),
            options.mode == 0,
            spec,
            registers=registers,
        )
    return value, record, terms, gradients


def check_record(record: Tensor, call: Call) -> None:
    """What kernels read of a record is there; one with a report holds more."""
    fields, rows = record.shape if record.dim() == 2 else (0, 0)
    place = rows, record.dtype, record.device
    if (
        fields < call.spec.fields.value
        or place != (call.rows, call.scalar, call.device)
        or not record.is_contiguous()
    ):
        raise RuntimeError(
            "stats must be what churn_kernels::triton_loss returned for the same options, got "
            f"{tuple(record.shape)} of {record.dtype} on {record.device}"
        )


def loss_backward(
    logits: Sequence[Tensor],
    target: Tensor | None,
    class_weight: Tensor | None,
    record: Tensor,
    upstream: Tensor,
    *arguments: Any,
) -> list[Tensor]:
    """Gradients for any upstream, out of the record of the forward pass."""
    options = LossOptions(*arguments)
    call = Call(logits, target, class_weight, options, False)
    check_record(record, call)
    gradients = new_gradients(logits, options.teachers)
    if call.rows == 0:
        return gradients
    tile = call.tile
    with call.guard():
        call.count(False)
        start(
            kernels.gradient_kernel,
            (call.programs, triton.cdiv(call.classes + (tile.vector - 1) * tile.shift, tile.block)),
            tile.warps,
            *call.logits,
            tuple(unstack(gradients)),
            call.target,
            call.class_weight,
            call.counts,
            record,
            upstream.contiguous(),
            call.rows,
            call.classes,
            call.counters,
            options.ignore_index,
            *call.weights(),
            call.spec,
        )
    return gradients


def scale_(gradients: Sequence[Tensor], upstream: Tensor, exact: bool) -> None:
    """In place times a scalar, unless it is 1; the GPU decides."""
    size = gradients[0].numel() if gradients else 0
    if size == 0:
        return
    programs = min(triton.cdiv(size, SCALE_BLOCK), SCALE_PROGRAMS)
    with on_device(gradients[0].device):
        arguments = tuple(gradients), upstream, size, SCALE_BLOCK, exact
        start(kernels.scale_kernel, (programs,), 4, *arguments)
