"""The hash of a tensor: every bit and its place show, and nothing else does."""

import itertools
import re

import pytest
import torch
from exactness import shuffled

from churn_kernels import _ops, audit
from churn_kernels import hashing as hashes
from churn_kernels._ops import CONSTANTS

pytestmark = pytest.mark.skipif(not _ops.LOADED, reason="the compiled library is not built")

DTYPES = [
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.float8_e4m3fn,
    torch.int8,
    torch.uint8,
    torch.bool,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.complex64,
    torch.complex128,
]


def numbers(size, dtype=torch.float32, seed=0):
    """Random bits of a dtype."""
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.bool:
        return torch.randint(2, (size,), generator=generator).bool()
    count = size * dtype.itemsize
    return torch.randint(256, (count,), generator=generator, dtype=torch.uint8).view(dtype)


def specification(x, first=0):
    """The words by Python's integers."""
    width = min(4, x.element_size())
    raw = x.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    place = first * x.element_size() // width
    words = [0, 0]
    for at in range(0, len(raw), width):
        part = int.from_bytes(raw[at : at + width], "little")
        block, index = divmod(place + at // width, CONSTANTS.kHashBlock)
        for k in range(2):
            key = CONSTANTS.hash_keys[k][index] * CONSTANTS.hash_block_key(k, block)
            words[k] = (words[k] + part * key) % 2**64
    return [word - 2**64 if word >= 2**63 else word for word in words]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [0, 1, 7, 1024, 5000])
def test_words_are_what_they_say(dtype, size):
    x = numbers(size, dtype)
    for first in (0, 1, 1023, 2**33):
        want = specification(x, first)
        assert audit.hash_words(x, first).tolist() == want
        (bits,) = hashes._dense_parts(x)
        of_bits = first * (2 if dtype.is_complex else 1)
        assert hashes.words_without_a_kernel(bits, of_bits).tolist() == want


def test_keys_can_lose_no_change():
    for keys in CONSTANTS.hash_keys:
        assert all(key % 2 for key in keys)
        assert len(set(keys)) == CONSTANTS.kHashBlock == len(keys)
    blocks = [CONSTANTS.hash_block_key(k, b) for k in range(2) for b in range(1000)]
    assert all(key % 2 for key in blocks)
    assert len(set(blocks)) == len(blocks)


def test_hashes_stay_what_they_are():
    """A change of these takes the next kHashSpec."""
    assert audit.HASH_SPEC == 1
    assert audit.tensor_hash(torch.arange(5)) == "862d821628ee9e6119c8893b2ff69c31"
    assert audit.tensor_hash(numbers(5000).view(50, 100)) == "de7eec4d406b40dbdd98b90de6d6d898"


def test_no_thread_count_instruction_set_or_stride_shows(threads):
    x = numbers(300_000)
    want = audit.tensor_hash(x)
    for count in (2, 3, 8):
        threads(count)
        assert audit.tensor_hash(x) == want
    for isa in ("baseline", "avx2", ""):
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
            "x must hold data, got a meta tensor; pass tensors that do",
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
