"""One warm process for all tests here."""

from collections.abc import Iterator

import pytest

from tests.faults.driver import Driver


@pytest.fixture(scope="session")
def driver() -> Iterator[Driver]:
    running = Driver()
    yield running
    running.close()
