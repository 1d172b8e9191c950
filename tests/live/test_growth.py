"""What grows while a machine lives: logs that a guest fills."""

import anyio
import pytest

import qmpsnap
from qmpsnap.machine import logs
from qmpsnap.machine.argv import CONSOLE_LOG
from qmpsnap.model.spec import MachineSpec
from tests.live.booted import start_booted
from tests.live.machine import context_of

pytestmark = pytest.mark.version


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
