"""The controller dies at each step of a full snapshot and of a save; QEMU lives or dies with it. Then: recover."""

import pytest

import qmpsnap
from qmpsnap.errors import OperationPending
from qmpsnap.model.spec import MachineSpec
from tests.live.crash import die_at, kill_qemu
from tests.live.machine import content_hash, fill, hold_invariants

STORE = "qmpsnap.store.sqlite"
COMMANDS = "qmpsnap.qmp.commands"
MIGRATION = "qmpsnap.qmp.migration"
MEMORY = "qmpsnap.ops.memory"
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
    "with the file finished": ("qmpsnap.machine.statefile", "finish", "after", 1),
    "settled": (STORE, "SqliteStore.settle", "after", 1),
}
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
    await die_at(STEPS[step], *VERBS[verb])
    if qemu == "dies too":
        await kill_qemu(vm)
    try:
        await vm.recover()
    except OperationPending:  # its memory is still being written, and the guest runs on
        assert await vm.state() == "running"
        await vm.wait()
    assert await vm.recover() == []
    snapshots = {found.name: found for found in await vm.snapshots()}
    taken = snapshots.get("all") or snapshots.get("saved-1")
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
