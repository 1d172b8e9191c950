"""A pytest suite that boots its machine once; every test starts from the running machine as it was after the boot.

Usage: SPEC=machine.yaml pytest test_warm_machine.py

The session fixture boots the machine in a temporary home and takes a full snapshot once its agent answers. The fixture
of each test reverts to that snapshot, which takes less time than a boot and undoes whatever the last test left behind.
"""

import asyncio
import os
import tempfile
from collections.abc import AsyncIterator, Iterator

import pytest
import pytest_asyncio

import qmpsnap


async def boot(home: str) -> None:
    """Start the machine and keep its state as the snapshot ``warm``."""
    async with qmpsnap.open(home) as q:
        vm = await q.define(os.environ["SPEC"])
        await vm.start()
        await vm.run("true", timeout=180)
        await vm.snapshot("warm", kind="full")


async def shut_down(home: str) -> None:
    """End every QEMU of this home."""
    async with qmpsnap.open(home) as q:
        for vm in await q.machines():
            if await vm.is_running():
                await vm.stop(force=True)


@pytest.fixture(scope="session")
def home() -> Iterator[str]:
    """A home with one booted machine."""
    with tempfile.TemporaryDirectory(prefix="warm-") as folder:
        try:
            asyncio.run(boot(folder))
            yield folder
        finally:
            asyncio.run(shut_down(folder))


@pytest_asyncio.fixture
async def vm(home: str) -> AsyncIterator[qmpsnap.MachineHandle]:
    """The machine as it was right after its boot."""
    async with qmpsnap.open(home) as q:
        (machine,) = await q.machines()
        await machine.revert("warm", discard=True)
        yield machine


@pytest.mark.asyncio
@pytest.mark.parametrize("attempt", [1, 2, 3])
async def test_no_test_sees_the_files_of_another(vm: qmpsnap.MachineHandle, attempt: int) -> None:
    await vm.run(f"test ! -e /run/mine && echo {attempt} > /run/mine")
