"""What a test suite with the pytest plugin sees through mypy strict; checked, never run.

Every line marked ``type: ignore`` is a mistake that must be found: strict mypy complains when it no longer is one.
"""

from pathlib import Path
from typing import Any, assert_type

import pytest

import qmpsnap
from qmpsnap import sync
from qmpsnap.pytest_plugin import hooks
from qmpsnap.testing import GREETING, HELLO, Close, Event, Expect, Raw, Refuse, Reply, Scripted, Turn, scripted
from qmpsnap.testing import scripted_sync as in_a_thread


def pytest_qmpsnap_set_up(machine: sync.MachineHandle, config: pytest.Config) -> None:
    """As a suite's conftest.py has it."""
    hooks.pytest_qmpsnap_set_up(machine=machine, config=config)
    assert_type(machine.run("mkfs.ext4 -q /dev/vda").exit_status, int)
    machine.put(config.rootpath / "app.tar", "/mnt/app.tar")
    hooks.pytest_qmpsnap_set_up(machine, config, "more")  # type: ignore[call-arg]


@pytest.mark.qmpsnap(memory="1G", disks=[{"name": "data", "size": "64M"}])
def test_sync(qmpsnap_fresh_sync: sync.MachineHandle, qmpsnap_machine_sync: sync.MachineHandle) -> None:
    """With the fixtures for tests without asyncio."""
    assert_type(qmpsnap_fresh_sync.run("true").stdout, str)
    assert_type(qmpsnap_fresh_sync.snapshot("dirty"), qmpsnap.Snapshot)
    assert_type(qmpsnap_machine_sync.snapshots(), tuple[qmpsnap.Snapshot, ...])


async def test_async(
    qmpsnap_fresh: qmpsnap.MachineHandle,
    qmpsnap_small_guest: qmpsnap.MachineHandle,
    qmpsnap_controller: qmpsnap.Controller,
) -> None:
    """With those for coroutines."""
    assert_type((await qmpsnap_fresh.run("true")).stdout, str)
    assert_type(await qmpsnap_small_guest.state(), qmpsnap.State)
    assert_type(await qmpsnap_controller.machine("guest"), qmpsnap.MachineHandle)


async def test_a_client(tmp_path: Path) -> None:
    """With the scripted monitor."""
    assert_type(GREETING, dict[str, Any])
    assert_type(HELLO, tuple[Turn, ...])
    turns: tuple[Turn, ...] = (
        *HELLO, Expect("stop"), Reply(), Refuse("GenericError", "no"), Event("STOP", at=2), Raw(b"{"), Close(),
    )  # fmt: skip
    async with scripted(tmp_path / "qmp", *turns, Expect("quit", ...)) as monitor:
        assert_type(monitor, Scripted)
        assert_type(monitor.said, list[dict[str, Any]])
    with in_a_thread(tmp_path / "qmp", *turns) as monitor:
        assert_type(monitor, Scripted)
        monitor.verify()
    scripted(tmp_path / "qmp", "quit")  # type: ignore[arg-type]
    Expect(("stop",))  # type: ignore[arg-type]
