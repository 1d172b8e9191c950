"""A fresh booted machine for each test, and the machine that those are made from."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from qmpsnap.pytest_plugin.fixtures import cache_folder, require_programs
from qmpsnap.pytest_plugin.session import FAILED

if TYPE_CHECKING:
    from qmpsnap import MachineHandle, sync
    from qmpsnap.pytest_plugin.supply import Supply


@pytest.fixture(scope="session")
def _qmpsnap_supply(request: pytest.FixtureRequest) -> "Iterator[Supply]":
    """The machines of this process."""
    require_programs()
    from qmpsnap.pytest_plugin.supply import Supply

    with ExitStack() as stack:
        yield Supply(request.config, stack, cache_folder())


@pytest.fixture(scope="session")
def qmpsnap_machine_sync(_qmpsnap_supply: "Supply") -> "sync.MachineHandle":
    """The machine that tests' machines are made from, as it was set up; for tests without asyncio."""
    from qmpsnap.pytest_plugin import wanted

    return _qmpsnap_supply.source(wanted.of_session(_qmpsnap_supply.config, _qmpsnap_supply.guest)).machine


@pytest.fixture(scope="session")
def qmpsnap_machine(qmpsnap_machine_sync: "sync.MachineHandle") -> "MachineHandle":
    """The machine that tests' machines are made from, as it was set up."""
    from qmpsnap.pytest_plugin.supply import awaited

    return awaited(qmpsnap_machine_sync)


@pytest.fixture
def _qmpsnap_taken(
    request: pytest.FixtureRequest, tmp_path: Path, _qmpsnap_supply: "Supply"
) -> "Iterator[sync.MachineHandle]":
    from qmpsnap.pytest_plugin import wanted

    item: pytest.Item = request.node
    with _qmpsnap_supply.taken(wanted.of_test(item, _qmpsnap_supply.guest)) as machine:
        yield machine
        if item.stash.get(FAILED, False):
            _qmpsnap_supply.keep(machine, item, tmp_path)


@pytest.fixture
def qmpsnap_fresh_sync(_qmpsnap_taken: "sync.MachineHandle") -> "sync.MachineHandle":
    """A running machine of this test alone, in the state in which it was set up; for tests without asyncio."""
    return _qmpsnap_taken


@pytest.fixture
def qmpsnap_fresh(_qmpsnap_taken: "sync.MachineHandle") -> "MachineHandle":
    """A running machine of this test alone, in the state in which it was set up."""
    from qmpsnap.pytest_plugin.supply import awaited

    return awaited(_qmpsnap_taken)
