"""Shared stacks: one per concurrency, started when the first test needs it."""

import pytest
from harness import Stack


@pytest.fixture(scope="session", params=[1, 4], ids=["1-worker", "4-workers"])
def any_stack(request):
    """The whole system, with one worker and with four."""
    with Stack(concurrency=request.param) as stack:
        yield stack


@pytest.fixture(scope="session")
def stack():
    """The whole system with two workers, for what does not depend on their number."""
    with Stack(concurrency=2) as stack:
        yield stack


@pytest.fixture(scope="module")
def fresh():
    """A system of the module's own, to break."""
    with Stack(concurrency=2) as stack:
        yield stack
