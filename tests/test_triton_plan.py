"""How rows are shared out over a GPU: the plan is a pure function, tested as one."""

import itertools

import pytest
import torch

import churn_kernels as ck

pytestmark = pytest.mark.skipif("triton" not in ck.available_backends(), reason="no Triton here")

if "triton" in ck.available_backends():
    from churn_kernels._options import LossOptions
    from churn_kernels.triton import launch
    from churn_kernels.triton.plan import REGISTERS, SHORT, WARP, plan, power_of_two, widest_vector

CLASSES = [1, 2, 3, 10, 100, 255, 256, 257, 1000, 8142, 8192, 8193, 21841, 128256, 1_000_000]


@pytest.mark.parametrize("classes", CLASSES)
def test_every_plan_covers_its_rows(classes):
    for models, size, shift, plain, bounded in itertools.product(
        (1, 2, 3, 8), (2, 4, 8), (False, True), (False, True), (False, True)
    ):
        widest = widest_vector(models, size)
        for vector in {1, widest} if not shift else {widest}:
            found = plan(classes, models, size, vector, shift, plain, bounded)
            places = classes + (vector - 1 if shift else 0)
            for side in (found.height, found.width, found.warps):
                assert side == power_of_two(side)
            assert found.width % found.vector == 0
            assert 1 <= found.warps <= 16
            assert found.registers * WARP * found.warps <= REGISTERS
            if found.resident:
                assert found.block >= places
                assert found.inner * found.width <= classes  # parts without a mask lie in the row
            else:
                assert places > found.block  # the kernels rely on a first and a last block
            assert found.wide or not shift or classes < SHORT
            if found.wide:
                assert (found.height, found.width) == (1, found.warps * WARP * found.vector)
            else:
                assert found.parts == 1
                assert found.width >= places


@pytest.mark.parametrize(
    ("classes", "name", "warps"),
    [(10, "rows", 1), (100, "rows", 1), (1000, "resident", 1), (8142, "resident", 8)],
)
def test_a_pair_of_float32(classes, name, warps):
    found = plan(classes, 2, 4, 4, False, True, True)
    assert (found.name, found.warps) == (name, warps)


def test_wide_rows_take_two_sweeps_and_few_programs():
    two, one = (plan(classes, 2, 4, 4, False, True, True) for classes in (21841, 128256))
    assert (two.name, one.name) == ("sweeps", "sweeps")
    assert (two.registers, one.registers) == (64, 128)


def test_16_bit_rows_are_read_again_for_the_gradient():
    assert plan(1000, 2, 2, 8, False, True, True).again
    assert not plan(1000, 2, 4, 4, False, True, True).again


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_alignment(dtype):
    """How many classes are loaded at once, and whether from the vector before the row."""
    full = 16 // dtype.itemsize

    def found(*matrices, invariant=False):
        logits = launch.matrices(matrices)
        return launch.alignment(logits, matrices[0].shape[1], invariant)

    def pair(classes, width=None, offset=0):
        return [
            torch.zeros(4, width or classes, dtype=dtype)[:, offset : offset + classes]
            for _ in range(2)
        ]

    assert found(*pair(1024)) == (full, False)
    assert found(*pair(1001)) == (full, True)
    assert found(*pair(101)) == (1, False)  # too short to be worth it
    assert found(*pair(1001, 1009)) == (full, True) if full == 8 else (1, False)
    assert found(*pair(1001, 1008)) == (1, False)  # gradients would begin elsewhere
    assert found(*pair(1001, 1009, 1)) == (1, False)
    assert found(*(z.t().contiguous().t() for z in pair(1024))) == (1, False)
    assert found(*pair(1001), invariant=True) == (1, False)
    assert found(*pair(1002), invariant=True) == (2, False)
    assert found(*pair(1024, 1031, 1), invariant=True) == (full, False)


def test_a_single_column_lies_beside_itself():
    """Whatever its stride says."""
    column = torch.zeros(1, 4).t()
    assert column.stride() == (1, 4)
    assert not launch.matrices([column]).strided


def test_invariant_copies_only_what_lies_elsewhere():
    first = torch.zeros(4, 1024)
    second = torch.zeros(4, 1031)[:, 1:1025]
    fits = launch.as_planned(launch.matrices([first]), 4)
    copied = launch.as_planned(launch.matrices([first, second]), 4)
    assert fits.tensors[0] is first
    assert copied.row_strides == (1024, 1024)


def test_a_ramp_compiles_nothing_new():
    options = LossOptions(0.9, 0.1, 1.5, regularizer=1, divergence=1, temperature=2.0, top_k=3)
    later = options._replace(
        ce_weight=0.5, regularizer_weight=0.5, divergence_weight=3.0, temperature=4.0, top_k=7
    )
    assert launch.kind_of(options) == launch.kind_of(later)
    assert launch.kind_of(options) != launch.kind_of(options._replace(temperature=1.0))
    assert launch.kind_of(options) != launch.kind_of(options._replace(divergence_weight=0.0))
