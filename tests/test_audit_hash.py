"""The hash of a tensor: every bit and its place show, and nothing else does."""

import itertools
import re

import pytest
import torch
from exactness import shuffled
from hashed import DTYPES, numbers, specification

from churn_kernels import _ops, audit
from churn_kernels import hashing as hashes
from churn_kernels._constants import CONSTANTS

pytestmark = pytest.mark.skipif(not _ops.LOADED, reason="the compiled library is not built")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [0, 1, 7, 1024, 5000])
def test_words_are_what_they_say(dtype, size):
    x = numbers(size, dtype)
    for first in (0, 1, 1023, 2**33):
        want = specification(x, first)
        assert audit.hash_words(x, first).tolist() == want
        piece = hashes._whole(x, first)
        assert hashes.words_in_pytorch(piece).tolist() == want


def test_a_device_without_a_kernel(monkeypatch):
    want = audit.hash_words(numbers(3000))
    monkeypatch.setattr("churn_kernels._backend.hash_op", lambda x: None)
    assert torch.equal(audit.hash_words(numbers(3000)), want)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("columns", [(0, 7), (3, 4), (2, 1301), (1300, 2600)])
def test_runs_of_bytes_lie_where_they_say(dtype, columns):
    """Some columns of a matrix: words of a matrix that holds nothing else."""
    rows, width, (begin, end) = 5, 2600, columns
    x = numbers(rows * width, dtype).view(rows, width)
    alone = torch.zeros_like(x)
    alone[:, begin:end] = x[:, begin:end]
    own, size = x[:, begin:end].contiguous(), dtype.itemsize
    run, step = (end - begin) * size, width * size
    piece = hashes.Piece(own, begin * size, run, step)
    want = specification(alone)
    assert hashes.words_in_pytorch(piece).tolist() == want
    (words,) = torch.ops.churn_kernels.hash_words([own], [begin * size], [run], [step])
    assert words.tolist() == want


def test_a_run_may_be_longer_than_its_piece():
    x = numbers(7, torch.uint8)
    (words,) = torch.ops.churn_kernels.hash_words([x], [3], [100], [200])
    assert words.tolist() == specification(torch.cat([torch.zeros(3, dtype=torch.uint8), x]))


def test_many_tensors_are_one_call(threads):
    tensors = [numbers(size, torch.uint8) for size in (5, 0, 300_000, 1, 4096, 700_001, 0, 3)]
    want = torch.stack([audit.hash_words(x) for x in tensors])
    for count in (1, 2, 3):
        threads(count)
        assert torch.equal(hashes.words_of(tensors), want)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (([torch.ones(2)], [0], [8], []), "first, run and step must hold a number for each piece"),
        (([torch.ones(2, 2).t()], [0], [16], [16]), "pieces must be contiguous"),
        (([torch.ones(2)], [-1], [8], [8]), "must have 0 <= first and 0 < run <= step"),
        (([torch.ones(2)], [0], [8], [4]), "must have 0 <= first and 0 < run <= step"),
    ],
)
def test_what_the_op_refuses(call, message):
    with pytest.raises(RuntimeError, match=message):
        torch.ops.churn_kernels.hash_words(*call)


def test_keys_can_lose_no_change():
    for keys in CONSTANTS.hash_keys:
        assert all(key % 2 for key in keys)
        assert len(set(keys)) == CONSTANTS.kHashBlock == len(keys)
    blocks = [CONSTANTS.hash_block_key(k, b) for k in range(2) for b in range(1000)]
    assert all(key % 2 for key in blocks)
    assert len(set(blocks)) == len(blocks)


def test_hashes_stay_what_they_are():
    """A change of these takes the next kHashSpec."""
    assert audit.HASH_SPEC == 2
    assert audit.tensor_hash(torch.arange(5)) == "9339d0b76a9a8b73e6b690f9e2411610"
    assert audit.tensor_hash(numbers(5000).view(50, 100)) == "2f9869fcafb8dc8916400ff1594ceef9"
    assert audit.tensor_hash(numbers(5001, torch.bfloat16)) == "b20b271fad0e96cdcd864417fdbb87e3"
    assert audit.tensor_hash(numbers(7, torch.uint8)) == "db266ae56c5bdf95704b3cbb715d99ff"


def test_no_thread_count_instruction_set_or_stride_shows(threads):
    x = numbers(300_000)
    want = audit.tensor_hash(x)
    for count in (2, 3, 8):
        threads(count)
        assert audit.tensor_hash(x) == want
    best = torch.ops.churn_kernels.cpu_isa("")
    for isa in ("baseline", "avx2", best):
        try:
            torch.ops.churn_kernels.cpu_isa(isa)
        except ValueError:
            continue  # this machine has it not
        assert audit.tensor_hash(x) == want
    assert audit.tensor_hash(torch.stack([x, x], 1)[:, 0]) == want
    assert audit.tensor_hash(x.clone().requires_grad_()) == want


def changes(x):
    """Tensors that differ from x as little as tensors can."""
    bits = x.view(torch.int32)
    for place in (0, 17, len(x) - 1):
        for bit in range(32):
            changed = bits.clone()
            changed[place] ^= torch.tensor(-(2**31) if bit == 31 else 1 << bit).int()
            yield f"bit {bit} at {place}", changed.view(torch.float32)
    for a, b in ((0, 1), (5, 1024), (1023, 2048)):
        changed = x.clone()
        changed[[a, b]] = x[[b, a]]
        yield f"{a} and {b} swapped", changed
    yield "reversed", x.flip(0)
    yield "shuffled", shuffled(x)
    yield "shifted by a block", x.roll(1024)


def test_every_small_change_shows():
    x = numbers(3000)
    found = {"nothing": audit.tensor_hash(x)}
    found |= {name: audit.tensor_hash(changed) for name, changed in changes(x)}
    assert len(set(found.values())) == len(found)
    words = [tuple(audit.hash_words(changed).tolist()) for _, changed in changes(x)]
    for word in range(2):  # each of the two is enough
        assert len({pair[word] for pair in words}) == len(words)


def test_signed_zeros_and_payloads_of_nan_show():
    bits = torch.tensor([0, -(2**31), 0x7FC00000, 0x7FC00001, 0x7FA00000], dtype=torch.int32)
    found = {audit.tensor_hash(one.view(torch.float32)) for one in bits}
    assert len(found) == len(bits)


def test_signs_that_flip_together_show():
    """The worst case of the words' probability."""
    ones = torch.ones(2000)
    found = set()
    for a, b in itertools.combinations(range(0, 2000, 50), 2):
        flipped = ones.clone()
        flipped[[a, b]] = -1.0
        found.add(audit.tensor_hash(flipped))
    assert len(found) == 40 * 39 // 2


def test_shape_and_dtype_show():
    x = torch.zeros(12)
    found = {
        audit.tensor_hash(y)
        for y in (x, x.view(3, 4), x.view(4, 3), x[:11], x[:0], x[0], x.int(), x.bfloat16())
    }
    assert len(found) == 8


def test_pieces_add_up():
    x = numbers(10_000)
    want = audit.hash_words(x)
    ends = [0, 1, 1023, 1024, 5000, 10_000]
    pieces = [audit.hash_words(x[a:b], first=a) for a, b in itertools.pairwise(ends)]
    assert torch.equal(sum(reversed(pieces)), want)
    assert audit.hash_of_words(want, x.dtype, x.shape) == audit.tensor_hash(x)


@pytest.mark.filterwarnings("ignore:Sparse C.. tensor support")
@pytest.mark.filterwarnings("ignore:torch.quantize_per")
def test_sparse_and_quantised_tensors():
    dense = torch.tensor([[0.0, 2.0], [3.0, 0.0]])
    layouts = [dense.to_sparse(), dense.to_sparse_csr(), dense.to_sparse_csc(), dense]
    scales = torch.tensor([0.1, 0.2])
    zeros = torch.tensor([0, 1])
    quantised = [
        torch.quantize_per_tensor(dense, 0.1, 0, torch.qint8),
        torch.quantize_per_tensor(dense, 0.1, 1, torch.qint8),
        torch.quantize_per_channel(dense, scales, zeros, 0, torch.qint8),
        torch.quantize_per_channel(dense, scales, zeros, 1, torch.qint8),
    ]
    found = [audit.tensor_hash(x) for x in (*layouts, *quantised)]
    assert len(set(found)) == len(found)
    assert found == [audit.tensor_hash(x.clone()) for x in (*layouts, *quantised)]
    unsorted = torch.sparse_coo_tensor([[1, 0], [0, 1]], [3.0, 2.0], (2, 2), check_invariants=True)
    assert audit.tensor_hash(unsorted) == found[0]
    z = torch.complex(dense, dense)
    assert audit.tensor_hash(z.conj()) == audit.tensor_hash(z.conj().resolve_conj())


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: audit.tensor_hash([1.0]), TypeError, "x must be a tensor, got list; pass torch."),
        (
            lambda: audit.tensor_hash(torch.empty(3, device="meta")),
            ValueError,
            "x must hold data, got a meta tensor; pass a materialised dense tensor",
        ),
        (
            lambda: audit.hash_words(torch.eye(2).to_sparse()),
            ValueError,
            "x must be dense, got a torch.sparse_coo tensor; pass it to tensor_hash",
        ),
        (
            lambda: audit.hash_words(torch.ones(2), first=-1),
            ValueError,
            "first must be at least 0, got -1; it counts the elements before x",
        ),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=re.escape(message)):
        call()
