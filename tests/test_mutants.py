"""The list of `make mutants` fits the sources; the tool tells the killed from the survivors."""

import pytest
from mutants import ROOT, Mutant, load

MUTANTS = load()


def test_there_are_enough():
    compiled = [mutant for mutant in MUTANTS if mutant.file.startswith("csrc/")]
    triton = [mutant for mutant in MUTANTS if mutant.file.startswith("churn_kernels/triton/")]
    assert len(compiled) >= 40
    assert len(triton) >= 20
    assert len(set(MUTANTS)) == len(MUTANTS) == len(compiled) + len(triton)


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_every_mutant_applies(mutant):
    """To one place, where it changes something; and what should see it is there."""
    assert mutant.applied() != (ROOT / mutant.file).read_text()
    assert mutant.tests
    for test in mutant.tests.split():
        file, _, names = test.partition("::")
        text = (ROOT / file).read_text()
        for name in filter(None, names.partition("[")[0].split("::")):
            assert f"def {name}(" in text or f"class {name}" in text, test


@pytest.mark.parametrize("old", ["no line says this", "int64_t"])
def test_a_line_that_is_not_there_once(old):
    mutant = Mutant("csrc/cpu/hash.cpp", old, "", "tests/test_audit_hash.py")
    with pytest.raises(ValueError, match=f"must hold '{old}' once, and has it"):
        mutant.applied()
