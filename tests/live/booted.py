"""A guest that has just booted, without its boot: it is booted once for all the tests of a session, and loaded in each.

For tests that only need *a* guest. Those that test a start, a console or a clock boot one of their own.
"""

import fcntl
import hashlib
import os
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import msgspec
from anyio import to_thread
from msgspec.structs import replace

import qmpsnap
from qmpsnap.model.layers.vmstate import Vmstate
from qmpsnap.model.machines.spec import MachineSpec
from qmpsnap.ops.lifecycle.power import bring_up
from qmpsnap.ops.memory.load import Loading
from qmpsnap.ops.session.session import working
from tests.conftest import SHARED
from tests.live.machine import context_of

BOOT = 180.0
"""Seconds for a boot that takes two on an idle host."""


async def start_booted(vm: qmpsnap.MachineHandle) -> None:
    """Start a stopped machine whose disks are empty; its guest runs on from where one like it had its agent ready."""
    state = await _state_of((await vm.record()).spec)
    descriptor = os.open(state.path, os.O_RDONLY)
    try:
        context = context_of(vm)
        async with working(context, vm.name, "start") as work:
            await bring_up(context, work.machine, paused=False, loading=Loading(state, descriptor))
    finally:
        os.close(descriptor)


async def _state_of(spec: MachineSpec) -> Vmstate:
    """The memory of a guest of this spec, of the QEMU under test; whoever needs it first makes it."""
    text = msgspec.json.encode(replace(spec, name="booted"))
    folder = Path(os.environ[SHARED]) / hashlib.sha256(text).hexdigest()[:16]
    record = folder / "vmstate.json"
    async with _locked(folder):
        if not record.exists():  # in a process of its own, in which no test has broken anything
            argv = [sys.executable, "-m", __name__, tempfile.mkdtemp(dir=folder), str(record)]
            await anyio.run_process(argv, input=text, cwd=Path(__file__).parents[2])
    return msgspec.json.decode(record.read_bytes(), type=Vmstate)


async def _boot(home: str, record: Path, spec: MachineSpec) -> None:
    async with qmpsnap.open(home) as q:
        vm = await q.define(spec)
        await vm.start()
        try:
            await vm.run("true", timeout=BOOT)
            snapshot = await vm.snapshot("booted", kind="full")
        finally:
            await vm.stop(force=True)
    record.write_bytes(msgspec.json.encode(snapshot.vmstate))


@asynccontextmanager
async def _locked(folder: Path) -> AsyncIterator[None]:
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        await to_thread.run_sync(fcntl.flock, lock, fcntl.LOCK_EX)
        yield


if __name__ == "__main__":
    anyio.run(_boot, sys.argv[1], Path(sys.argv[2]), msgspec.json.decode(sys.stdin.buffer.read(), type=MachineSpec))
