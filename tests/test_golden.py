"""Golden vectors: bits of exact mode that move without a new EXACT_SPEC fail here."""

import json
import struct

import golden_vectors as golden
import pytest
import torch

import churn_kernels as ck
from churn_kernels import _ops
from churn_kernels._options import LossOptions

pytestmark = pytest.mark.skipif(not _ops.LOADED, reason="the compiled library was not built")

ADVICE = (
    "exact mode gave other bits than tests/golden has for this EXACT_SPEC: undo that, or raise "
    "kExactSpec in csrc/rows/constants.h, run `python tests/golden_vectors.py`, tell CHANGELOG.md"
)


@pytest.fixture(scope="module")
def vectors():
    return json.loads(golden.path(ck.EXACT_SPEC).read_text())


def stored(case):
    """A case's inputs, out of its bytes."""
    dtype = golden.DTYPES[case["dtype"]]
    shape = case["rows"], case["classes"]
    logits = [golden.from_hex(text, dtype, *shape) for text in case["logits"]]
    weight = case["class_weight"]
    weight = None if weight is None else golden.from_hex(weight, torch.float32, case["classes"])
    return logits, torch.tensor(case["target"]), weight, LossOptions(**case["options"])


def test_the_file_is_of_this_spec(vectors):
    assert vectors["spec"] == ck.EXACT_SPEC
    assert set(vectors["losses"]) == set(golden.CASES)


@pytest.mark.parametrize("name", golden.CASES)
@pytest.mark.parametrize("backend", ["cpu", pytest.param("triton", marks=pytest.mark.gpu)])
def test_losses(vectors, name, backend):
    if backend not in ck.available_backends():
        pytest.skip(f"backend {backend!r} is not here")
    case = vectors["losses"][name]
    device = "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"
    logits, target, weight, options = stored(case)
    logits, target = [z.to(device) for z in logits], target.to(device)
    weight = None if weight is None else weight.to(device)
    found = golden.results(logits, target, weight, options, backend)
    assert found == case["results"], ADVICE


@pytest.mark.parametrize("name", golden.CASES)
def test_inputs_come_from_their_seed(vectors, name):
    case = vectors["losses"][name]
    logits, target, _ = golden.inputs(case["seed"])
    assert [golden.to_hex(z) for z in logits] == case["logits"]
    assert target.tolist() == case["target"]


def test_sums(vectors):
    for case in vectors["sums"]:
        x = (
            golden.from_hex(case["numbers"], torch.float32, -1)
            if case["numbers"]
            else torch.zeros(0)
        )
        total = ck.ExactSum().add(x)
        assert golden.to_hex(ck.exact_sum(x).reshape(1)) == case["float32"], ADVICE
        assert struct.pack("<d", total.value()).hex() == case["float64"], ADVICE
        assert total.to_bytes().hex() == case["bytes"], ADVICE


def test_fast_mode_is_caught(vectors):
    """The vectors tell exact arithmetic from what is merely close to it."""
    caught = 0
    for name in golden.CASES:
        logits, target, weight, options = stored(vectors["losses"][name])
        found = golden.results(logits, target, weight, options._replace(mode=0), "cpu")
        caught += found != vectors["losses"][name]["results"]
    assert caught == len(golden.CASES)
