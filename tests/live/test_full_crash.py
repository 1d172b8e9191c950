"""The controller dies while memory is packed, and while it is loaded; what else dies where is in tests/faults."""

import anyio
import pytest

import qmpsnap
from qmpsnap.machine.starting.run_files import QMP_SOCKET
from qmpsnap.model.machines.spec import MachineSpec
from tests.harness.deaths import Call, die_at
from tests.harness.processes import kill_qemu
from tests.live.machine import context_of, fill, hold_invariants

pytestmark = pytest.mark.version

STORE = "qmpsnap.store.sqlite.backend"
COMMANDS = "qmpsnap.qmp.commands"
MIGRATION = "qmpsnap.qmp.migration"
MEMORY = "qmpsnap.ops.memory.save"
STATEFILE = "qmpsnap.machine.statefile"
PACKING = {
    "packing": Call(STATEFILE, "zstandard_package", "after", 2),
    "packed": Call(STATEFILE, "_compress", "after", 1),
    "with the manifest appended": Call(STATEFILE, "_seal", "after", 1),
    "with the name given": Call(STATEFILE, "sync_folder", "before", 1),
}
TAKEN = ("with the name given", "with the file finished", "settled")
"""From here on the snapshot is there, whatever becomes of QEMU."""
VERBS = {"snapshot": ("snapshot", "create", "still", "all", "--kind", "full"), "save": ("save", "still")}


@pytest.mark.parametrize("qemu", ["lives", "dies too"])
@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("step", PACKING)
async def test_killed_while_it_is_packed(
    q: qmpsnap.Controller, still_spec: MachineSpec, step: str, verb: str, qemu: str
) -> None:
    vm = await q.define(still_spec)
    await vm.start()
    await die_at(PACKING[step], *VERBS[verb], "--compress", "zstd", qemu_too=qemu == "dies too")
    await vm.recover()
    assert await vm.recover() == []
    taken = [found.name for found in await vm.snapshots()]
    if qemu == "lives" or step in TAKEN:
        assert taken == ["all" if verb == "snapshot" else "saved-1"]
        await vm.revert(taken[0])
        assert await vm.state() == "running"
    else:
        assert taken == []
    await hold_invariants(vm)


@pytest.mark.parametrize("step", ["with the file at hand", "loading", "loaded"])
@pytest.mark.parametrize("qemu", ["lives", "dies too"])
async def test_killed_while_going_back(q: qmpsnap.Controller, still_spec: MachineSpec, step: str, qemu: str) -> None:
    vm = await q.define(still_spec)
    await vm.start()
    await vm.snapshot("all", kind="full")
    await fill(vm, "vda", 3)
    point = {
        "with the file at hand": Call("qmpsnap.machine.starting.process", "spawn", "after", 1),
        "loading": Call(MIGRATION, "start", "before", 1),
        "loaded": Call("qmpsnap.ops.lifecycle.power", "load", "after", 1),
    }[step]
    await die_at(point, "snapshot", "revert", "still", "all")
    socket = context_of(vm).home.run_dir(vm.name) / QMP_SOCKET
    while not (await vm.is_running() and socket.exists()):  # it was let go in the very moment of its birth
        await anyio.sleep(0.05)
    if qemu == "dies too":
        kill_qemu(vm)
    await vm.recover()
    assert await vm.recover() == []
    on = step == "loaded" and qemu == "lives"
    assert await vm.state() == ("running" if on else "stopped")
    await hold_invariants(vm)
    await vm.revert("all")
    assert await vm.state() == "running"
    await hold_invariants(vm)
