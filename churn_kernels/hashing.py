"""Position-sensitive 128-bit hashes of tensors, computed as order-independent sums.

    word[k] = sum over the bytes, four at a time as one number, of number * key_k(place) mod 2^64

for k = 0, 1 (csrc/rows/hash.h). The sums do not depend on their order, so neither on threads,
devices or strides, and the words of pieces of a tensor add up. Keys are odd and differ by position,
so every change within one of these 32-bit numbers changes both words, and so does every swap of two
of them within a block of 4096 bytes. Elements of at most four bytes lie within one number: every
change and every such swap of them is detected, be it a signed zero, a NaN payload or one ulp.
Wider elements span several numbers. Differences in several numbers cancel with a probability of
about 2^-63 per word, at worst 2^-32 per word if they are only in the numbers' highest bits.
The hash is not cryptographic: collisions can be constructed.
"""

import hashlib
import struct
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from churn_kernels import _backend, _placements
from churn_kernels._constants import CONSTANTS, hash_keys
from churn_kernels._ops import BUILD_COMMAND
from churn_kernels._splitmix import mixed, signed

HASH_SPEC: int | None = CONSTANTS and CONSTANTS.kHashSpec
"""Version of the hashes: equal versions give equal hashes on every machine and device.

None if the compiled library, which defines it, was not built.
"""

_SLICE = 1 << 20  # numbers hashed at a time without a kernel


def tensor_hash(x: Tensor) -> str:
    """128 bits of a tensor's elements, dtype and shape, as 32 hexadecimal digits.

    Args:
        x: of any dtype, shape, strides, layout and device. Non-contiguous tensors are copied first;
            sparse tensors are hashed by their coalesced indices and values, quantised ones by
            their integers, scales and zero points. DTensors are hashed as a whole: every rank
            of the mesh must call, and 16 bytes are all-reduced over the ranks that shard it.
    Returns: the same for the same bits, dtype and shape, on every machine and for every placement
        of `Shard` and `Replicate`. Synchronises with a GPU.
    Raises: TypeError for anything but a tensor; ValueError for a tensor without data (meta, fake,
        nested), and for a DTensor that is neither sharded nor replicated; RuntimeError if the
        compiled library is missing.
    """
    check(x)
    if is_dense(x):
        return hash_of_words(words_of([x])[0], x.dtype, x.shape)
    digest = hashlib.blake2b(digest_size=16)
    digest.update(f"{x.layout} {x.dtype} {tuple(x.shape)} {x.is_quantized}".encode())
    for dense in _dense_parts(x.detach()):
        digest.update(bytes.fromhex(tensor_hash(dense)))
    return digest.hexdigest()


def hash_of_words(words: Tensor, dtype: torch.dtype, shape: Sequence[int]) -> str:
    """The hash of the tensor with these words; see `hash_words`.

    Args:
        words: (2,) int64.
        dtype, shape: of the whole tensor.
    Returns: 32 hexadecimal digits: BLAKE2b of HASH_SPEC, dtype, shape and words.
    """
    head = f"churn_kernels {HASH_SPEC} {dtype} {tuple(shape)} ".encode()
    return hashlib.blake2b(head + struct.pack("<2q", *words.tolist()), digest_size=16).hexdigest()


def hash_words(x: Tensor, first: int = 0) -> Tensor:
    """The two words of a tensor, or of a piece of one.

    The words of the pieces add up to those of the whole:

        words = hash_words(x[:10]) + hash_words(x[10:], first=x[:10].numel())
        hash_of_words(words, x.dtype, x.shape) == tensor_hash(x)

    Over processes, sum them by an int64 all-reduce of 16 bytes; for a DTensor this is done here.

    Args:
        x: dense, of any dtype, shape, strides and device; or a DTensor, as in `tensor_hash`.
        first: number of elements of the whole tensor before the piece, in row-major order; the
            piece is contiguous in that order. 0 for a DTensor.
    Returns: (2,) int64 on x's device. Does not wait for a GPU.
    Raises: as `tensor_hash`, and ValueError for sparse and quantised tensors, and for first < 0;
        RuntimeError during CUDA graph capture, because a replay would read other memory contents.
    """
    check(x)
    if not is_dense(x):
        raise ValueError(
            f"x must be dense, got a {'quantised' if x.is_quantized else x.layout} tensor; "
            f"pass it to tensor_hash"
        )
    if first < 0:
        raise ValueError(f"first must be at least 0, got {first}; it counts the elements before x")
    if first and _placements.is_placed(x):
        raise ValueError(f"first must be 0 for a DTensor, which knows its offsets; got {first}")
    return words_of([x], first)[0]


def check(x: object) -> None:
    """Raise the errors of `tensor_hash` for tensors that cannot be hashed."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor, got {type(x).__name__}; pass torch.as_tensor(x)")
    if CONSTANTS is None:
        raise RuntimeError(
            f"hashes need the compiled library, which is missing; build it with `{BUILD_COMMAND}`"
        )
    if x.is_meta or x.is_nested or isinstance(x, torch._subclasses.FakeTensor):
        kind = "nested" if x.is_nested else "meta" if x.is_meta else "fake"
        raise ValueError(f"x must hold data, got a {kind} tensor; pass a materialised dense tensor")


def is_dense(x: Tensor) -> bool:
    """Whether a tensor has words; other tensors are hashed as several dense ones."""
    return x.layout == torch.strided and not x.is_quantized


@torch.no_grad()
def words_of(tensors: Sequence[Tensor], first: int = 0) -> Tensor:
    """The words (tensors, 2) of dense tensors on one device that passed `check`.

    Args:
        first: number of elements before the tensor; only for a single tensor.
    """
    if not any(map(_placements.is_placed, tensors)):
        return _words_of_pieces([_whole(x, first) for x in tensors])
    pieces: list[Piece] = []
    counts = []
    for x in tensors:
        found = _pieces(x) if _placements.is_placed(x) else [_whole(x, 0)]
        pieces += found
        counts.append(len(found))
    words = _words_of_pieces(pieces)
    if len(pieces) != len(tensors):
        words = torch.stack([part.sum(0) for part in words.split(counts)])
    return _placements.add_up(words, tensors)


class Piece(NamedTuple):
    """Bytes of a tensor: byte b of `bits` is byte first + b // run * step + b % run of it."""

    bits: Tensor  # contiguous
    first: int
    run: int  # divides the number of bytes
    step: int


def _whole(x: Tensor, first: int) -> Piece:
    bits = _contiguous(x)
    whole = bits.nbytes or 1
    return Piece(bits, first * bits.element_size(), whole, whole)


def _contiguous(x: Tensor) -> Tensor:
    if x.is_contiguous() and not (x.is_conj() or x.is_neg()):
        return x
    return x.resolve_conj().resolve_neg().contiguous()


def _pieces(x: Tensor) -> list[Piece]:
    """What this process holds of a DTensor."""
    local, boxes = _placements.boxes(x)
    bits = _contiguous(local)
    size = bits.element_size()
    return [
        Piece(bits.view(-1)[box.begin : box.end], box.first * size, box.run * size, box.step * size)
        for box in boxes
    ]


def _words_of_pieces(pieces: Sequence[Piece]) -> Tensor:
    if pieces[0].bits.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("hashes cannot be captured in a CUDA graph; hash outside the graph")
    op = _backend.hash_op(pieces[0].bits)
    if op is None:
        return torch.stack([words_in_pytorch(piece) for piece in pieces])
    bits, first, run, step = zip(*pieces, strict=True)
    words: Tensor = op(bits, first, run, step)
    return words


def words_in_pytorch(piece: Piece) -> Tensor:
    """The words (2,) of a piece, computed by PyTorch operations on any device.

    An element of at most four bytes lies within one 32-bit number, one of eight bytes is two.
    """
    bits, first, run, step = piece
    width = min(4, bits.element_size())
    if bits.is_complex():
        bits = torch.view_as_real(bits)
    kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[width]
    keys, size = hash_keys(bits.device), CONSTANTS.kHashBlock
    total = torch.zeros(CONSTANTS.kHashWords, dtype=torch.int64, device=bits.device)
    begin = 0
    for numbers in bits.reshape(-1).view(kind).split(_SLICE) if bits.numel() else ():
        own = torch.arange(begin, begin + len(numbers), device=bits.device) * width
        byte = first + own // run * step + own % run
        place = byte // CONSTANTS.kHashPart
        part = numbers.to(torch.int64) & ((1 << 8 * width) - 1)
        part = part << 8 * (byte % CONSTANTS.kHashPart)
        for word in range(CONSTANTS.kHashWords):
            key = keys[word, place % size] * _block_keys(word, place // size)
            total[word] += (part * key).sum()
        begin += len(numbers)
    return total


def _dense_parts(x: Tensor) -> list[Tensor]:
    """Dense tensors that determine a tensor that is not dense."""
    if x.is_quantized:
        return _quantised(x)
    if x.layout == torch.sparse_coo:
        x = x.coalesce()
        return [x.indices(), x.values()]
    if x.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [x.crow_indices(), x.col_indices(), x.values()]
    if x.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [x.ccol_indices(), x.row_indices(), x.values()]
    return [x.to_dense()]


def _quantised(x: Tensor) -> list[Tensor]:
    if x.qscheme() in (torch.per_tensor_affine, torch.per_tensor_symmetric):
        scale = torch.tensor([x.q_scale(), x.q_zero_point()], dtype=torch.float64, device="cpu")
        return [x.int_repr(), scale]
    axis = torch.tensor([x.q_per_channel_axis()], device="cpu")
    return [x.int_repr(), x.q_per_channel_scales(), x.q_per_channel_zero_points(), axis]


def _block_keys(word: int, blocks: Tensor) -> Tensor:
    """`block_key` of csrc/rows/hash.h."""
    return mixed(blocks + signed(((word + 1) << 56) + CONSTANTS.kHashStep)) | 1
