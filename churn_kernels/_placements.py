"""Position of a DTensor's local part in the whole tensor, and sums over the ranks.

`Shard(dim)` splits a dimension into parts of ceil(size / ranks), of which the last ones may be
shorter or empty; a second mesh dimension splits the parts of the first again.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from math import prod
from operator import add, mul
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Box(NamedTuple):
    """Elements [begin, end) of the local tensor, in contiguous runs of the whole one.

    Element begin + i is element first + i // run * step + i % run of the whole tensor.
    """

    begin: int
    end: int
    first: int
    run: int
    step: int


def is_placed(x: Any) -> bool:
    """Whether x is a DTensor; without importing torch.distributed.tensor."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(x, module.DTensor)


def boxes(x: Any) -> tuple[Tensor, list[Box]]:
    """The local part of a DTensor, and its position in the whole tensor.

    Raises: ValueError for placements other than Shard and Replicate, and outside of x's mesh.
    """
    from torch.distributed.tensor import Replicate, Shard

    coordinate = x.device_mesh.get_coordinate()
    if coordinate is None:
        raise ValueError(
            "x's mesh must include this rank, got a DTensor on other ranks; hash it on those"
        )
    sizes, offsets = list(x.shape), [0] * x.dim()
    for mesh_dim, placement in enumerate(x.placements):
        if isinstance(placement, Shard):
            dim = placement.dim
            part = -(-sizes[dim] // x.device_mesh.size(mesh_dim))
            begin = min(coordinate[mesh_dim] * part, sizes[dim])
            sizes[dim] = min(part, sizes[dim] - begin)
            offsets[dim] += begin
        elif not isinstance(placement, Replicate):
            raise ValueError(
                f"x must be sharded or replicated, got a DTensor with {placement!r}; "
                f"pass x.redistribute(placements=[...]) with Shard or Replicate instead"
            )
    return x.to_local(), list(_boxes(sizes, offsets, x.shape))


def _boxes(sizes: Sequence[int], offsets: Sequence[int], shape: Sequence[int]) -> Iterator[Box]:
    """The box of `sizes` at `offsets` in a row-major tensor of `shape`, as few `Box`es as possible.

    From the last cut dimension on, everything is one run. The whole dimensions before it, and the
    first one before those, step from run to run; each index of the remaining ones is a `Box`.
    """
    if 0 in sizes:
        yield Box(0, 0, 0, 1, 1)
        return
    dims = range(len(shape))
    strides = [prod(shape[dim + 1 :]) for dim in dims]
    cut = max((dim for dim in dims if sizes[dim] != shape[dim]), default=0)
    start = max(cut - 1, 0)
    while start > 0 and sizes[start] == shape[start]:
        start -= 1
    run = prod(sizes[cut:])
    step = strides[cut - 1] if cut else run
    size = prod(sizes[start:])
    begin = 0
    for places in product(*map(range, sizes[:start])):
        at = (*map(add, places, offsets), *offsets[start:])
        yield Box(begin, begin + size, sum(map(mul, at, strides)), run, step)
        begin += size


def summands(x: Any) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """The local part of a DTensor, and a function that sums its words over the other parts.

    Raises: ValueError for placements other than Shard and Replicate, and outside of x's mesh.
    """
    if x.device_mesh.get_coordinate() is None:
        raise ValueError(
            "x's mesh must include this rank, got a DTensor on other ranks; call on the ranks of "
            "the mesh only, or pass x.to_local() of a tensor on this rank"
        )
    for placement in x.placements:
        if not (placement.is_shard() or placement.is_replicate()):
            raise ValueError(
                f"x must be sharded or replicated, got a DTensor with {placement!r}; pass "
                f"x.redistribute(placements=[...]) with Shard or Replicate instead, or "
                f"x.to_local() for the local part"
            )

    def total(words: Tensor) -> Tensor:
        for group in _groups(x):
            torch.distributed.all_reduce(words, group=group)
        return words

    return x.to_local(), total


def replicated(value: Tensor, like: Any) -> Tensor:
    """A replicated DTensor on the mesh of `like`, of a value that every rank has."""
    from torch.distributed.tensor import DTensor, Replicate

    mesh = like.device_mesh
    result: Tensor = DTensor.from_local(value, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return result


def add_up(words: Tensor, tensors: Sequence[Any]) -> Tensor:
    """The words (tensors, 2) of whole tensors from the words of their local parts.

    One all-reduce for each mesh dimension over which any tensor is sharded. Each replica gets the
    words of its own data.
    """
    by_groups: dict[tuple[Any, ...], list[int]] = {}
    for i, x in enumerate(tensors):
        if is_placed(x) and (groups := _groups(x)):
            by_groups.setdefault(groups, []).append(i)
    if not by_groups:
        return words
    rows = list(words.unbind(0))
    for groups, places in by_groups.items():
        part = torch.stack([rows[i] for i in places])
        for group in groups:
            torch.distributed.all_reduce(part, group=group)
        for i, row in zip(places, part.unbind(0), strict=True):
            rows[i] = row
    return torch.stack(rows)


def _groups(x: Any) -> tuple[Any, ...]:
    """This rank's process groups over which x is sharded."""
    return tuple(
        x.device_mesh.get_group(mesh_dim)
        for mesh_dim, placement in enumerate(x.placements)
        if placement.is_shard()
    )
