"""Hashes of DTensors and traces of sharded trainings: those of whole tensors on one process."""

import re
import tempfile

import pytest
import torch
import torch.distributed as dist
from hashed import numbers
from processes import run
from torch import nn

from churn_kernels import _ops, audit, hashing

if not dist.is_available():
    pytest.skip("this torch has no torch.distributed", allow_module_level=True)

from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not _ops.LOADED, reason="the compiled library is not built"),
]

SHAPES = [(10, 6), (7, 3, 5), (1, 9), (3,), (4, 1, 3, 3), (2, 0)]
DTYPES = [torch.float32, torch.bfloat16, torch.uint8]
PLACEMENTS = [[Replicate()], *([Shard(dim)] for dim in range(4))]
GRID_PLACEMENTS = [
    [Replicate(), Shard(0)],
    [Shard(0), Replicate()],
    [Shard(0), Shard(0)],
    [Shard(0), Shard(1)],
    [Shard(1), Shard(0)],
    [Shard(1), Shard(2)],
]


def whole_tensors():
    return [numbers(torch.Size(s).numel(), dtype).view(s) for s in SHAPES for dtype in DTYPES]


def fits(placements, x):
    return all(not p.is_shard() or p.dim < x.dim() for p in placements)


def error_of(call):
    try:
        call()
    except ValueError as error:
        return str(error)


def sharded(mesh, choices):
    """Whether every placement hashes as the whole, one by one and all together."""
    wrong, together, wanted = [], [], []
    for x in whole_tensors():
        for placements in choices:
            if fits(placements, x):
                placed = distribute_tensor(x, mesh, placements)
                together.append(placed)
                wanted.append(audit.hash_words(x))
                if audit.tensor_hash(placed) != audit.tensor_hash(x):
                    wrong.append(f"{tuple(x.shape)} {x.dtype} {placements}")
    if not torch.equal(hashing.words_of(together), torch.stack(wanted)):
        wrong.append("all together")
    return wrong


def of_a_pair(rank, world):
    mesh = init_device_mesh("cpu", (world,))
    x = torch.arange(12.0).view(3, 4)
    replica = DTensor.from_local(x + rank, mesh, [Replicate()], run_check=False)
    partial = DTensor.from_local(x, mesh, [Partial()])
    placed = distribute_tensor(x, mesh, [Shard(0)])
    return {
        "wrong": sharded(mesh, PLACEMENTS),
        "replica": audit.tensor_hash(replica) == audit.tensor_hash(x + rank),
        "partial": error_of(lambda: audit.tensor_hash(partial)),
        "first": error_of(lambda: audit.hash_words(placed, first=1)),
        "strides": audit.tensor_hash(placed.t()) == audit.tensor_hash(x.t()),
    }


def of_a_grid(rank, world):
    mesh = init_device_mesh("cpu", (2, world // 2))
    half = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("a", "b"))["b"]
    other = DTensor.from_local(torch.ones(2), half, [Shard(0)])
    return {
        "wrong": sharded(mesh, GRID_PLACEMENTS),
        "half": audit.tensor_hash(other) == audit.tensor_hash(torch.ones(world)),
    }


def train(path, shard):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Linear(7, 3))
    if shard:
        fully_shard(model)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    with audit.record(path, model, optimizer) as recorder:
        for step in range(3):
            x = torch.randn(8, 5, generator=torch.Generator().manual_seed(step))
            loss = model(x).square().mean()  # the same rows in every process: the mean is theirs
            recorder.observe(loss=loss)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()


def of_a_training(rank, world):
    traces = []
    with tempfile.TemporaryDirectory() as folder:
        for shard in (True, False):
            path = f"{folder}/{shard}"
            train(path, shard)
            traces.append(audit.Trace.load(path))
    found = audit.compare(*traces)
    return {
        "difference": str(found.difference),
        "tensors": traces[0].header["tensors"] == traces[1].header["tensors"],
    }


def test_every_placement_hashes_as_the_whole(tmp_path):
    for found in run(of_a_pair, 2, tmp_path / "pair"):
        assert found["wrong"] == []
        assert found["replica"], "replicas that differ have hashes that do"
        assert found["strides"]
        assert re.match(
            r"x must be sharded or replicated, got a DTensor with Partial\(sum\); "
            r"pass x\.redistribute\(placements=\[\.\.\.\]\) with Shard or Replicate instead",
            found["partial"],
        )
        assert found["first"] == "first must be 0 for a DTensor, which knows its offsets; got 1"


def test_meshes_of_two_dimensions(tmp_path):
    for found in run(of_a_grid, 4, tmp_path / "grid"):
        assert found == {"wrong": [], "half": True}


def test_a_sharded_training_has_the_trace_of_a_whole_one(tmp_path):
    for found in run(of_a_training, 2, tmp_path / "training"):
        assert found == {"difference": "None", "tensors": True}


def test_runs_of_a_box():
    """Cuts in up to three dimensions against the places of the elements themselves."""
    from churn_kernels._placements import _boxes

    shape = (3, 4, 2, 5)
    places = torch.arange(120).view(shape)
    for a, b, c, d in ((3, 4, 2, 5), (2, 4, 2, 5), (3, 2, 2, 5), (2, 2, 1, 3), (3, 1, 2, 2)):
        for at in range(2):
            sizes = (a, b, c, d)
            offsets = [at * (whole - size > 0) for whole, size in zip(shape, sizes, strict=True)]
            cut = places
            for dim in range(4):
                cut = cut.narrow(dim, offsets[dim], sizes[dim])
            found = []
            for box in _boxes(sizes, offsets, shape):
                assert box.begin == len(found)
                found += [
                    box.first + i // box.run * box.step + i % box.run
                    for i in range(box.end - box.begin)
                ]
            assert found == cut.flatten().tolist()
    assert [*_boxes((3, 0), (0, 5), (3, 5))] == [(0, 0, 0, 1, 1)]
