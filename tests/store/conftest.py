"""What all tests of the store begin with."""

import shutil
from collections.abc import Iterator

import pytest

from tests.store.samples import MACHINES


@pytest.fixture(autouse=True)
def no_machines() -> Iterator[None]:
    """The machines' folder, in which their records are, is not there before a test nor after it."""
    shutil.rmtree(MACHINES.parent, ignore_errors=True)
    yield
    shutil.rmtree(MACHINES.parent, ignore_errors=True)
