"""Exact sums against Python's integers, and that nothing but the numbers shows in their bits."""

import copy
import math
import pickle
import re
import struct
import zlib

import pytest
import torch
from exactness import (
    CASES,
    FINITE,
    INF,
    NAN,
    bits_of,
    float32_sum,
    float64_sum,
    normal,
    random_bits,
    results,
    shards,
    shuffled,
    tensor,
    units,
)
from torch.func import grad, vmap

import churn_kernels as ck
from churn_kernels import _backend, _ops, exact

pytestmark = pytest.mark.skipif(not _ops.LOADED, reason="the compiled library is not built")

every_case = pytest.mark.parametrize("name", CASES)


def words_of(x):
    return _ops.COMPILED.exact_words(x)


def rounded(words):
    return _ops.COMPILED.exact_round(words)


@pytest.fixture
def one_number():
    """A sum that is not exact in float64: 1 + 2^-149."""
    return ck.ExactSum().add(tensor(1.0, 2.0**-149))


class TestValue:
    @every_case
    def test_float32(self, name):
        value = ck.exact_sum(CASES[name])
        assert (value.shape, value.dtype) == ((), torch.float32)
        assert bits_of(value) == float32_sum(CASES[name])

    @every_case
    def test_float64(self, name):
        value, want = ck.ExactSum().add(CASES[name]).value(), float64_sum(CASES[name])
        assert struct.pack("<d", value) == struct.pack("<d", want)

    @pytest.mark.parametrize("size", [1, 511, 512, 513, 65536, 65537, 200001])
    def test_sizes(self, size):
        """Below, at and above what the CPU adds up in bins, block by block."""
        for x in (random_bits(size, size), normal(size, 1e-30)):
            assert bits_of(ck.exact_sum(x)) == float32_sum(x)

    def test_whatever_lies_above_a_half_rounds_up(self):
        """1, half of its last place, and a single bit anywhere below that."""
        for place in range(25, 150):
            x = tensor(1.0, 2.0**-24, 2.0**-place)
            assert bits_of(ck.exact_sum(x)) == float32_sum(x)
            assert bits_of(ck.exact_sum(-x)) == float32_sum(-x)
        for place in range(54, 150):
            x = tensor(1.0, 2.0**-53, 2.0**-place)
            assert ck.ExactSum().add(x).value() == 1 + 2.0**-52

    def test_specials_in_large_tensors(self):
        for name in ("NaN", "a NaN of other bits", "inf", "-inf", "both infinities"):
            x = shuffled(torch.cat([normal(100000), CASES[name]]))
            assert bits_of(ck.exact_sum(x)) == float32_sum(x)

    @pytest.mark.parametrize("place", [0, 600, 999])
    @pytest.mark.parametrize("special", [NAN, INF, -INF])
    def test_one_special_in_a_block(self, special, place):
        x = normal(1000)
        x[place] = special
        assert bits_of(ck.exact_sum(x)) == float32_sum(x)

    def test_blocks_of_subnormal_and_the_smallest_normal_numbers(self):
        x = (random_bits(5, 3000).view(torch.int32) & -0x7F000001).view(torch.float32)
        for numbers in (x, x.abs(), -x.abs()):
            assert bits_of(ck.exact_sum(numbers)) == float32_sum(numbers)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision(self, dtype):
        bits = torch.arange(-(2**15), 2**15).to(torch.int16)
        every = bits.view(dtype)
        every = torch.where(every.isfinite(), every, 0)
        for x in (every[every > 0], every[: 2**15 + 5], normal().to(dtype)):
            assert bits_of(ck.exact_sum(x)) == float32_sum(x.float())

    @pytest.mark.parametrize(
        "view",
        [
            lambda x: x.view(10, 100).t(),
            lambda x: x.view(5, 10, 20)[1:4, ::3, 2:17:2],
            lambda x: x[7].expand(3, 5),
            lambda x: x.view(2, 5, 10, 10).to(memory_format=torch.channels_last),
            lambda x: x.flip(0)[1:],
            lambda x: x[3],
            lambda x: x.view(0, 3) if len(x) == 0 else x.view(10, 100)[:, :0],
        ],
    )
    def test_shapes_and_strides(self, view):
        x = view(normal(1000))
        assert bits_of(ck.exact_sum(x)) == float32_sum(x)


class TestOrder:
    @every_case
    def test_no_order_shows(self, name):
        assert results(ck.exact_sum, CASES[name]) == {float32_sum(CASES[name])}

    @pytest.mark.parametrize("name", ["normal", "far from 0", "cancels but for a few"])
    def test_the_check_catches_a_sum_that_has_an_order(self, name):
        assert len(results(torch.sum, CASES[name])) > 1

    @every_case
    @pytest.mark.parametrize("count", [1, 2, 3, 7, 64])
    def test_no_sharding_shows(self, name, count):
        x = shuffled(CASES[name], count)
        parts = shards(x, count)
        words = sum(words_of(part) for part in parts)
        assert bits_of(rounded(words)) == float32_sum(x)
        merged = ck.ExactSum()
        for part in parts:
            merged.merge(ck.ExactSum().add(part))
        assert merged.to_bytes() == ck.ExactSum().add(x).to_bytes()

    def test_no_number_of_threads_shows(self):
        x = torch.cat([random_bits(5, 300000), normal(300000)])
        threads = torch.get_num_threads()
        found = set()
        try:
            for count in (1, 2, 3, 8):
                torch.set_num_threads(count)
                found.add(bits_of(words_of(x)))
        finally:
            torch.set_num_threads(threads)
        assert len(found) == 1
        assert bits_of(ck.exact_sum(x)) == float32_sum(x)

    @pytest.mark.parametrize("name", ["subnormal", "about the smallest normal", "1e38 and 1e-38"])
    def test_flushing_subnormals_does_not_show(self, name):
        x = CASES[name]
        half = torch.arange(1, 1024).to(torch.int16).view(torch.bfloat16)
        want, want_half = float32_sum(x), float32_sum(half.float())
        want_repeated = float32_sum(x.repeat(1001))  # in bins
        if not torch.set_flush_denormal(True):
            pytest.skip("this processor does not flush")
        try:
            assert (tensor(2.0**-126) * 0.5).item() == 0, "nothing is flushed"
            assert bits_of(ck.exact_sum(x)) == want
            assert bits_of(ck.exact_sum(x.repeat(1001))) == want_repeated
            assert bits_of(ck.exact_sum(half)) == want_half
            flushed = ck.ExactSum().add(x).to_bytes()
        finally:
            torch.set_flush_denormal(False)
        assert bits_of(ck.exact_sum(x)) == want
        assert ck.ExactSum().add(x).to_bytes() == flushed

    @every_case
    def test_words_are_normalised(self, name):
        """One set of words for one value, whatever was added on the way."""
        x = CASES[name]
        words = words_of(x).tolist()
        assert all(0 <= lane < 2**32 for lane in words[:8])
        counts = [x.isnan().sum(), (x == math.inf).sum(), (x == -math.inf).sum()]
        assert words[9:] == [int(count) for count in counts]
        if name in FINITE:
            assert sum(lane << 32 * i for i, lane in enumerate(words[:9])) == units(x)


class TestGradient:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
    def test_is_the_upstream(self, dtype):
        x = normal(12).view(3, 4).t().to(dtype).requires_grad_()
        ck.exact_sum(x).backward(torch.tensor(0.3))
        assert torch.equal(x.grad, torch.full((4, 3), 0.3, dtype=dtype))

    def test_second_derivatives(self):
        x = normal(5).requires_grad_()
        (first,) = torch.autograd.grad(ck.exact_sum(x**3), x, create_graph=True)
        (second,) = torch.autograd.grad(ck.exact_sum(first), x)
        torch.testing.assert_close(second, 6 * x.detach())

    def test_of_no_elements(self):
        x = torch.zeros(0, 3, requires_grad=True)
        ck.exact_sum(x).backward()
        assert x.grad.shape == (0, 3)

    def test_functorch(self):
        x = normal(12).view(3, 4)
        assert torch.equal(grad(lambda z: ck.exact_sum(z * z))(x), 2 * x)
        assert torch.equal(vmap(ck.exact_sum, 1)(x), torch.stack([*map(ck.exact_sum, x.t())]))
        assert torch.equal(vmap(grad(lambda z: ck.exact_sum(z * z)))(x), 2 * x)

    # torch.compile makes an instance of whatever autograd.Function it traces, and is warned.
    @pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_torch_compile(self, dtype):
        torch.compiler.reset()
        x = normal(12).view(3, 4).to(dtype).requires_grad_()

        def function(z):
            return 3 * ck.exact_sum(z * z)

        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x), function(x))
        got, want = (torch.autograd.grad(f(x), x)[0] for f in (compiled, function))
        assert torch.equal(got, want)
        assert torch.equal(compiled(x.detach()), function(x.detach()))


class TestOps:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
    def test_registrations(self, dtype):
        x = normal(10).to(dtype)
        torch.library.opcheck(_ops.COMPILED.exact_words, (x.view(2, 5).t(),))
        torch.library.opcheck(_ops.COMPILED.exact_round, (words_of(x),))

    def test_words_of_another_kind_are_refused(self):
        for words in (torch.zeros(12), torch.zeros(11, dtype=torch.int64)):
            with pytest.raises(RuntimeError, match="words must be what"):
                rounded(words)
        with pytest.raises(RuntimeError, match="x must be a float32, float16 or bfloat16"):
            words_of(torch.zeros(2, dtype=torch.float64))


class TestExactSum:
    def test_any_number_of_adds(self, monkeypatch):
        """More tensors, or elements, than may wait where they are."""
        for limit in ("_MOST_TENSORS", "_MOST_ELEMENTS"):
            with monkeypatch.context() as patch:
                patch.setattr(exact, limit, 3)
                total = ck.ExactSum()
                x = CASES["every exponent"]
                for part in x.split(7):
                    total.add(part)
                assert total == ck.ExactSum().add(x)
                assert total.value() == float64_sum(x)

    def test_add_and_merge_return_the_sum(self):
        total = ck.ExactSum()
        assert total.add(tensor(1.0)) is total
        assert total.merge(ck.ExactSum().add(tensor(2.0))) is total
        assert total.merge(total) is total
        assert total.value() == 6.0

    def test_merge_leaves_the_other(self, one_number):
        before = one_number.to_bytes()
        ck.ExactSum().add(tensor(5.0)).merge(one_number).add(tensor(7.0))
        assert one_number.to_bytes() == before

    def test_equality_is_of_the_exact_sum(self, one_number):
        assert one_number == ck.ExactSum().add(tensor(2.0**-149)).add(tensor(0.5, 0.5))
        one = ck.ExactSum().add(tensor(1.0))
        assert one != one_number
        assert one.value() == one_number.value()
        assert one != 1.0
        assert ck.ExactSum().add(tensor(math.inf)) != ck.ExactSum().add(tensor(math.inf, math.inf))
        with pytest.raises(TypeError, match="unhashable"):
            hash(one)

    def test_repr(self):
        assert repr(ck.ExactSum().add(tensor(0.5, 0.25))) == "ExactSum(value=0.75)"

    @pytest.mark.parametrize(
        "duplicate", [copy.copy, copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))]
    )
    def test_copies_are_their_own(self, one_number, duplicate):
        before = one_number.to_bytes()
        other = duplicate(one_number)
        assert other == one_number
        other.add(tensor(1.0))
        assert other != one_number
        assert one_number.to_bytes() == before

    def test_does_not_follow_gradients(self):
        x = normal(5).requires_grad_()
        assert ck.ExactSum().add(x * 2) == ck.ExactSum().add(x.detach() * 2)


class TestBytes:
    @every_case
    def test_round_trip(self, name):
        total = ck.ExactSum().add(CASES[name])
        data = total.to_bytes()
        assert len(data) == 84
        again = ck.ExactSum.from_bytes(bytearray(data))
        assert again == total
        assert again.to_bytes() == data

    @pytest.mark.parametrize("spec", [1, 2])
    def test_what_was_written_stays_readable(self, spec):
        """-(1 + 2^-149) and an infinity, as each EXACT_SPEC writes them."""
        lanes = (-(2**149) - 1).to_bytes(48, "little", signed=True)
        head = b"CKXS" + struct.pack("<I", spec) + lanes + struct.pack("<3Q", 0, 1, 0)
        data = head + struct.pack("<I", zlib.crc32(head))
        total = ck.ExactSum().add(tensor(-1.0, -(2.0**-149), math.inf))
        assert (total.to_bytes() == data) == (spec == ck.EXACT_SPEC)
        assert ck.ExactSum.from_bytes(data) == total

    def test_every_damaged_byte_shows(self, one_number):
        data = one_number.to_bytes()
        for place in range(len(data)):
            for bit in (1, 0x80):
                damaged = bytearray(data)
                damaged[place] ^= bit
                with pytest.raises(ValueError, match="data must be what"):
                    ck.ExactSum.from_bytes(bytes(damaged))

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda data: b"", "data must be what ExactSum.to_bytes() returned, which begins with"),
            (lambda data: b"PK\x03\x04" + data, "begins with b'CKXS'; got b'PK\\x03\\x04'"),
            (lambda data: data[:-1], "84 bytes; got 83: was it truncated or joined?"),
            (lambda data: data + data, "84 bytes; got 168: was it truncated or joined?"),
            (lambda data: data[:9] + b"\xff" + data[10:], "its checksum is wrong"),
        ],
    )
    def test_other_bytes_are_refused(self, one_number, change, message):
        with pytest.raises(ValueError, match=re.escape(message)):
            ck.ExactSum.from_bytes(change(one_number.to_bytes()))

    @pytest.mark.parametrize("spec", [0, ck.EXACT_SPEC + 1 if _ops.LOADED else 0, 2**32 - 1])
    def test_another_specification_is_refused(self, one_number, spec):
        head = one_number.to_bytes()[:-4]
        head = head[:4] + struct.pack("<I", spec) + head[8:]
        message = f"under EXACT_SPEC 1 to {ck.EXACT_SPEC}, got {spec}; read it with the version"
        with pytest.raises(ValueError, match=message):
            ck.ExactSum.from_bytes(head + struct.pack("<I", zlib.crc32(head)))

    def test_other_types_are_refused(self):
        message = r"data must be bytes, got str; pass what to_bytes\(\) returned"
        with pytest.raises(TypeError, match=message):
            ck.ExactSum.from_bytes("CKXS")


class TestArguments:
    @pytest.mark.parametrize("function", [ck.exact_sum, lambda x: ck.ExactSum().add(x)])
    @pytest.mark.parametrize(
        ("value", "got"),
        [
            (torch.zeros(2, dtype=torch.float64), "torch.float64; pass x.float()"),
            (torch.zeros(2, dtype=torch.int64), "torch.int64; pass x.float()"),
            (torch.zeros(2, dtype=torch.bool), "torch.bool; pass x.float()"),
            (torch.zeros(2, dtype=torch.complex64), "torch.complex64; pass x.real and x.imag"),
            ([1.0, 2.0], "list; pass torch.tensor(x)"),
            (1.0, "float; pass torch.tensor(x)"),
        ],
    )
    def test_wrong_numbers(self, function, value, got):
        message = f"x must be a float32, float16 or bfloat16 tensor, got {got}"
        with pytest.raises(TypeError, match=re.escape(message)):
            function(value)

    def test_merge_takes_sums_only(self):
        message = r"other must be an ExactSum, got Tensor; add tensors with add\(\)"
        with pytest.raises(TypeError, match=message):
            ck.ExactSum().merge(tensor(1.0))

    def test_without_the_library(self, monkeypatch):
        monkeypatch.setattr(_backend, "_OPS", {})
        monkeypatch.setattr(_ops, "LOADED", False)
        message = (
            "cannot sum exactly on cpu: the compiled library is missing; "
            f"build it with `{_backend.BUILD_COMMAND}`"
        )
        with pytest.raises(RuntimeError, match=re.escape(message)):
            ck.exact_sum(tensor(1.0))
        monkeypatch.setattr(exact, "EXACT_SPEC", None)
        message = "ExactSum needs the compiled library, which is missing; build it with"
        with pytest.raises(RuntimeError, match=message):
            ck.ExactSum()

    def test_on_a_device_without_kernels(self):
        message = r"cannot sum exactly on meta: churn_kernels has no kernel for it; pass x.cpu\(\)"
        with pytest.raises(RuntimeError, match=message):
            ck.exact_sum(torch.zeros(2, device="meta"))

    def test_on_a_gpu_that_lacks_something(self, monkeypatch):
        class OnGpu:
            is_cpu = False
            device = torch.device("cuda", 0)

        monkeypatch.setattr(_backend, "_gpu_problem", lambda index: "Triton is not installed")
        message = r"cannot sum exactly on cuda:0: Triton is not installed; pass x.cpu\(\)"
        with pytest.raises(RuntimeError, match=message):
            _backend.exact_ops(OnGpu())

    def test_the_specification_is_the_librarys(self):
        from churn_kernels._C import constants

        assert ck.EXACT_SPEC == constants.kExactSpec == 2
