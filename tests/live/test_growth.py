"""What grows while a machine lives: logs that a guest fills, and whatever a process keeps of each verb."""

import gc
import os

import anyio
import psutil
import pytest
from msgspec import Struct

import qmpsnap
from qmpsnap.machine.starting import logs
from qmpsnap.machine.starting.run_files import CONSOLE_LOG
from qmpsnap.model.machines.spec import MachineSpec
from tests.live.booted import start_booted
from tests.live.machine import ONE_DISK, context_of, hold_invariants

pytestmark = pytest.mark.version

SHORT = 24
CYCLES = int(os.environ.get("QMPSNAP_CYCLES", SHORT))
"""Snapshots that are taken and deleted by one process; ``scripts/growth`` takes 2,000."""
LOG_OF_SQLITE = 1100 * 4120


async def test_a_console_that_a_guest_fills_is_cut_by_the_next_command(
    q: qmpsnap.Controller, guest_spec: MachineSpec
) -> None:
    vm = await q.define(guest_spec)
    await start_booted(vm)
    console = context_of(vm).home.log_dir(vm.name) / CONSOLE_LOG
    await vm.run("(while :; do seq 1 2000; done >/dev/ttyS0) >/dev/null 2>&1 & echo $! >/run/filler")
    with anyio.fail_after(180):
        while console.stat().st_size <= logs.LIMIT + 65536:
            await anyio.sleep(0.1)
    await vm.state()
    assert console.stat().st_size < logs.LIMIT
    said = console.read_bytes()
    assert said.startswith(b"[qmpsnap has removed the ")
    assert b"\0" not in said
    before = console.stat().st_size
    with anyio.fail_after(60):
        while console.stat().st_size == before:  # QEMU goes on behind what was kept
            await anyio.sleep(0.05)
    await vm.run("kill $(cat /run/filler)")
    assert b"\0" not in console.read_bytes()


class Grown(Struct, frozen=True):
    """What a process, its QEMU and its home take, in bytes and numbers."""

    memory: int
    qemu: int
    descriptors: int
    qemu_descriptors: int
    store: int
    logs: int
    files: int


def measure(vm: qmpsnap.MachineHandle, pid: int) -> Grown:
    gc.collect()
    home, ours, theirs = context_of(vm).home, psutil.Process(), psutil.Process(pid)
    return Grown(
        memory=ours.memory_info().rss,
        qemu=theirs.memory_info().rss,
        descriptors=ours.num_fds(),
        qemu_descriptors=theirs.num_fds(),
        store=sum(path.stat().st_size for path in home.data.glob("qmpsnap.db*")),
        logs=sum(logs.sizes(home, vm.name).values()),
        files=sum(path.is_file() for path in home.data.rglob("*")),
    )


@pytest.mark.timeout(3600 if CYCLES > SHORT else 300)
async def test_cycles_of_snapshot_and_delete_leave_nothing_behind(q: qmpsnap.Controller) -> None:
    vm = await q.define(ONE_DISK)
    pid = (await vm.start(paused=True)).pid
    found = []
    for number in range(CYCLES):
        await vm.snapshot("s")
        await vm.delete_snapshots("s")
        if (number + 1) % (CYCLES // 6) == 0:
            found.append(measure(vm, pid))
            print(number + 1, found[-1])  # noqa: T201 - the figures of the long form
    early, last = found[1], found[-1]
    assert last.memory < 1.15 * early.memory
    assert last.qemu < 1.25 * early.qemu
    closing = 2  # a connection that QEMU or the loop has not let go of yet
    assert last.descriptors <= early.descriptors + closing
    assert last.qemu_descriptors <= early.qemu_descriptors + closing
    assert last.files == early.files
    # The journal has a row for each operation, 4 KiB at most; SQLite begins its log anew at 1,000 pages.
    assert last.store < early.store + 2 * 4096 * CYCLES + LOG_OF_SQLITE
    assert last.logs < logs.LIMIT
    await hold_invariants(vm)
