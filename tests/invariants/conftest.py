"""What the invariants' tests share."""

import pytest


@pytest.fixture
def long(request: pytest.FixtureRequest) -> bool:
    """Whether `--long` was given: the test then runs at full length, otherwise at a length for every day."""
    return bool(request.config.getoption("--long"))
