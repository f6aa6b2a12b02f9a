"""What of `make sanitize` other runs rely on."""

import pytest
from sanitize import build, check_threads


@pytest.mark.nightly
def test_no_thread_races():
    """ThreadSanitizer sees a planted race, and no other."""
    check_threads(build("thread"))
