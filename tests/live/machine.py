"""What the live tests do to a machine from outside, and the invariants they hold it to afterwards."""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

from qemu.qmp import QMPClient

import qmpsnap
from qmpsnap.machine.starting.run_files import USER_SOCKET
from qmpsnap.model.layers.chain import Layer
from qmpsnap.model.machines.spec import DiskSpec, MachineSpec
from qmpsnap.model.names import LayerId
from qmpsnap.ops.base.context import Context
from tests.live.digest import content_digest, whole_digest

MIB = 1 << 20

Hashes = dict[tuple[str, str], str]
"""(Snapshot, disk) to the digest of the disk at its moment."""

ONE_DISK = MachineSpec(name="still", memory=64 * MIB, disks=(DiskSpec(name="vda", size=16 * MIB),))


def context_of(vm: qmpsnap.MachineHandle) -> Context:
    return vm._context


@asynccontextmanager
async def user_monitor(vm: qmpsnap.MachineHandle) -> AsyncIterator[QMPClient]:
    """The monitor that users have for themselves."""
    client = QMPClient(vm.name)
    await client.connect(str(context_of(vm).home.run_dir(vm.name) / USER_SOCKET))
    try:
        yield client
    finally:
        await client.disconnect()


async def fill(vm: qmpsnap.MachineHandle, disk: str, pattern: int, *, offset: int = 0, length: int = MIB) -> None:
    """Write ``length`` bytes of ``pattern`` to the disk of a machine under -S, as its guest would."""
    await _qemu_io(vm, disk, f"write -P {pattern} {offset} {length}")


async def flush(vm: qmpsnap.MachineHandle, disk: str) -> None:
    """Make durable what was written to the disk of a machine that runs, as its guest would."""
    await _qemu_io(vm, disk, "flush")


async def _qemu_io(vm: qmpsnap.MachineHandle, disk: str, command: str) -> None:
    async with user_monitor(vm) as qemu:
        backends: Any = await qemu.execute("query-block")
        qdev = next(str(b["qdev"]) for b in backends if disk in str(b.get("qdev", "")).split("/"))
        line = f'qemu-io -d {qdev} "{command}"'
        said = await qemu.execute("human-monitor-command", {"command-line": line})
        assert not said, said  # errors are answered; what qemu-io has to say otherwise goes to QEMU's own output


async def grown(q: qmpsnap.Controller, *names: str) -> qmpsnap.MachineHandle:
    """A paused machine of one disk with these snapshots: a MiB of its own before each and one more after the last."""
    vm = await q.define(ONE_DISK)
    await vm.start(paused=True)
    for number, name in enumerate(names, start=1):
        await fill(vm, "vda", number, offset=number * MIB)
        await vm.snapshot(name)
    await fill(vm, "vda", 99, offset=8 * MIB)
    return vm


async def grown_and_stopped(q: qmpsnap.Controller) -> tuple[qmpsnap.MachineHandle, Hashes, str]:
    """The same with two snapshots, stopped; their hashes, and that of its disk."""
    vm = await grown(q, "s1", "s2")
    await vm.stop(force=True)
    return vm, await snapshot_hashes(vm), await active_hash(vm)


async def content_hash(vm: qmpsnap.MachineHandle, layer_id: str) -> str:
    """Digest of all that a layer holds which nobody writes to, its backing included."""
    return await hash_of(vm, context_of(vm).store.layer(LayerId(layer_id)))


async def hash_of(vm: qmpsnap.MachineHandle, layer: Layer) -> str:
    """The same of a layer that the store need not have."""
    return await content_digest(layer, qemu_img=context_of(vm).image.binary)


async def full_hash(vm: qmpsnap.MachineHandle, layer: Layer) -> str:
    """The same by reading every byte through QEMU's block layer, which trusts no map of what is allocated."""
    return await whole_digest(layer, qemu_img=context_of(vm).image.binary)


async def snapshot_hashes(vm: qmpsnap.MachineHandle) -> Hashes:
    """What every snapshot in state ok reads as."""
    return {
        (snapshot.name, point.disk): await content_hash(vm, point.layer)
        for snapshot in await vm.snapshots()
        if snapshot.state == "ok"
        for point in snapshot.points
    }


async def active_hash(vm: qmpsnap.MachineHandle) -> str:
    """Digest of what the guest reads on its first disk; a paused machine is stopped for it and started again."""
    ran = await vm.is_running()
    if ran:
        await vm.stop(force=True)
    found = await full_hash(vm, context_of(vm).store.layer((await vm.chains())[0].active.id))
    if ran:
        await vm.start(paused=True)
    return found


async def hold_invariants(vm: qmpsnap.MachineHandle, hashes: Mapping[tuple[str, str], str] | None = None) -> None:
    """Assert I1 by content, and whatever `qmpsnap check` holds a machine to (docs/explanation/how-it-works.md).

    Args:
        vm: the machine, idle.
        hashes: (snapshot, disk) to the digest of the disk at its moment.
    """
    await _snapshots_read_as_they_did(vm, hashes or {})
    found = await vm.check()
    assert found.findings == (), found.findings


async def _snapshots_read_as_they_did(vm: qmpsnap.MachineHandle, hashes: Mapping[tuple[str, str], str]) -> None:
    snapshots = {snapshot.name: snapshot for snapshot in await vm.snapshots()}
    for (name, disk), recorded in hashes.items():
        assert snapshots[name].state == "ok"
        point = snapshots[name].point(disk)
        assert point is not None
        assert await content_hash(vm, point.layer) == recorded, f"snapshot {name} of {disk} changed"
