"""One small study, trained once for all tests that only look at it."""

import pytest
from churn_trainer.study import run_study
from small_study import small_study


@pytest.fixture(scope="session")
def result():
    return run_study(small_study(), workers=2)
