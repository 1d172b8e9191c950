"""The controller dies at each step of a full snapshot and of a save; QEMU lives or dies with it. Then: recover."""

import anyio
import pytest

import qmpsnap
from qmpsnap.errors import OperationPending
from qmpsnap.machine.argv import QMP_SOCKET
from qmpsnap.model.spec import MachineSpec
from tests.live.crash import die_at, kill_qemu
from tests.live.machine import content_hash, context_of, fill, hold_invariants

STORE = "qmpsnap.store.sqlite"
COMMANDS = "qmpsnap.qmp.commands"
MIGRATION = "qmpsnap.qmp.migration"
MEMORY = "qmpsnap.ops.memory"
STATEFILE = "qmpsnap.machine.statefile"
STEPS = {
    "after the journal row": (STORE, "SqliteStore.open_operation", "after", 1),
    "with the overlays open": (COMMANDS, "blockdev_add", "after", 2),
    "with the file made": ("qmpsnap.machine.statefile", "create", "after", 1),
    "with the file handed over": (MIGRATION, "hand_over", "after", 1),
    "marked transaction": (STORE, "SqliteStore.mark", "after", 1),
    "with the guest held": (COMMANDS, "control", "after", 1),
    "with the disks moved": (COMMANDS, "transaction", "after", 1),
    "with the memory on its way": (MIGRATION, "start", "after", 1),
    "with the memory fixed": (MEMORY, "fixed", "after", 1),
    "marked saving": (STORE, "SqliteStore.mark", "after", 2),
    "with the memory written": (MEMORY, "written", "after", 1),
    "with QEMU put back": (MIGRATION, "put_back", "after", 1),
    "with the manifest appended": (STATEFILE, "_seal", "after", 1),
    "with the name given": (STATEFILE, "_sync_folder", "before", 1),
    "with the file finished": ("qmpsnap.machine.statefile", "finish", "after", 1),
    "settled": (STORE, "SqliteStore.settle", "after", 1),
}
PACKING = {
    "packing": (STATEFILE, "_zstandard", "after", 2),
    "packed": (STATEFILE, "_compress", "after", 1),
    "with the manifest appended": (STATEFILE, "_seal", "after", 1),
    "with the name given": (STATEFILE, "_sync_folder", "before", 1),
}
TAKEN = ("with the name given", "with the file finished", "settled")
"""From here on the snapshot is there, whatever becomes of QEMU."""
TAKEN_IF_ALIVE = (
    "with the memory on its way",
    "with the memory fixed",
    "marked saving",
    "with the memory written",
    "with QEMU put back",
    "with the manifest appended",
)
"""From here on QEMU has the memory of the right instant, and it ends as a snapshot if QEMU lives."""
ONLY_SNAPSHOT = {"with the guest held"}
"""A save stops the guest as well, but never lets it run again: the step is no other than the next."""
VERBS = {"snapshot": ("snapshot", "create", "still", "all", "--kind", "full"), "save": ("save", "still")}
CASES = [
    (step, verb, qemu)
    for step in STEPS
    for verb in VERBS
    for qemu in ("lives", "dies too")
    if verb == "snapshot" or step not in ONLY_SNAPSHOT
]


@pytest.mark.grid
@pytest.mark.parametrize(("step", "verb", "qemu"), CASES)
async def test_killed_in_the_middle(
    q: qmpsnap.Controller, still_spec: MachineSpec, step: str, verb: str, qemu: str
) -> None:
    vm = await q.define(still_spec)
    await vm.start()  # its firmware runs and waits, which is guest enough
    await fill(vm, "vda", 1)
    await vm.snapshot("first")
    await fill(vm, "vda", 2)
    hashes = {
        (found.name, point.disk): await content_hash(vm, point.layer)
        for found in await vm.snapshots()
        for point in found.points
    }
    await die_at(STEPS[step], *VERBS[verb], qemu_too=qemu == "dies too")
    try:
        await vm.recover()
    except OperationPending:  # its memory is still being written, and the guest runs on
        assert await vm.state() == "running"
        await vm.wait()
    assert await vm.recover() == []
    snapshots = {found.name: found for found in await vm.snapshots()}
    taken = snapshots.get("all") or snapshots.get("saved-1")
    assert bool(taken) == (step in TAKEN or (qemu == "lives" and step in TAKEN_IF_ALIVE))
    ended = verb == "save" and taken is not None
    assert await vm.state() == ("stopped" if qemu == "dies too" or ended else "running")
    await hold_invariants(vm, hashes)
    if taken:
        assert taken.vmstate is not None
        await vm.revert(taken.name)
        assert await vm.state() == "running"
    else:
        if qemu == "dies too":
            await vm.start()
        await vm.snapshot("again", kind="full")
    await hold_invariants(vm, hashes)


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
        "with the file at hand": ("qmpsnap.machine.process", "spawn", "after", 1),
        "loading": (MIGRATION, "start", "before", 1),
        "loaded": ("qmpsnap.ops.power", "load", "after", 1),
    }[step]
    await die_at(point, "snapshot", "revert", "still", "all")
    socket = context_of(vm).home.run_dir(vm.name) / QMP_SOCKET
    while not (await vm.is_running() and socket.exists()):  # it was let go in the very moment of its birth
        await anyio.sleep(0.05)
    if qemu == "dies too":
        await kill_qemu(vm)
    await vm.recover()
    assert await vm.recover() == []
    on = step == "loaded" and qemu == "lives"
    assert await vm.state() == ("running" if on else "stopped")
    await hold_invariants(vm)
    await vm.revert("all")
    assert await vm.state() == "running"
    await hold_invariants(vm)
