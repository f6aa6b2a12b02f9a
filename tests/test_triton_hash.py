"""Hashes on Triton, on a GPU or in its interpreter: the words of the CPU's kernel."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hashed import DTYPES, numbers

import churn_kernels as ck
from churn_kernels import _ops, audit, hashing

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif("triton" not in ck.available_backends(), reason="no Triton here"),
]

ROOT = Path(__file__).parents[1]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BYTES = [0, 1, 4095, 4096, 10_000]


@pytest.fixture
def kernels():
    """The module with the kernel."""
    from churn_kernels.triton import hashing as kernels

    return kernels


def words_on_triton(x, first=0):
    with ck.backend("triton"):
        words = audit.hash_words(x, first)
    assert words.device.type == DEVICE
    return words.cpu()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", BYTES)
def test_words(dtype, size):
    x = numbers(size // dtype.itemsize, dtype)
    for first in (0, 1, 1023):
        want = audit.hash_words(x, first)
        assert torch.equal(words_on_triton(x.to(DEVICE), first), want)


@pytest.mark.parametrize("offset", [0, 1, 2, 3, 4, 8, 16])
def test_bytes_at_any_address(offset, kernels):
    """Every width of loads, at places that go with the address and at others."""
    buffer = numbers(9000, torch.uint8).to(DEVICE)
    buffer = buffer[-buffer.data_ptr() % kernels.VECTOR :]
    x = buffer[offset : offset + 8200]
    widths = set()
    for first in (0, 1, 2, 4, offset, offset + 16):
        assert torch.equal(words_on_triton(x, first), audit.hash_words(x.cpu(), first))
        widths |= {width for width, _ in kernels.runs_of(x, first, len(x), len(x))}
    best = 16 if offset % 4 == 0 else 2 if offset % 2 == 0 else 1
    assert max(widths) == best


def test_strides():
    x = numbers(6000).view(60, 100).to(DEVICE)
    z = torch.view_as_complex(x.view(60, 50, 2))
    for y in (x.t(), x[:, 3:50], x[::2], x[0, 0], z.conj(), z.conj().imag):
        assert torch.equal(words_on_triton(y), audit.hash_words(y.cpu()))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("begin", "end"), [(0, 4), (8, 24), (3, 64), (1, 2)])
def test_runs(dtype, begin, end):
    """Columns of a matrix, which a shard has of a tensor."""
    x = numbers(640, dtype).view(10, 64)
    own, size = x[:, begin:end].contiguous(), dtype.itemsize
    piece = [begin * size], [(end - begin) * size], [64 * size]
    words = _ops.triton().hash_words([own.to(DEVICE)], *piece)
    assert torch.equal(words.cpu(), _ops.COMPILED.hash_words([own], *piece))


def test_many_tensors_are_a_launch_for_each_width(monkeypatch, kernels):
    tensors = [numbers(size) for size in (5, 0, 3000, 1, 1024, 2)]
    tensors += [numbers(7, torch.uint8), numbers(9000, torch.bfloat16)]
    want = hashing.words_of(tensors)
    launches = []
    start = kernels.start
    monkeypatch.setattr(kernels, "start", lambda *a: (launches.append(a[-1]), start(*a)))
    with ck.backend("triton"):
        words = hashing.words_of([x.to(DEVICE) for x in tensors])
    assert torch.equal(words.cpu(), want)
    assert len(launches) == len(set(launches)) <= 4


def test_programs_of_several_blocks(monkeypatch, kernels):
    """The last block of a program is the first of none, whatever their number is."""
    x = numbers(9 * 1024 + 5)
    for blocks in (1, 2, 3):
        monkeypatch.setattr(kernels, "BLOCKS", blocks)
        for first in (0, 1000):
            want = audit.hash_words(x, first)
            assert torch.equal(words_on_triton(x.to(DEVICE), first), want)


@pytest.mark.skipif(DEVICE == "cpu", reason="graphs are of a GPU")
def test_a_graph_is_refused():
    x = torch.ones(10, device=DEVICE)
    audit.hash_words(x)
    graph = torch.cuda.CUDAGraph()
    message = "hashes cannot be captured in a CUDA graph; hash outside the graph"
    with torch.cuda.graph(graph):
        x.add_(1.0)
        with pytest.raises(RuntimeError, match=message):
            audit.hash_words(x)


def test_registration():
    x = numbers(10).to(DEVICE)
    torch.library.opcheck(_ops.triton().hash_words, ([x, x[:3]], [0, 4], [40, 4], [40, 8]))


@pytest.fixture(scope="module")
def tables():
    """What the kernel compiles to, by target, kernel and case."""
    from benchmarks.compiled.table import lines_of

    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.compiled", "--only", "*/hash_*"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return lines_of(done.stdout)


def test_it_compiles_for_every_gpu_and_spills_nothing(tables):
    from benchmarks.compiled.targets import TARGETS

    loads = {}
    for (target, kernel, case), line in tables.items():
        assert kernel == "hash_words_kernel"
        assert (line["spills"], line["stack"]) == ("0", "0"), (target, case)
        assert int(line["registers"]) <= 128, (target, case)
        loads[target, case.split("/")[0]] = int(line["loads"])
    assert len(loads) == 4 * len(TARGETS)
    for target in TARGETS:
        assert loads[target, "hash_16"] > loads[target, "hash_4"], "words move in 16 bytes"


def test_numbers_are_those_of_the_committed_tables(tables):
    import triton

    from benchmarks.compiled.table import lines_of, triton_version

    for (target, kernel, case), line in tables.items():
        committed = (ROOT / f"benchmarks/results/compiled/{target}.md").read_text()
        made_with = triton_version(committed)
        if made_with != triton.__version__:
            pytest.skip(f"the tables are of Triton {made_with}, this is {triton.__version__}")
        assert line == lines_of(committed)[target, kernel, case], "see benchmarks.compiled --check"
