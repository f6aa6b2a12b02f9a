"""One small study, trained once for all tests that only look at it."""

import pytest
from small_study import local_study, small_study


@pytest.fixture(scope="session")
def result(tmp_path_factory):
    return local_study(small_study(), tmp_path_factory.mktemp("study"))
