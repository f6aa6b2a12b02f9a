"""DTensors: the kernels compute on local tensors, and results become DTensors again.

Rows may be sharded or replicated over any dimensions of a mesh, those of logits (..., C) along any
of their dimensions; each rank flattens its local tensor. Classes may be sharded over the ranks
of `distributed.class_parallel`. The results are those of the whole tensors: per-row losses are
placed like the rows, everything else is replicated.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from churn_kernels import _backend, _blocks, _checks, _class_shards, modes
from churn_kernels._options import REDUCTIONS, ROW_TERMS, LossOptions
from churn_kernels._placements import is_placed, replicated
from churn_kernels._row_shards import (
    RowShardOps,
    Total,
    mean_divisors,
    mean_terms,
    reduced,
    sum_and_check,
)

_TENSOR_MODULE = "torch.distributed.tensor"  # imported already if any DTensor exists
_BY_ROW = (REDUCTIONS["none"], ROW_TERMS)


def evaluate(
    logits: Sequence[Tensor],
    batch: Sequence[int] | None,
    target: Tensor | None,
    class_weight: Tensor | None,
    options: LossOptions,
    mode: str | None,
    with_terms: bool,
    names: Sequence[str] = (),
) -> tuple[Tensor, Tensor]:
    """`_backend.evaluate` for tensors and DTensors.

    Args:
        logits: as there, but DTensors (..., C) are not flattened.
        names: the logits' names in messages; the last one also names all further logits. Default:
            `logits`.
    Returns: as there, with per-row results in the original shape of the rows.
    """
    if _TENSOR_MODULE not in sys.modules or not any(
        map(is_placed, (*logits, target, class_weight))
    ):
        loss, terms = _backend.evaluate(
            logits, batch, target, class_weight, options, mode, with_terms
        )
        if batch is not None and loss.dim():
            loss = loss.reshape(*batch, *loss.shape[1:])
        return loss, terms
    placed = _evaluate
    if torch.compiler.is_compiling():  # it calls collectives
        placed = torch.compiler.disable(_evaluate)
    return placed(logits, batch, target, class_weight, options, mode, with_terms, names)


def _evaluate(
    logits: Sequence[Any],
    batch: Sequence[int] | None,
    target: Any,
    class_weight: Any,
    options: LossOptions,
    mode: str | None,
    with_terms: bool,
    names: Sequence[str],
) -> tuple[Tensor, Tensor]:
    if not names:
        names = [f"logits[{k}]" for k in range(len(logits))] if len(logits) > 1 else ["logits"]
    named = [(names[min(k, len(names) - 1)], z) for k, z in enumerate(logits)]
    first = logits[0]
    exchange = _class_shards.exchange_of(_blocks.choices())
    try:
        layout = Layout(named, batch, with_classes=True)
        layout.check_is_dtensor("target", target)
        layout.check_is_dtensor("class_weight", class_weight)
        if target is not None:
            _checks.several_classes(first.shape[-1], batch)
            _checks.target(target, first, batch)
        if class_weight is not None:
            class_weight = _checks.class_weight(class_weight, first, first.shape[-1])
    except Exception:
        if exchange is not None:
            _class_shards.report_rejection(exchange)  # the other ranks are waiting for this one
        raise
    local = layout.rows(logits), layout.by_row(target), layout.whole(class_weight)
    if mode is None:
        mode = modes.get_reduction_mode()
    by_row = options.reduction in _BY_ROW
    split = layout.sharded and not (by_row and not with_terms)
    if not split:
        loss, terms = _evaluate_here(local, options, mode, with_terms)
    elif mode == "exact" or exchange is not None:
        share = partial(RowShardOps, layout.total, first.shape[-1])
        loss, terms = _evaluate_here(local, options, mode, with_terms, share)
    else:
        loss, terms = _evaluate_rows(layout, local, options, mode, with_terms)
    return (
        layout.placed_rows(loss) if by_row else layout.placed(loss),
        layout.placed(terms.detach()),
    )


def _evaluate_here(
    local: tuple[Any, Any, Any],
    options: LossOptions,
    mode: str,
    with_terms: bool,
    share: Callable[..., Any] | None = None,
) -> tuple[Tensor, Tensor]:
    """The loss of this rank's rows."""
    logits, target, class_weight = local
    return _backend.evaluate(logits, None, target, class_weight, options, mode, with_terms, share)


def _evaluate_rows(
    layout: "Layout",
    local: tuple[Any, Any, Any],
    options: LossOptions,
    mode: str,
    with_terms: bool,
) -> tuple[Tensor, Tensor]:
    """The loss of all rows from this rank's per-row losses, by floating-point sums."""
    logits, target, class_weight = local
    first = logits[0]
    models = len(logits) if first.dim() == 2 else first.shape[0]
    mine, everyone = mean_divisors(
        target, class_weight, first, first.shape[-1], options, layout.total
    )
    by_row = options
    if options.reduction not in _BY_ROW:
        by_row = options._replace(
            ce_weight=1.0, regularizer_weight=1.0, divergence_weight=1.0, reduction=ROW_TERMS
        )
    loss, means = _evaluate_here(local, by_row, mode, with_terms)
    if by_row is not options:
        share = reduced(loss, everyone, target is not None, options, models)
        loss = _Total.apply(layout.total, share).to(loss.dtype)
    if with_terms:
        means = mean_terms(means, mine, everyone, models - options.teachers, layout.total)
    return loss, means


class _Total(torch.autograd.Function):
    """The sum of x over all ranks; each rank gets the gradient of that one sum."""

    @staticmethod
    def forward(ctx: Any, total: Total, x: Tensor) -> Tensor:
        return total(x.clone())

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[None, Tensor]:
        return None, upstream


class Layout:
    """Placement of DTensors of rows: (N, C), (K, N, C), or in a batch's shape (..., C).

    Args: the tensors by name, of one shape; the batch's shape; whether classes may be sharded.
    Raises: TypeError if one is not a DTensor, ValueError for unsupported placements.
    """

    def __init__(
        self,
        tensors: Sequence[tuple[str, Any]],
        batch: Sequence[int] | None,
        *,
        with_classes: bool,
    ) -> None:
        # If only the target or the weights are DTensors, the error names the logits.
        placed = [name for name, x in tensors if is_placed(x)]
        self._name = placed[0] if placed else "target or class_weight"
        for name, x in tensors:
            self.check_is_dtensor(name, x)
        first = tensors[0][1]
        self._first, self._mesh, self._placements = first, first.device_mesh, first.placements
        for name, x in tensors:
            if (x.device_mesh, x.placements) != (self._mesh, self._placements):
                raise ValueError(
                    f"{name} must have the mesh and placements of {self._name}, {_shown(first)}, "
                    f"got {_shown(x)}; pass {name}.redistribute(placements={self._name}.placements)"
                    f", or .to_local() of each"
                )
        if self._mesh.get_coordinate() is None:
            raise ValueError(
                f"{self._name}'s mesh must include this rank, got a DTensor on other ranks; call "
                f"on the ranks of the mesh only, or pass .to_local() of tensors on this rank"
            )
        classes = first.dim() - 1
        self._dims = range(classes - 1 if batch is None else 0, classes)  # of the rows
        self._shape = first.shape[self._dims.start : classes]  # of all rows
        self._local_shape = first.to_local().shape[self._dims.start : classes]
        split = []
        for mesh_dim, placement in enumerate(self._placements):
            if _is_shard(placement, classes):
                split.append(mesh_dim)
            elif not (placement.is_replicate() or self._shards_rows(placement)):
                raise ValueError(
                    f"{self._name} must be sharded by rows or replicated, got {_shown(first)}; "
                    f"pass {self._name}.redistribute(placements=[...]) with "
                    f"Shard({self._dims.start}) or Replicate(), or {self._name}.to_local() for "
                    f"the local part"
                )
        self._check_classes(split, first, with_classes)

    def _check_classes(self, split: list[int], first: Any, with_classes: bool) -> None:
        exchange: Any = _class_shards.exchange_of(_blocks.choices()) if with_classes else None
        if exchange is None and not split:
            return
        if exchange is None:
            block = (
                "; call inside `with churn_kernels.distributed.class_parallel(group)` of the group "
                "that shares the classes, or"
                if with_classes
                else ";"
            )
            raise ValueError(
                f"{self._name} must hold whole rows, got sharded classes, {_shown(first)}{block} "
                f"pass {self._name}.redistribute(placements=[...]) with Shard({self._dims.start}) "
                f"or Replicate(), or {self._name}.to_local() for the local part"
            )
        here = [self._mesh.get_group(mesh_dim) for mesh_dim in split]
        if [torch.distributed.get_process_group_ranks(group) for group in here] != [exchange.ranks]:
            raise ValueError(
                f"{self._name} must be sharded by classes over the ranks of class_parallel, "
                f"{exchange.ranks}, got {_shown(first)}; call outside the block, or pass "
                f"{self._name}.to_local() if it holds this rank's classes"
            )
        parts, classes = self._mesh.size(split[0]), first.shape[-1]
        if -(-classes // parts) * (parts - 1) >= classes:
            raise ValueError(
                f"{self._name} must have at least one class on every rank of class_parallel, got "
                f"{classes} sharded over {parts} ranks; pass "
                f"{self._name}.redistribute(placements=[...]) and call outside the block, or "
                f".to_local() of tensors that you split yourself"
            )

    def check_is_dtensor(self, name: str, x: Any) -> None:
        """`x` is a DTensor, or None."""
        if x is None or is_placed(x):
            return
        raise TypeError(
            f"{name} must be a DTensor like {self._name}, got a Tensor; pass "
            f"torch.distributed.tensor.distribute_tensor({name}, mesh, placements), or .to_local() "
            f"of each DTensor to compute on the local parts"
        )

    @property
    def sharded(self) -> bool:
        """Whether the rows are sharded."""
        return any(map(self._shards_rows, self._placements))

    def total(self, x: Tensor) -> Tensor:
        """Sum x in place over the ranks that have other rows."""
        for mesh_dim, placement in enumerate(self._placements):
            if self._shards_rows(placement):
                torch.distributed.all_reduce(x, group=self._mesh.get_group(mesh_dim))
        return x

    def rows(self, logits: Sequence[Any]) -> list[Tensor]:
        """The local rows of each tensor, (n, C) or (K, n, C)."""
        local = [z.to_local() for z in logits]
        return local if len(self._dims) == 1 else [z.flatten(0, -2) for z in local]

    def by_row(self, x: Any) -> Any:
        """The part (n,) of a DTensor (...) that belongs to the local rows."""
        if x is None:
            return None
        return x.redistribute(self._mesh, self._row_placements()).to_local().flatten()

    def whole(self, x: Any) -> Any:
        """The full tensor of a DTensor."""
        return None if x is None else x.full_tensor()

    def placed(self, x: Tensor) -> Tensor:
        """A replicated DTensor of a result that every rank has."""
        return replicated(x, self._first)

    def placed_rows(self, x: Tensor) -> Tensor:
        """A DTensor, in the shape of all rows, of per-row results; x holds the local (n, ...)."""
        local = x.reshape(*self._local_shape, *x.shape[1:])
        shape = self._shape + x.shape[1:]
        return _from_local(local, self._mesh, self._row_placements(), shape)

    def _shards_rows(self, placement: Any) -> bool:
        return any(_is_shard(placement, dim) for dim in self._dims)

    def _row_placements(self) -> list[Any]:
        from torch.distributed.tensor import Replicate, Shard

        return [
            Shard(placement.dim - self._dims.start) if self._shards_rows(placement) else Replicate()
            for placement in self._placements
        ]


class RowGroup:
    """The ranks that hold rows of the same tensors; without a layout, only this one."""

    def __init__(self, layout: Layout | None) -> None:
        self._layout = layout

    def total(self, x: Tensor) -> Tensor:
        """Sum x in place over the ranks."""
        return x if self._layout is None else self._layout.total(x)

    @contextmanager
    def agreement(self, device: torch.device) -> Iterator[None]:
        """A block that raises on every rank if it raises on one."""
        problem = None
        try:
            yield
        except (ValueError, IndexError) as error:
            problem = error
        sum_and_check(problem, torch.zeros(0, device=device), self.total)


def local_rows(
    tensors: Sequence[tuple[str, Any]], batch: Sequence[int] | None, target: Any
) -> tuple[list[Tensor], Any, RowGroup]:
    """The local rows (n, C) of the logits, their targets (n,), and the ranks that hold the rest.

    Raises: as `Layout`.
    """
    if not any(is_placed(x) for _, x in (*tensors, ("target", target))):
        return [x for _, x in tensors], target, RowGroup(None)
    layout = Layout(tensors, batch, with_classes=False)
    layout.check_is_dtensor("target", target)
    return layout.rows([x for _, x in tensors]), layout.by_row(target), RowGroup(layout)


def unstack(name: str, x: Any) -> list[Tensor]:
    """The logits of each model of one tensor or DTensor (K, N, C).

    Raises: ValueError for a DTensor whose models are sharded.
    """
    if is_placed(x) and any(placement.is_shard(0) for placement in x.placements):
        raise ValueError(
            f"{name} must have every model on every rank, got {_shown(x)}; pass "
            f"{name}.redistribute(placements=[...]) with Shard(1) or Replicate(), or "
            f"{name}.to_local() for the local part"
        )
    return list(x.unbind(0))


def map_rows(name: str, x: Any, function: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply `function` to the rows (..., C) of a tensor or DTensor; keeps the rows' placement.

    Raises: ValueError for a DTensor whose rows are not whole.
    """
    if not is_placed(x):
        return function(x)
    for placement in x.placements:
        if not placement.is_replicate() and not any(
            _is_shard(placement, dim) for dim in range(x.dim() - 1)
        ):
            raise ValueError(
                f"{name} must hold whole rows, got {_shown(x)}; pass "
                f"{name}.redistribute(placements=[...]) with Shard of another dimension or "
                f"Replicate(), or {name}.to_local() for the local part"
            )
    return _from_local(function(x.to_local()), x.device_mesh, x.placements, x.shape[:-1])


def _from_local(x: Tensor, mesh: Any, placements: Sequence[Any], shape: torch.Size) -> Tensor:
    """A DTensor of `shape` from its local tensor."""
    from torch.distributed.tensor import DTensor

    stride = torch.empty(shape, device="meta").stride()
    result: Tensor = DTensor.from_local(
        x, mesh, placements, run_check=False, shape=shape, stride=stride
    )
    return result


def _is_shard(placement: Any, dim: int) -> bool:
    """Whether it is PyTorch's plain Shard(dim), with parts in rank order."""
    from torch.distributed.tensor import Shard

    return type(placement) is Shard and placement.dim == dim


def _shown(x: Any) -> str:
    return f"{list(x.placements)} on {x.device_mesh}"
