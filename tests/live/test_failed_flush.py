"""A disk that fails while a job copies, and works again: what ends the operation, and that nothing is lost."""

from contextlib import ExitStack
from pathlib import Path

import anyio
import pytest

import qmpsnap
from qmpsnap.errors import OperationPending
from qmpsnap.qmp.jobs import JobStuck
from tests.harness import hanging
from tests.live.machine import MIB, ONE_DISK, active_hash, fill, hold_invariants


async def test_qemu_has_to_end_once_a_flush_has_failed(home: Path) -> None:
    if reason := hanging.lacking():
        pytest.skip(reason)
    with hanging.mounted(home / "machines") as storage, ExitStack() as failing:
        async with qmpsnap.open(home) as q:
            vm = await q.define(ONE_DISK)
            await vm.start(paused=True)
            await vm.snapshot("s")
            await fill(vm, "vda", 0x55, length=4 * MIB)
            before = await active_hash(vm)

            async def fail() -> None:
                while not await vm.jobs():
                    await anyio.sleep(0.05)
                failing.enter_context(storage.hang("fsync!"))
                await vm.set_speed(0)

            async with anyio.create_task_group() as tasks:
                tasks.start_soon(fail)
                with pytest.raises(JobStuck, match="is paused: a write failed"):
                    await vm.commit("vda", consume=True, bandwidth=1024)
            failing.close()
            with pytest.raises(JobStuck):  # the disk works again, and QEMU does not ask it
                await vm.wait()
            for end in (vm.cancel, vm.recover):
                with pytest.raises(OperationPending, match="Error flushing drive") as pending:
                    await end()
                assert "await vm.stop(force=True)" in str(pending.value.hint)
            await vm.stop(force=True)
            await vm.recover()
            assert await active_hash(vm) == before
            await vm.commit("vda", consume=True)
            assert await active_hash(vm) == before
            await hold_invariants(vm)
